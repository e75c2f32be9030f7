// The page kernel: attention over any mixture of formats, any number of query rows, head_dim 64, 96, 128 and 256. A thread
// block of four warps takes one item (decode) or one tile of 64 query rows of it (prefill), and walks its pages: the page is
// dequantised into shared memory as fp16 (keys [token][channel], values [channel][token]), then every warp runs mma.m16n8k16
// with 16 query rows as operand A. With at most 16 rows the warps share the rows and split the page's tokens; otherwise they
// share the tokens and split the rows. The softmax is in base 2, weights are held at 2^kLift over the maximum.
#pragma once

#include "attention/cuda/dequantise_trellis.cuh"
#include "attention/cuda/partials.cuh"
#include "attention/cuda/shape.h"

namespace kvmix::cuda {

inline constexpr int kChunkTokens = 32, kWarpRows = 16;
static_assert(kTileRows == kWarps * kWarpRows);

// What a thread block needs beside AttendArguments.
struct PageArguments {
  AttendArguments attend;
  SideShape key, value;
  int value_start;  // of a record
  ThinKeys thin;    // of the kernel for them
};

template <int dim>
struct PageTile {
  static constexpr int key_row = dim + 8, value_row = kPageTokens + 8;  // halves; 4 banks further a row
  static constexpr int merge_row = dim + 8;                             // floats
  static constexpr int key_bytes = kPageTokens * key_row * 2;
  static constexpr int shared_bytes = page_shared_bytes(dim);
  static_assert(shared_bytes >= key_bytes + dim * value_row * 2 && shared_bytes >= kTileRows * (merge_row + 2) * 4);
};

// A packed side to shared memory, every kWarps-th block a warp: keys row = token, values row = channel. Values of an open page
// become zero from `live` on. `trellis`: it may have such codes; `thin`: keys of fewer channels, which stand in the first
// columns.
template <int dim, bool key, bool open, bool trellis, bool thin = false>
__device__ inline void expand_side(const uint8_t* part, const SideShape& side, int live, __half* out) {
  constexpr int kRow = key ? PageTile<dim>::key_row : PageTile<dim>::value_row;
  const unsigned blocks = thin ? static_cast<unsigned>(side.head_dim) / 16 : dim / 16;
  with_format<key, open, trellis>(side, [&](auto what, auto width) {
    constexpr int bits = width.value;
    const int lane = lane_again();
    __half* const mine = out + lane / 4 * kRow + 2 * (lane % 4);
    const auto store = [&](unsigned token0, unsigned channel0, uint32_t(&a)[4]) {
      if constexpr (open && !key) mask_tokens(a, static_cast<int>(token0), live, lane);
      __half* const at = mine + (key ? token0 * kRow + channel0 : channel0 * kRow + token0);
#pragma unroll
      for (int reg = 0; reg < 4; ++reg) *reinterpret_cast<uint32_t*>(at + reg % 2 * 8 * kRow + reg / 2 * 8) = a[reg];
    };
    unsigned block = threadIdx.x / 32;
    if constexpr (bits == 16) {
      for (; block < blocks; block += kWarps) copy_block<0, kFields>(part, block, lane, store);
    } else if constexpr (is_trellis_width(bits)) {
      for (; block < blocks; block += kWarps) {
        uint32_t w[block_words(bits)];
        load_codes<bits>(part + block * block_bytes(bits), lane, w);
        dequantise_trellis<what.value, bits, 0, kFields>(w, part, side, block, lane, store);
      }
    } else {
      LaneScales<what.value> scales(part + side.meta(), side, lane);
      uint32_t w[block_words(bits)];
      if (!thin || block < blocks) load_codes<bits>(part + block * block_bytes(bits), lane, w);
      while (block < blocks) {
        dequantise_block<what.value, bits, 0, kFields>(w, scales, block, store);
        block += kWarps;
        if (block < blocks) load_codes<bits>(part + block * block_bytes(bits), lane, w);
      }
    }
  });
}

// An open page, whose values stand `value_row` rows behind its keys, to shared memory; slots without a token become zero.
template <int dim>
__device__ inline void copy_open(const __half* page, int live, int value_row, __half* keys, __half* values) {
  constexpr int kOctets = dim / 8;
  const int thread = static_cast<int>(threadIdx.x);
  const auto load = [&](int token, int octet) {
    const uint4 zero = {0, 0, 0, 0};
    return token < live ? *reinterpret_cast<const uint4*>(page + token * dim + octet * 8) : zero;
  };
  for (int at = thread; at < kPageTokens * kOctets; at += kThreads) {
    const int token = at / kOctets, octet = at % kOctets;
    *reinterpret_cast<uint4*>(keys + token * PageTile<dim>::key_row + octet * 8) = load(token, octet);
  }
  page += value_row * dim;
  for (int at = thread; at < kPageTokens / 2 * kOctets; at += kThreads) {
    const int token = at % (kPageTokens / 2) * 2, octet = at / (kPageTokens / 2);
    const uint4 v0 = load(token, octet), v1 = load(token + 1, octet);
    const uint32_t a[4] = {v0.x, v0.y, v0.z, v0.w}, b[4] = {v1.x, v1.y, v1.z, v1.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      auto* const to = reinterpret_cast<uint32_t*>(values + (octet * 8 + 2 * i) * PageTile<dim>::value_row + token);
      to[0] = __byte_perm(a[i], b[i], 0x5410);
      to[PageTile<dim>::value_row / 2] = __byte_perm(a[i], b[i], 0x7632);
    }
  }
}

// `thin`: all pages are sealed ones of the list's chosen key channels; `trellis`: for formats with such codes, a kernel of its
// own, since they take more registers.
template <int dim, bool split_tokens, bool thin, bool trellis>
__global__ void __launch_bounds__(kThreads, dim == 64    ? 4
                                            : dim <= 128 ? 3
                                                         : 1) page_kernel(const __grid_constant__ PageArguments arguments) {
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ float row_factor[kTileRows];
  __shared__ int last;
  const AttendArguments& args = arguments.attend;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const kvmix_cuda_item item = args.items[blockIdx.x];
  if (item.sequence < 0) return;
  const int all_rows = args.group * args.q_tokens, q_heads = args.kv_heads * args.group;
  const int row0 = static_cast<int>(blockIdx.y) * kTileRows, rows = min(all_rows - row0, kTileRows);
  const auto row_offset = [&](int row) {
    const int token = (row0 + row) / args.group, head = item.kv_head * args.group + (row0 + row) % args.group;
    return (static_cast<int64_t>(item.sequence) * args.q_tokens + token) * q_heads + head;
  };
  using Tile = PageTile<dim>;
  const int key_width = thin ? arguments.thin.width : dim;
  auto* const keys = reinterpret_cast<__half*>(shared);
  auto* const values = reinterpret_cast<__half*>(shared + Tile::key_bytes);

  store_new_rows(args, item, dim);
  // Query rows, scaled by a power of two to at most 1.
  for (int row = warp; row < kTileRows; row += kWarps) {
    float x[dim / 32], best = 0.0f;
#pragma unroll
    for (int i = 0; i < dim / 32; ++i) {
      int channel = 32 * i + lane;
      if constexpr (thin) channel = channel < key_width ? arguments.thin.of(item, args.kv_heads)[channel] : -1;
      x[i] = row < rows && channel >= 0 ? load_query(args, row_offset(row) * dim + channel) : 0.0f;
      best = fmaxf(best, fabsf(x[i]));
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) best = fmaxf(best, __shfl_xor_sync(~0u, best, step));
    const int exponent = best > 0.0f ? ilogbf(best) + 1 : 0;
    if (lane == 0) row_factor[row] = args.scale * power(exponent);
#pragma unroll
    for (int i = 0; i < dim / 32; ++i) keys[row * Tile::key_row + 32 * i + lane] = __float2half(x[i] * power(-exponent));
  }
  __syncthreads();
  const int my_row = (split_tokens ? 0 : warp * kWarpRows) + lane / 4, pair = 2 * (lane % 4);
  uint32_t query[dim / 16][4];
#pragma unroll
  for (int k = 0; k < dim / 16; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      query[k][i] =
          *reinterpret_cast<const uint32_t*>(keys + (my_row + 8 * (i % 2)) * Tile::key_row + 16 * k + pair + 8 * (i / 2));
    }
  }
  // A lane's row of the tiles of two operands B side by side.
  const int tile_row = lane % 8 + lane / 16 * 8, tile_column = lane / 8 % 2 * 8;
  const uint32_t key_tile = shared_address(keys + tile_row * Tile::key_row + tile_column);
  const uint32_t value_tile = shared_address(values + tile_row * Tile::value_row + tile_column);
  float factor[2], top[2] = {kFloor, kFloor}, sum[2] = {};
  int begin[2], end[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = my_row + 8 * i;
    factor[i] = row_factor[row];
    end[i] = row < rows ? item.length - (args.q_tokens - 1 - (row0 + row) / args.group) : 0;
    begin[i] = args.sliding_window > 0 ? max(end[i] - args.sliding_window, 0) : 0;
  }
  // What the tile's first and last rows see bounds the pages.
  const int last_end = item.length - (args.q_tokens - 1 - (row0 + rows - 1) / args.group);
  const int first_end = item.length - (args.q_tokens - 1 - row0 / args.group);
  const int first_begin = args.sliding_window > 0 ? max(first_end - args.sliding_window, 0) : 0;
  float acc[dim / 8][4] = {};

