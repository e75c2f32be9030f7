// The page kernel: attention over any mixture of formats, any number of query rows, head_dim 64, 96, 128 and 256. A thread
// block of four warps takes one item (decode) or one tile of 64 query rows of it (prefill), and walks its pages: the page is
// dequantised once into shared memory as fp16 (keys [token][channel], values [channel][token]), then every warp runs
// mma.m16n8k16 with 16 query rows as operand A. With at most 16 rows the warps share the rows and split the page's tokens,
// otherwise they share the tokens and split the rows. The softmax is in base 2, weights are held at 2^kLift over the maximum.
#pragma once

#include "attention/attend_cuda_common.cuh"
#include "attention/cuda_support.h"

namespace kvmix::cuda {

inline constexpr int kChunkTokens = 32, kWarpRows = 16;
static_assert(kTileRows == kWarps * kWarpRows);

// What a thread block needs beside AttendArguments.
struct PageArguments {
  AttendArguments attend;
  RecordShape shape;
};

template <int dim>
struct PageTile {
  static constexpr int key_row = dim + 8, value_row = kPageTokens + 8;  // halves; 4 banks further a row
  static constexpr int merge_row = dim + 8;                             // floats
  static constexpr int key_bytes = kPageTokens * key_row * 2;
  static constexpr int page_bytes = key_bytes + dim * value_row * 2, merge_bytes = kTileRows * (merge_row + 2) * 4;
  static constexpr int shared_bytes = page_bytes > merge_bytes ? page_bytes : merge_bytes;
};

__device__ inline __half2 half2_of(uint32_t v) { return reinterpret_cast<const __half2&>(v); }
__device__ inline __half2 low_half2(uint32_t a, uint32_t b) { return half2_of(__byte_perm(a, b, 0x5410)); }
__device__ inline __half2 high_half2(uint32_t a, uint32_t b) { return half2_of(__byte_perm(a, b, 0x7632)); }

// The two codes of a register, exact as halves: under the exponent of 1024 they are its last bits.
template <int bits>
__device__ inline __half2 codes_of(const uint32_t (&w)[block_words(bits)], int reg, int field) {
  constexpr uint32_t kMask = both((1u << (bits % 16)) - 1), kBias = both(0x6400u);
  const CodePlace place = code_place(bits, reg, field);
  uint32_t code = (w[place.word] >> place.bit) & kMask;
  if (bits == 3 && field == 7 && reg >= 2) {
    const uint32_t w1 = w[(place.word + 1) % block_words(bits)], w2 = w[(place.word + 2) % block_words(bits)];
    code = ((w[place.word] >> 15) & both(1)) | ((w1 >> 14) & both(2)) | ((w2 >> 13) & both(4));
  }
  return __hsub2(half2_of(code | kBias), half2_of(kBias));
}

// A packed side to shared memory: keys row = token, values row = channel.
template <int dim, bool key, int bits>
__device__ inline void expand_side(const uint8_t* part, const SideShape& side, __half* out) {
  constexpr int kRow = key ? PageTile<dim>::key_row : PageTile<dim>::value_row, kTiles = dim / 16;
  const __half2 centre = __float2half2_rn(((1 << (bits % 16)) - 1) * 0.5f);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const uint8_t* const meta = part + side.meta();
  const int group_shift = 31 - __clz(side.group), mid_bytes = 2 * side.mid_step();
  for (int block = warp; block < dim / 16; block += kWarps) {
    uint32_t w[block_words(bits)];
    load_words<bits>(part + block * block_bytes(bits), lane, w);
#pragma unroll
    for (int field = 0; field < kFields; ++field) {
      const int tile = block * kFields + field, token0 = tile / kTiles * 16, channel0 = tile % kTiles * 16;
      // Scales and midpoints of the pairs of each register. A tile lies in one group; what a lane needs of it lies together.
      __half2 scale[4], mid[4];
      if constexpr (bits != 16) {
        if (!key) {
          const int slot = (channel0 >> group_shift) * kPageTokens * 2 + (token0 / 2 + 2 * (lane % 4)) * 4;
          const uint4 v = *reinterpret_cast<const uint4*>(meta + 2 * slot);
          scale[0] = scale[1] = low_half2(v.x, v.z), scale[2] = scale[3] = high_half2(v.x, v.z);
          mid[0] = mid[1] = low_half2(v.y, v.w), mid[2] = mid[3] = high_half2(v.y, v.w);
        } else if (side.per_token) {
          const int slot = (channel0 >> group_shift) * kPageTokens * 2 + (token0 / 2 + lane / 4) * 4;
          const uint2 v = *reinterpret_cast<const uint2*>(meta + 2 * slot);
          scale[0] = scale[2] = low_half2(v.x, v.x), scale[1] = scale[3] = high_half2(v.x, v.x);
          mid[0] = mid[2] = low_half2(v.y, v.y), mid[1] = mid[3] = high_half2(v.y, v.y);
        } else {
          const int slot = (token0 >> group_shift) * dim + (lane % 4) * (dim / 4) + channel0 / 4;
          const uint2 v = *reinterpret_cast<const uint2*>(meta + 2 * slot);
          const uint2 m = *reinterpret_cast<const uint2*>(meta + 2 * slot + mid_bytes);
          scale[0] = scale[1] = half2_of(v.x), scale[2] = scale[3] = half2_of(v.y);
          mid[0] = mid[1] = half2_of(m.x), mid[2] = mid[3] = half2_of(m.y);
        }
      }
#pragma unroll
      for (int reg = 0; reg < 4; ++reg) {
        const int row = lane / 4 + 8 * (reg % 2), column = 2 * (lane % 4) + 8 * (reg / 2);
        const int token = token0 + (key ? row : column), channel = channel0 + (key ? column : row);
        __half2 pair;
        if constexpr (bits == 16) {
          pair = half2_of(w[code_place(16, reg, field).word]);
        } else {
          pair = __hfma2(scale[reg], __hsub2(codes_of<bits>(w, reg, field), centre), mid[reg]);
        }
        *reinterpret_cast<__half2*>(out + (key ? token * kRow + channel : channel * kRow + token)) = pair;
      }
    }
  }
}

template <int dim, bool key>
__device__ void expand_side(const uint8_t* part, const SideShape& side, __half* out) {
  switch (side.bits) {
    case 1:
      return expand_side<dim, key, 1>(part, side, out);
    case 2:
      return expand_side<dim, key, 2>(part, side, out);
    case 3:
      return expand_side<dim, key, 3>(part, side, out);
    case 4:
      return expand_side<dim, key, 4>(part, side, out);
    case 8:
      return expand_side<dim, key, 8>(part, side, out);
    default:
      return expand_side<dim, key, 16>(part, side, out);
  }
}

// An open page to shared memory; slots without a token become zero.
template <int dim>
__device__ inline void copy_open(const __half* page, int live, __half* keys, __half* values) {
  constexpr int kOctets = dim / 8;
  const uint4 zero = {0, 0, 0, 0};
  for (int at = static_cast<int>(threadIdx.x); at < kPageTokens * kOctets; at += kThreads) {
    const int token = at / kOctets, channel = at % kOctets * 8;
    const uint4 v = token < live ? *reinterpret_cast<const uint4*>(page + token * dim + channel) : zero;
    *reinterpret_cast<uint4*>(keys + token * PageTile<dim>::key_row + channel) = v;
  }
  page += kPageTokens * dim;
  for (int at = static_cast<int>(threadIdx.x); at < kPageTokens / 2 * kOctets; at += kThreads) {
    const int token = at % (kPageTokens / 2) * 2, channel = at / (kPageTokens / 2) * 8;
    const uint4 v0 = token < live ? *reinterpret_cast<const uint4*>(page + token * dim + channel) : zero;
    const uint4 v1 = token + 1 < live ? *reinterpret_cast<const uint4*>(page + (token + 1) * dim + channel) : zero;
    const uint32_t a[4] = {v0.x, v0.y, v0.z, v0.w}, b[4] = {v1.x, v1.y, v1.z, v1.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      auto* const to = reinterpret_cast<uint32_t*>(values + (channel + 2 * i) * PageTile<dim>::value_row + token);
      to[0] = __byte_perm(a[i], b[i], 0x5410);
      to[PageTile<dim>::value_row / 2] = __byte_perm(a[i], b[i], 0x7632);
    }
  }
}

template <int dim, bool split_tokens>
__global__ void __launch_bounds__(kThreads, dim == 64    ? 4
                                            : dim <= 128 ? 3
                                                         : 1) page_kernel(const __grid_constant__ PageArguments arguments) {
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ float row_factor[kTileRows];
  __shared__ int last;
  const AttendArguments& args = arguments.attend;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const kvmix_cuda_item item = args.items[blockIdx.x];
  const int all_rows = args.group * args.q_tokens, q_heads = args.kv_heads * args.group;
  const int row0 = static_cast<int>(blockIdx.y) * kTileRows, rows = min(all_rows - row0, kTileRows);
  const auto row_offset = [&](int row) {
    const int token = (row0 + row) / args.group, head = item.kv_head * args.group + (row0 + row) % args.group;
    return (static_cast<int64_t>(item.sequence) * args.q_tokens + token) * q_heads + head;
  };
  using Tile = PageTile<dim>;
  auto* const keys = reinterpret_cast<__half*>(shared);
  auto* const values = reinterpret_cast<__half*>(shared + Tile::key_bytes);

  store_new_rows(args, item, dim);
  // Query rows, scaled by a power of two to at most 1.
  for (int row = warp; row < kTileRows; row += kWarps) {
    float x[dim / 32], best = 0.0f;
#pragma unroll
    for (int i = 0; i < dim / 32; ++i) {
      x[i] = row < rows ? load_query(args, row_offset(row) * dim + 32 * i + lane) : 0.0f;
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
  for (int page = item.page_begin; page < item.page_end; ++page) {
    const int first = args.sinks > 0 ? (page == 0 ? 0 : args.sinks + (page - 1) * kPageTokens) : page * kPageTokens;
    const int live = min(args.sinks > 0 && page == 0 ? args.sinks : kPageTokens, item.length - first);
    if (first >= last_end) break;
    if (first + live <= first_begin) continue;
    const int32_t id = table[page];
    __syncthreads();
    if (id >= 0) {
      const uint8_t* record = args.records + id * args.record_page_stride + item.kv_head * args.record_head_stride;
      expand_side<dim, true>(record + kHeaderBytes, arguments.shape.key(), keys);
      expand_side<dim, false>(record + arguments.shape.key_bytes(), arguments.shape.value(), values);
    } else {
      const uint8_t* open =
          args.open_pages + static_cast<int64_t>(~id) * args.open_page_stride + item.kv_head * args.open_head_stride;
      copy_open<dim>(reinterpret_cast<const __half*>(open), live, keys, values);
    }
    __syncthreads();
    for (int chunk = split_tokens ? warp : 0; chunk < (split_tokens ? warp + 1 : kPageTokens / kChunkTokens); ++chunk) {
      if (chunk * kChunkTokens >= live) break;
      float s[4][4] = {};
#pragma unroll
      for (int k = 0; k < dim / 16; ++k) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const __half* at = keys + (chunk * kChunkTokens + 8 * j + lane / 4) * Tile::key_row + 16 * k + pair;
          mma(s[j], query[k], *reinterpret_cast<const uint32_t*>(at), *reinterpret_cast<const uint32_t*>(at + 8));
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
        for (int c = 0; c < dim / 8; ++c) {
          const __half* at = values + (8 * c + lane / 4) * Tile::value_row + chunk * kChunkTokens + 16 * k + pair;
          mma(acc[c], a, *reinterpret_cast<const uint32_t*>(at), *reinterpret_cast<const uint32_t*>(at + 8));
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
      args, item, rows, all_rows, reinterpret_cast<float2*>(shared), &last, row_offset, [&](int w, int row) {
        const int at = w * kWarpRows + row;
        return RowPart{merged_sums[at], reinterpret_cast<const float4*>(merged + at * Tile::merge_row)};
      });
}

}  // namespace kvmix::cuda
