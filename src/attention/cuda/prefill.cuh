// The prefill kernel of compute capability 9.0: a tile of 128 query rows of one item over the pages that it sees, for any
// mixture of formats and head_dim 64, 96, 128 and 256. Of the block's three warpgroups one brings stretches of tokens into
// shared memory as fp16, two buffers ahead; each of the others multiplies them with 64 query rows (wgmma), and while the
// weights of one stretch meet its values, the scores of the next are already there and become weights:
//   producer:  wait until a buffer is free, bring keys, say so; values likewise
//   consumer:  scores(i + 1), output += weights(i) values(i); when the scores are there, softmax(i + 1) beside the second
// Short chunks: the producer dequantises, and the pages of a head may be split among blocks, the last of which to finish adds
// up what each has stored. Long ones, whose tiles would each dequantise the same pages: a launch before writes all pages to the
// workspace as they shall stand in shared memory (images), and the producer is one thread that asks for copies. The softmax is
// in base 2, weights are held at 2^kLift over a maximum that follows the true one within kSlack. Over 500 lines: one kernel,
// whose two sides keep step by barriers that must be read together.
#pragma once

#include "attention/cuda/dequantise_trellis.cuh"
#include "attention/cuda/partials.cuh"
#include "attention/cuda/shape.h"
#include "attention/cuda/wgmma.cuh"
#include "base/cuda/bulk_copy.cuh"

namespace kvmix::cuda {

inline constexpr int kWarpgroup = 128, kPrefillThreads = 3 * kWarpgroup, kImageThreads = 2 * kWarpgroup;
inline constexpr float kSlack = 2.0f;  // weights stay below 2^(kLift + kSlack), well inside fp16

template <int dim>
struct PrefillTile {
  static constexpr int tokens = dim <= 128 ? 128 : 64;  // of a stretch
  static constexpr int panels = (dim + 63) / 64;
  static constexpr int slab = dim < 128 ? dim : 128, slabs = dim / slab;  // output channels of one matrix instruction
  static constexpr int query_bytes = panels * panel_bytes(64);            // of a warpgroup
  static constexpr int key_bytes = panels * panel_bytes(tokens), value_bytes = tokens / 64 * panel_bytes(dim);
  static constexpr int part_bytes = key_bytes + value_bytes;  // of an image
  static constexpr int image_bytes = page_image_bytes(dim);
  static_assert(part_bytes * (kPageTokens / tokens) == image_bytes);
  static constexpr int keys = 2 * query_bytes, values = keys + 2 * key_bytes;
  static constexpr int shared_bytes = values + 2 * value_bytes + 1024;  // and what aligns it
};

// The stretches of at most `tokens` tokens of an item that positions [seen_begin, seen_end) fall into, in order.
template <int tokens>
class Walk {
 public:
  int page, first, live;  // of the current stretch: its page, first position, tokens
  int part;               // of the page

  __device__ Walk(const AttendArguments& args, const kvmix_cuda_item& item, int seen_begin, int seen_end)
      : page(item.page_begin - 1),
        first(0),
        live(0),
        part(kPageTokens / tokens - 1),
        page_end_(item.page_end),
        sinks_(args.sinks),
        length_(item.length),
        seen_begin_(seen_begin),
        seen_end_(seen_end) {}

  __device__ bool next() {
    for (;;) {
      if (++part == kPageTokens / tokens) part = 0, ++page;
      if (page >= page_end_) return false;
      const bool sink = sinks_ > 0 && page == 0;
      const int page_first = sinks_ > 0 && !sink ? sinks_ + (page - 1) * kPageTokens : page * kPageTokens;
      first = page_first + part * tokens;
      live = min(min(sink ? sinks_ : kPageTokens, length_ - page_first) - part * tokens, tokens);
      if (live <= 0 || first + live <= seen_begin_) continue;
      return first < seen_end_;
    }
  }