  const int32_t* const table = args.page_table + item.sequence * args.page_table_stride;
  int32_t next_id = item.page_begin < item.page_end ? table[item.page_begin] : 0;
  for (int page = item.page_begin; page < item.page_end; ++page) {
    const int first = args.sinks > 0 ? (page == 0 ? 0 : args.sinks + (page - 1) * kPageTokens) : page * kPageTokens;
    const int live = min(args.sinks > 0 && page == 0 ? args.sinks : kPageTokens, item.length - first);
    const int32_t id = next_id;
    if (page + 1 < item.page_end) next_id = table[page + 1];
    if (first >= last_end) break;
    if (first + live <= first_begin) continue;
    __syncthreads();
    if (id >= 0) {
      const uint8_t* record = args.records + id * args.record_page_stride + item.kv_head * args.record_head_stride;
      expand_side<dim, true, false, trellis && !thin, thin>(record + kHeaderBytes, arguments.key, live, keys);
      expand_side<dim, false, false, trellis>(record + arguments.value_start, arguments.value, live, values);
    } else if constexpr (!thin) {
      const uint8_t* const open =
          args.open_pages + static_cast<int64_t>(~id) * args.open_page_stride + item.kv_head * args.open_head_stride;
      if (is_rows(args, page)) {
        copy_open<dim>(reinterpret_cast<const __half*>(open), live, value_row(args, page), keys, values);
      } else {
        expand_side<dim, true, true, false>(open + kHeaderBytes, args.open.key(), live, keys);
        expand_side<dim, false, true, false>(open + args.open.key_bytes(), args.open.value(), live, values);
      }
    }
    __syncthreads();
    for (int chunk = split_tokens ? warp : 0; chunk < (split_tokens ? warp + 1 : kPageTokens / kChunkTokens); ++chunk) {
      if (chunk * kChunkTokens >= live) break;
      float s[4][4] = {};
#pragma unroll
      for (int k = 0; k < dim / 16; ++k) {
        if (thin && 16 * k >= key_width) break;
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
          uint32_t b[4];
          load_tiles(key_tile + static_cast<uint32_t>((chunk * kChunkTokens + 8 * j) * Tile::key_row + 16 * k) * 2, false, b);
          mma(s[j], query[k], b[0], b[1]);
          mma(s[j + 1], query[k], b[2], b[3]);
        }
      }
      const int page_limit = first + live;
      float best[2] = {-INFINITY, -INFINITY};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int position = first + chunk * kChunkTokens + 8 * j + pair + i % 2;
          float x = s[j][i] * factor[i / 2];
          if (args.softcap > 0.0f) x = args.softcap * tanh_fast(x / args.softcap);
          if (position < begin[i / 2] || position >= end[i / 2] || position >= page_limit) x = -INFINITY;
          s[j][i] = x;
          best[i / 2] = fmaxf(best[i / 2], x);
        }
      }
      float shrink[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        best[i] = fmaxf(best[i], __shfl_xor_sync(~0u, best[i], 1));
        best[i] = fmaxf(best[i], __shfl_xor_sync(~0u, best[i], 2));
        const float next = fmaxf(top[i], best[i]);
        shrink[i] = exp2_fast(top[i] - next);
        top[i] = next;
        sum[i] *= shrink[i];
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[j][i] = exp2_fast(s[j][i] + (kLift - top[i / 2]));
          sum[i / 2] += s[j][i];
        }
      }
#pragma unroll
      for (int c = 0; c < dim / 8; ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[c][i] *= shrink[i / 2];
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const uint32_t a[4] = {pack(s[2 * k][0], s[2 * k][1]), pack(s[2 * k][2], s[2 * k][3]),
                               pack(s[2 * k + 1][0], s[2 * k + 1][1]), pack(s[2 * k + 1][2], s[2 * k + 1][3])};
#pragma unroll
        for (int c = 0; c < dim / 8; c += 2) {
          uint32_t b[4];
          load_tiles(value_tile + static_cast<uint32_t>(8 * c * Tile::value_row + chunk * kChunkTokens + 16 * k) * 2, false, b);
          mma(acc[c], a, b[0], b[1]);
          mma(acc[c + 1], a, b[2], b[3]);
        }
      }
    }
  }

  // Each warp's rows to shared memory; with split tokens four rows there are one.
  __syncthreads();
  auto* const merged = reinterpret_cast<float*>(shared);
  auto* const merged_sums = reinterpret_cast<float2*>(merged + kTileRows * Tile::merge_row);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    sum[i] += __shfl_xor_sync(~0u, sum[i], 1);
    sum[i] += __shfl_xor_sync(~0u, sum[i], 2);
    const int row = warp * kWarpRows + lane / 4 + 8 * i;
    if (lane % 4 == 0) merged_sums[row] = make_float2(top[i], sum[i]);
#pragma unroll
    for (int c = 0; c < dim / 8; ++c) {
      *reinterpret_cast<float2*>(merged + row * Tile::merge_row + 8 * c + pair) = make_float2(acc[c][2 * i], acc[c][2 * i + 1]);
    }
  }
  __syncthreads();
  write_rows<dim / 4, split_tokens ? kWarps : 1>(
      args, item, {row0, rows, all_rows, item.ticket * static_cast<int>(gridDim.y) + static_cast<int>(blockIdx.y)},
      reinterpret_cast<float2*>(shared), &last, row_offset, [&](int w, int row) {
        const int at = w * kWarpRows + row;
        return RowPart{merged_sums[at], reinterpret_cast<const float4*>(merged + at * Tile::merge_row)};
      });
}

}  // namespace kvmix::cuda