 private:
  int page_end_, sinks_, length_, seen_begin_, seen_end_;
};

// A stretch of a packed side to shared memory, by the block's first threads; ready() waits until it may be written. Values of
// an open page become zero from the stretch's token `live` on. `trellis`: it may have such codes.
template <int dim, bool key, bool open, bool trellis, int threads, class Ready>
__device__ inline void dequantise_stretch(const uint8_t* side_start, const SideShape& side, int part, int live, uint32_t to,
                                          const Ready& ready) {
  constexpr int kTokens = PrefillTile<dim>::tokens, kRows = key ? kTokens : dim, kStep = threads / 32;
  constexpr unsigned kBlocks = dim / 16;
  const unsigned warp = threadIdx.x / 32;
  with_format<key, open, trellis>(side, [&](auto what, auto width) {
    constexpr int bits = width.value;
    const int lane = lane_again();
    const uint32_t mine = to + static_cast<uint32_t>((lane % 16) * 128 + ((lane / 16) ^ (lane % 8)) * 16);
    const auto store = [&](unsigned token0, unsigned channel0, uint32_t(&a)[4]) {
      const unsigned token = token0 % kTokens, row0 = key ? token : channel0, column0 = key ? channel0 : token;
      if constexpr (open && !key) mask_tokens(a, static_cast<int>(token), live, lane);
      store_tiles((mine ^ (column0 % 64 * 2)) + column0 / 64 * panel_bytes(kRows) + row0 * 128, a);
    };
    const auto bring = [&](auto first_field) {
      constexpr int kFirst = first_field.value, kCount = kTokens / 16;
      if constexpr (bits == 16) {
        ready();
        for (unsigned block = warp; block < kBlocks; block += kStep) {
          copy_block<kFirst, kCount>(side_start, block, lane, store);
        }
      } else if constexpr (is_trellis_width(bits)) {
        ready();
        for (unsigned block = warp; block < kBlocks; block += kStep) {
          uint32_t w[block_words(bits)];
          load_codes<bits>(side_start + block * block_bytes(bits), lane, w);
          dequantise_trellis<what.value, bits, kFirst, kCount>(w, side_start, side, block, lane, store);
        }
      } else {
        LaneScales<what.value> scales(side_start + side.meta(), side, lane);
        uint32_t w[block_words(bits)];
        unsigned block = warp;
        if (block < kBlocks) load_codes<bits>(side_start + block * block_bytes(bits), lane, w);
        ready();
        while (block < kBlocks) {
          dequantise_block<what.value, bits, kFirst, kCount>(w, scales, block, store);
          block += kStep;
          if (block < kBlocks) load_codes<bits>(side_start + block * block_bytes(bits), lane, w);
        }
      }
    };
    if (kTokens == kPageTokens || part == 0) {
      bring(std::integral_constant<int, 0>{});
    } else {
      bring(std::integral_constant<int, kFields - kTokens / 16>{});
    }
  });
}

// A stretch of a side of fp16 rows; slots without a token become zero.
template <int dim, bool key, int threads>
__device__ inline void copy_stretch(const __half* rows, int live, uint8_t* to) {
  constexpr int kTokens = PrefillTile<dim>::tokens, kOctets = dim / 8;
  const uint4 zero = {0, 0, 0, 0};
  const int thread = static_cast<int>(threadIdx.x);
  const auto load = [&](int token, int octet) {
    return token < live ? *reinterpret_cast<const uint4*>(rows + token * dim + octet * 8) : zero;
  };
  if (key) {
    for (int at = thread; at < kTokens * kOctets; at += threads) {
      *reinterpret_cast<uint4*>(to + swizzled(kTokens, at / kOctets, at % kOctets * 8)) = load(at / kOctets, at % kOctets);
    }
  } else {
    for (int at = thread; at < kTokens / 2 * kOctets; at += threads) {
      const int token = at % (kTokens / 2) * 2, octet = at / (kTokens / 2);
      const uint4 v0 = load(token, octet), v1 = load(token + 1, octet);
      const uint32_t a[4] = {v0.x, v0.y, v0.z, v0.w}, b[4] = {v1.x, v1.y, v1.z, v1.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        *reinterpret_cast<uint32_t*>(to + swizzled(dim, octet * 8 + 2 * i, token)) = __byte_perm(a[i], b[i], 0x5410);
        *reinterpret_cast<uint32_t*>(to + swizzled(dim, octet * 8 + 2 * i + 1, token)) = __byte_perm(a[i], b[i], 0x7632);
      }
    }
  }
}

__device__ inline void store_output_pair(const AttendArguments& args, int64_t at, float a, float b) {
  const __nv_bfloat162 rounded = __floats2bfloat162_rn(a, b);
  static_cast<uint32_t*>(args.out)[at / 2] = args.bf16 ? reinterpret_cast<const uint32_t&>(rounded) : pack(a, b);
}

struct PrefillBarriers {
  uint64_t keys_there[2], keys_free[2], values_there[2], values_free[2];
};

// What a thread block needs beside AttendArguments.
struct PrefillArguments {
  AttendArguments attend;
  SideShape key, value;
  int value_start;  // of a record
  uint8_t* images;  // page p of an item: image item.partial + p - item.page_begin
};
__device__ inline uint8_t* image_part(const PrefillArguments& arguments, const kvmix_cuda_item& item, int page, int part,
                                      int page_bytes, int part_bytes) {
  return arguments.images + static_cast<int64_t>(item.partial + page - item.page_begin) * page_bytes + part * part_bytes;
}

// A stretch of a page's keys, then of its values, to shared memory, each after ready(side) and before done(side).
template <int dim, bool trellis, int threads, class Ready, class Done>
__device__ inline void bring_stretch(const PrefillArguments& arguments, const kvmix_cuda_item& item, int page, int32_t id,
                                     int part, int live, uint8_t* keys, uint8_t* values, const Ready& ready, const Done& done) {
  using Tile = PrefillTile<dim>;
  const AttendArguments& args = arguments.attend;
  const uint8_t* const record = args.records + id * args.record_page_stride + item.kv_head * args.record_head_stride;
  const uint8_t* const open =
      args.open_pages + static_cast<int64_t>(~id) * args.open_page_stride + item.kv_head * args.open_head_stride;
  const auto bring = [&](auto key, uint8_t* to) {
    constexpr int kSide = key ? 0 : 1;
    const auto wait = [&] { ready(kSide); };
    if (id >= 0) {
      dequantise_stretch<dim, key, false, trellis, threads>(record + (key ? kHeaderBytes : arguments.value_start),
                                                            key ? arguments.key : arguments.value, part, live,
                                                            shared_address(to), wait);
    } else if (is_rows(args, page)) {
      wait();
      copy_stretch<dim, key, threads>(
          reinterpret_cast<const __half*>(open) + ((key ? 0 : value_row(args, page)) + part * Tile::tokens) * dim, live, to);
    } else {
      dequantise_stretch<dim, key, true, false, threads>(open + (key ? kHeaderBytes : args.open.key_bytes()),
                                                         key ? args.open.key() : args.open.value(), part, live,
                                                         shared_address(to), wait);
    }
    publish_stores();
    done(kSide);
  };
  bring(std::true_type{}, keys);
  bring(std::false_type{}, values);
}

// Writes the images of an item's pages, gridDim.y blocks an item. `trellis`: for formats with such codes, here and below.
template <int dim, bool trellis>
__global__ void __launch_bounds__(kImageThreads, 3) image_kernel(const __grid_constant__ PrefillArguments arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint8_t space[];
  using Tile = PrefillTile<dim>;
  uint8_t* const shared = space + (1024 - shared_address(space) % 1024) % 1024;
  const AttendArguments& args = arguments.attend;
  const kvmix_cuda_item item = args.items[blockIdx.x];
  if (item.sequence < 0) return;
  const int32_t* const table = args.page_table + item.sequence * args.page_table_stride;
  for (int page = item.page_begin + static_cast<int>(blockIdx.y); page < item.page_end; page += static_cast<int>(gridDim.y)) {
    const int first = args.sinks > 0 && page > 0 ? args.sinks + (page - 1) * kPageTokens : page * kPageTokens;
    const int live = min(args.sinks > 0 && page == 0 ? args.sinks : kPageTokens, item.length - first);
    for (int part = 0; part < kPageTokens / Tile::tokens; ++part) {
      bring_stretch<dim, trellis, kImageThreads>(
          arguments, item, page, table[page], part, live - part * Tile::tokens, shared, shared + Tile::key_bytes,
          [](int side) {
            // The copy before has read the buffer.
            if (side == 0) {
              if (threadIdx.x == 0) wait_stores();
              __syncthreads();
            }
          },
          [](int) {});
      __syncthreads();
      if (threadIdx.x == 0) {
        store_bulk(image_part(arguments, item, page, part, Tile::image_bytes, Tile::part_bytes), shared_address(shared),
                   Tile::part_bytes);
      }
    }
  }
  if (threadIdx.x == 0) wait_stores();
#endif
}

// The rows of a tile: row r is query token r / group, head r % group of the KV head.
struct TileRows {
  int row0, rows, length, q_tokens, group, window;
  __device__ int token(int row) const { return (row0 + min(row, rows - 1)) / group; }
  // Positions [begin, end) are what a row sees; rows beyond the last see what that sees.
  __device__ int end(int row) const { return length - (q_tokens - 1 - token(row)); }
  __device__ int begin(int row) const { return window > 0 ? max(end(row) - window, 0) : 0; }
};

template <int dim, bool images, bool trellis>
__device__ inline void produce(const PrefillArguments& arguments, const kvmix_cuda_item& item,
                               Walk<PrefillTile<dim>::tokens> walk, uint8_t* shared, PrefillBarriers& barriers) {
  using Tile = PrefillTile<dim>;
  if (images && threadIdx.x % kWarpgroup != 0) return;
  const int32_t* const table = arguments.attend.page_table + item.sequence * arguments.attend.page_table_stride;
  bool more = walk.next();
  int32_t next_id = more && !images ? table[walk.page] : 0;
  for (int n = 0; more; ++n) {
    const int slot = n % 2, parity = n / 2 % 2 ^ 1, page = walk.page, part = walk.part, live = walk.live;
    const int32_t id = next_id;
    more = walk.next();
    if (more && !images) next_id = table[walk.page];
    uint8_t* const keys = shared + Tile::keys + slot * Tile::key_bytes;
    uint8_t* const values = shared + Tile::values + slot * Tile::value_bytes;
    if constexpr (images) {
      const uint8_t* const from = image_part(arguments, item, page, part, Tile::image_bytes, Tile::part_bytes);
      wait(shared_address(&barriers.keys_free[slot]), parity);
      load_bulk(shared_address(keys), from, Tile::key_bytes, shared_address(&barriers.keys_there[slot]));
      wait(shared_address(&barriers.values_free[slot]), parity);
      load_bulk(shared_address(values), from + Tile::key_bytes, Tile::value_bytes,
                shared_address(&barriers.values_there[slot]));
    } else {
      bring_stretch<dim, trellis, kWarpgroup>(
          arguments, item, page, id, part, live, keys, values,
          [&](int side) { wait(shared_address(side == 0 ? &barriers.keys_free[slot] : &barriers.values_free[slot]), parity); },
          [&](int side) { arrive(shared_address(side == 0 ? &barriers.keys_there[slot] : &barriers.values_there[slot])); });
    }
  }
}

// Adds up the splits of a tile, in their order, by the threads of both consumers; `arrived` is shared memory.
template <int dim, class RowOffset>
__device__ inline void add_splits(const AttendArguments& args, const kvmix_cuda_item& item, const TileRows& tile_rows,
                                  const RowOffset& row_offset, int* arrived) {
  constexpr int kQuads = dim / 4, kConsumers = 2 * kWarpgroup;
  const int thread = static_cast<int>(threadIdx.x) - kWarpgroup, all_rows = args.group * args.q_tokens;
  const auto all_here = [] { asm volatile("bar.sync 3, %0;\n" ::"n"(kConsumers) : "memory"); };
  __threadfence();
  all_here();
  if (thread == 0) {
    const int tiles = (all_rows + kPrefillRows - 1) / kPrefillRows;
    int32_t* const ticket = args.tickets + item.ticket * tiles + tile_rows.row0 / kPrefillRows;
    *arrived = atomicAdd(ticket, 1);
    if (*arrived == item.splits - 1) *ticket = 0;
  }
  all_here();
  __threadfence();
  if (*arrived != item.splits - 1) return;
  for (int at = thread; at < tile_rows.rows * kQuads; at += kConsumers) {
    const int row = at / kQuads, quad = at % kQuads;
    const auto slot = [&](int split) { return static_cast<int64_t>(item.partial + split) * all_rows + tile_rows.row0 + row; };
    const auto sums = [&](int split) { return __ldcg(reinterpret_cast<const float2*>(args.partial_sums) + slot(split)); };
    float top = kFloor, sum = 0.0f;
    float4 value = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int split = 0; split < item.splits; ++split) top = fmaxf(top, sums(split).x);
#pragma unroll 4
    for (int split = 0; split < item.splits; ++split) {
      const float2 part = sums(split);
      const float weight = exp2_fast(part.x - top);
      sum = fmaf(weight, part.y, sum);
      add_weighted(value, weight, __ldcg(reinterpret_cast<const float4*>(args.partials) + slot(split) * kQuads + quad));
    }
    store_output(args, row_offset(row) * kQuads + quad, value, sum > 0.0f ? 1.0f / sum : 0.0f);
    if (args.lse != nullptr && quad == 0) args.lse[row_offset(row)] = log_sum_exp(top, sum);
  }
}

// One warpgroup's 64 rows, from `base` on.
template <int dim, bool may_split>
__device__ inline void consume(const AttendArguments& args, const kvmix_cuda_item& item, const TileRows& tile_rows,
                               Walk<PrefillTile<dim>::tokens> walk, int base, uint8_t* shared, float* row_factor,
                               PrefillBarriers& barriers, int* arrived) {
  using Tile = PrefillTile<dim>;
  constexpr int kTokens = Tile::tokens;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp_row = base + static_cast<int>(threadIdx.x) / 32 % 4 * 16;
  const int q_heads = args.kv_heads * args.group;
  const auto row_offset = [&](int row) {
    const int head = item.kv_head * args.group + (tile_rows.row0 + row) % args.group;
    return (static_cast<int64_t>(item.sequence) * args.q_tokens + tile_rows.token(row)) * q_heads + head;
  };
  // Query rows, scaled by a power of two to at most 1.
  uint8_t* const queries = shared + base / 64 * Tile::query_bytes;
#pragma unroll 4
  for (int r = 0; r < 16; ++r) {
    const int row = warp_row + r;
    float2 x[Tile::panels];
    float best = 0.0f;
#pragma unroll
    for (int i = 0; i < Tile::panels; ++i) {
      const int channel = 64 * i + 2 * lane;
      x[i] = row < tile_rows.rows && channel < dim ? load_query_pair(args, row_offset(row) * dim + channel)
                                                   : make_float2(0.0f, 0.0f);
      best = fmaxf(best, fmaxf(fabsf(x[i].x), fabsf(x[i].y)));
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) best = fmaxf(best, __shfl_xor_sync(~0u, best, step));
    const int exponent = best > 0.0f ? ilogbf(best) + 1 : 0;
    if (lane == 0) row_factor[row] = args.scale * power(exponent);
#pragma unroll
    for (int i = 0; i < Tile::panels; ++i) {
      *reinterpret_cast<uint32_t*>(queries + swizzled(64, row - base, 64 * i + 2 * lane)) =
          pack(x[i].x * power(-exponent), x[i].y * power(-exponent));
    }
  }
  publish_stores();
  asm volatile("bar.sync %0, 128;\n" ::"r"(1 + base / 64) : "memory");

  const int my_row = warp_row + lane / 4, pair = 2 * (lane % 4);
  float factor[2], top[2] = {kFloor, kFloor}, sum[2] = {};
  int begin[2], end[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    factor[i] = row_factor[my_row + 8 * i];
    begin[i] = tile_rows.begin(my_row + 8 * i), end[i] = tile_rows.end(my_row + 8 * i);
  }
  const int all_see_from = tile_rows.begin(warp_row + 15), all_see_to = tile_rows.end(warp_row);

  float s[kTokens / 2], out[Tile::slabs][Tile::slab / 2];
  uint32_t weights[kTokens / 16][4];
#pragma unroll
  for (int i = 0; i < Tile::slabs; ++i)
#pragma unroll
    for (int j = 0; j < Tile::slab / 2; ++j) out[i][j] = 0.0f;

  const uint64_t query = operand(shared_address(queries));
  const auto start_scores = [&](int n) {
    wait(shared_address(&barriers.keys_there[n % 2]), n / 2 % 2);
    const uint64_t key = operand(shared_address(shared + Tile::keys + n % 2 * Tile::key_bytes));
    hold(s);
    matrix_fence();
#pragma unroll
    for (int k = 0; k < dim / 16; ++k) multiply(s, query + operand_step(64, k), key + operand_step(kTokens, k), k > 0);
    matrix_commit();
  };
  const auto start_output = [&](int n) {
    wait(shared_address(&barriers.values_there[n % 2]), n / 2 % 2);
    const uint64_t value = operand(shared_address(shared + Tile::values + n % 2 * Tile::value_bytes));
#pragma unroll
    for (int i = 0; i < Tile::slabs; ++i) hold(out[i]);
    matrix_fence();
#pragma unroll
    for (int k = 0; k < kTokens / 16; ++k)
#pragma unroll
      for (int i = 0; i < Tile::slabs; ++i)
        multiply_add(out[i], weights[k], value + operand_step(dim, k) + static_cast<uint64_t>(i * Tile::slab * 128 / 16));
    matrix_commit();
  };
  // Scores to weights, as floats; what older weights and sums shrink by.
  float shrink[2];
  const auto softmax = [&] {
    // One branch each for what is rare, so that the common path is straight.
    const bool masked = walk.live < kTokens || walk.first < all_see_from || walk.first + kTokens > all_see_to;
    float f[2] = {factor[0], factor[1]};
    if (args.softcap > 0.0f) {
      const float inverse = 1.0f / args.softcap;
#pragma unroll
      for (int j = 0; j < kTokens / 2; ++j) s[j] = args.softcap * tanh_fast(s[j] * f[j / 2 % 2] * inverse);
      f[0] = f[1] = 1.0f;
    }
    if (masked) {
#pragma unroll
      for (int j = 0; j < kTokens / 2; ++j) {
        const int i = j / 2 % 2, position = walk.first + j / 4 * 8 + pair + j % 2;
        if (position < begin[i] || position >= min(end[i], walk.first + walk.live)) s[j] = -INFINITY;
      }
    }
    float best[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int j = 0; j < kTokens / 2; ++j) best[j / 2 % 2] = fmaxf(best[j / 2 % 2], s[j]);
    float shift[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      best[i] = fmaxf(best[i], __shfl_xor_sync(~0u, best[i], 1));
      best[i] = fmaxf(best[i], __shfl_xor_sync(~0u, best[i], 2)) * f[i];
      const float next = best[i] > top[i] + kSlack ? best[i] : top[i];
      shrink[i] = exp2_fast(top[i] - next);
      top[i] = next, sum[i] *= shrink[i], shift[i] = kLift - next;
    }
#pragma unroll
    for (int j = 0; j < kTokens / 2; ++j) {
      s[j] = exp2_fast(fmaf(s[j], f[j / 2 % 2], shift[j / 2 % 2]));
      sum[j / 2 % 2] += s[j];
    }
  };
  const auto pack_weights = [&] {
#pragma unroll
    for (int k = 0; k < kTokens / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[k][i] = pack(s[8 * k + 2 * i], s[8 * k + 2 * i + 1]);
  };

  int n = 0;
  if (walk.next()) {
    start_scores(0);
    matrix_wait<0>();
    hold(s);
    if (lane == 0) arrive(shared_address(&barriers.keys_free[0]));
    softmax();
    pack_weights();
    while (walk.next()) {
      start_scores(n + 1);
      start_output(n);
      matrix_wait<1>();
      hold(s);
      if (lane == 0) arrive(shared_address(&barriers.keys_free[(n + 1) % 2]));
      softmax();
      matrix_wait<0>();
#pragma unroll
      for (int i = 0; i < Tile::slabs; ++i) hold(out[i]);
      if (lane == 0) arrive(shared_address(&barriers.values_free[n % 2]));
      if (__any_sync(~0u, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
        for (int i = 0; i < Tile::slabs; ++i)
#pragma unroll
          for (int j = 0; j < Tile::slab / 2; ++j) out[i][j] *= shrink[j / 2 % 2];
      }
      pack_weights();
      ++n;
    }
    start_output(n);
    matrix_wait<0>();
#pragma unroll
    for (int i = 0; i < Tile::slabs; ++i) hold(out[i]);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    sum[i] += __shfl_xor_sync(~0u, sum[i], 1);
    sum[i] += __shfl_xor_sync(~0u, sum[i], 2);
    const int row = my_row + 8 * i;
    if (row >= tile_rows.rows) continue;
    if (may_split && item.splits > 1) {
      const int64_t slot = static_cast<int64_t>(item.partial + item.split) * args.group * args.q_tokens + tile_rows.row0 + row;
#pragma unroll
      for (int j = 0; j < dim / 8; ++j) {
        const float* const v = &out[j * 8 / Tile::slab][j * 8 % Tile::slab / 2 + 2 * i];
        __stcg(reinterpret_cast<float2*>(args.partials + slot * dim + 8 * j + pair), make_float2(v[0], v[1]));
      }
      if (lane % 4 == 0) __stcg(reinterpret_cast<float2*>(args.partial_sums) + slot, make_float2(top[i], sum[i]));
      continue;
    }
    const int64_t offset = row_offset(row);
    const float share = sum[i] > 0.0f ? 1.0f / sum[i] : 0.0f;
#pragma unroll
    for (int j = 0; j < dim / 8; ++j) {
      const float* const v = &out[j * 8 / Tile::slab][j * 8 % Tile::slab / 2 + 2 * i];
      store_output_pair(args, offset * dim + 8 * j + pair, v[0] * share, v[1] * share);
    }
    if (args.lse != nullptr && lane % 4 == 0) args.lse[offset] = log_sum_exp(top[i], sum[i]);
  }
  if constexpr (may_split)
    if (item.splits > 1) add_splits<dim>(args, item, tile_rows, row_offset, arrived);
}

template <int dim, bool images, bool trellis>
__global__ void __launch_bounds__(kPrefillThreads, 1) prefill_kernel(const __grid_constant__ PrefillArguments arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint8_t space[];
  __shared__ PrefillBarriers barriers;
  __shared__ float row_factor[kPrefillRows];
  __shared__ int arrived;
  uint8_t* const shared = space + (1024 - shared_address(space) % 1024) % 1024;
  const AttendArguments& args = arguments.attend;
  const kvmix_cuda_item item = args.items[blockIdx.x];
  if (item.sequence < 0) return;
  // The longest tiles first: the last ones fill the gaps.
  const int row0 = static_cast<int>(gridDim.y - 1 - blockIdx.y) * kPrefillRows;
  const TileRows tile_rows{
      row0, min(args.group * args.q_tokens - row0, kPrefillRows), item.length, args.q_tokens, args.group, args.sliding_window};
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      constexpr int kArrivals = images ? 1 : kWarpgroup;
      init_barrier(shared_address(&barriers.keys_there[i]), kArrivals),
          init_barrier(shared_address(&barriers.values_there[i]), kArrivals);
      init_barrier(shared_address(&barriers.keys_free[i]), 8), init_barrier(shared_address(&barriers.values_free[i]), 8);
    }
    publish_barriers();
  }
  __syncthreads();
  const Walk<PrefillTile<dim>::tokens> walk(args, item, tile_rows.begin(0), tile_rows.end(tile_rows.rows - 1));
  const int role = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  // Dequantising spills with fewer than 120 registers, multiplying a little with 192.
  if (role == 0) {
    shrink_registers<images ? 24 : 120>();
    produce<dim, images, trellis>(arguments, item, walk, shared, barriers);
  } else {
    grow_registers<images ? 240 : 192>();
    consume<dim, !images>(args, item, tile_rows, walk, (role - 1) * 64, shared, row_factor, barriers, &arrived);
  }
#endif
}

}  // namespace kvmix::cuda
