// The decode kernel of pages that hold fp16 on both sides, as rows (open pages) or as records. What binds is memory, so a warp
// reads tiles of 16 tokens straight into the registers of mma.m16n8k16, 16 bytes a lane, with one side of a tile always on its
// way: values of this tile while it is scored, keys of the next while this one's values are added. No shared memory and no
// barrier lie in between. Keys and values are operand A and query rows the eight columns, as in decode.cuh, whose softmax it
// shares.
// In a row a lane's 16 bytes are eight neighbouring channels, not the pairs that the instruction's registers stand for. But its
// inner index may be any order of channels that both operands have, and its rows any order of channels that the output is read
// in:
//   keys:   lane 4 g + j reads channels 32 m + 8 j to 32 m + 8 j + 7 of tokens g and g + 8, two products
//   values: lane 4 g + j reads kRun channels from kRun (8 s + g) on of tokens 2 j, 2 j + 1, 2 j + 8 and 2 j + 9; channel 2 i of
//           these is row g of product i and channel 2 i + 1 row g + 8, and pairs of tokens are put together from two registers
// Records have tiles of operand A as they are, with other channels in a sum's place: an item's records and rows are summed up
// apart and merged as those of two warps.
#pragma once

#include "attention/cuda/decode.cuh"
#include "base/cuda/overlap.cuh"

namespace kvmix::cuda {

struct Fp16Arguments {
  AttendArguments attend;
  int value_begin;  // of a record
  int row_blocks;   // blocks of an item, each with its share of the query rows
};

inline constexpr int kTileTokens = 16;

// A query row in shared memory, in halves: half the banks further a row.
__host__ __device__ constexpr int fp16_query_row(int head_dim) { return head_dim % 64 == 0 ? head_dim + 32 : head_dim; }
// Query rows, then two parts a warp as decode.cuh's: [part][row][merge_row], [part][row][2].
__host__ __device__ constexpr int fp16_shared_bytes(int head_dim) {
  return kRows * fp16_query_row(head_dim) * 2 + 2 * kWarps * kRows * (merge_row(head_dim) + 2) * 4;
}
static_assert(2 * kWarps * (merge_row(64) + 2) * 4 >= kMaxSplits * 8, "sums of all splits lie there too");

// Past the L1, which would keep what nobody reads again.
__device__ inline uint4 load_once(const void* from, uint64_t policy) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from), "l"(policy));
  return v;
}
__device__ inline uint2 load_once_8(const void* from, uint64_t policy) {
  uint2 v;
  asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v2.u32 {%0, %1}, [%2], %3;\n"
               : "=r"(v.x), "=r"(v.y)
               : "l"(from), "l"(policy));
  return v;
}

// A tile's keys or values in a warp, as they were read.
template <int dim>
struct Fp16Side {
  // Neighbouring channels of a token's values that a lane has, and how often.
  static constexpr int kRun = dim % 64 == 0 ? 8 : 4, kRuns = dim / (8 * kRun);
  static constexpr int kTiles = dim / 16, kPairs = kRun / 2;
  uint32_t words[dim / 4];

  // `tile`: the first of 16 rows, of which `live` are there; the others count as zero.
  __device__ void read_key_rows(const uint8_t* tile, int live, uint64_t policy, int lane) {
    const uint8_t* const mine = tile + (lane / 4 * dim + lane % 4 * 8) * 2;
#pragma unroll
    for (int m = 0; m < dim / 32; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint4 v = {0, 0, 0, 0};
        if (lane / 4 + 8 * h < live) v = load_once(mine + (8 * h * dim + 32 * m) * 2, policy);
        uint32_t* const to = words + 8 * m + 4 * h;
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
      }
    }
  }
  __device__ void read_value_rows(const uint8_t* tile, int live, uint64_t policy, int lane) {
    const uint8_t* const mine = tile + (2 * (lane % 4) * dim + lane / 4 * kRun) * 2;
#pragma unroll
    for (int s = 0; s < kRuns; ++s) {
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const int token = t % 2 + 8 * (t / 2);
        const uint8_t* const from = mine + (token * dim + 8 * kRun * s) * 2;
        const bool there = 2 * (lane % 4) + token < live;
        uint32_t* const to = words + (4 * s + t) * kPairs;
        if constexpr (kRun == 8) {
          uint4 v = {0, 0, 0, 0};
          if (there) v = load_once(from, policy);
          to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
        } else {
          uint2 v = {0, 0};
          if (there) v = load_once_8(from, policy);
          to[0] = v.x, to[1] = v.y;
        }
      }
    }
  }
  // `tile`: the token tile in the first block of a record's side.
  __device__ void read_tiles(const uint8_t* tile, uint64_t policy, int lane) {
#pragma unroll
    for (int c = 0; c < kTiles; ++c) {
      const uint4 v = load_once(tile + c * block_bytes(16) + lane * 16, policy);
      words[4 * c] = v.x, words[4 * c + 1] = v.y, words[4 * c + 2] = v.z, words[4 * c + 3] = v.w;
    }
  }

  // Operand A of product i, and the channel of its row lane / 4 (further: of row lane / 4 + 8).
  __device__ void key_rows(int i, uint32_t (&a)[4]) const {
    const uint32_t* const w = words + i / 2 * 8 + i % 2 * 2;
    a[0] = w[0], a[1] = w[4], a[2] = w[1], a[3] = w[5];
  }
  __device__ void value_rows(int i, uint32_t (&a)[4]) const {
    const uint32_t* const w = words + i / kPairs * 4 * kPairs + i % kPairs;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t first = w[2 * h * kPairs], second = w[(2 * h + 1) * kPairs];
      a[2 * h] = __byte_perm(first, second, 0x5410), a[2 * h + 1] = __byte_perm(first, second, 0x7632);
    }
  }
  __device__ void tile(int i, uint32_t (&a)[4]) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) a[r] = words[4 * i + r];
  }
  __device__ static int channel(bool rows, int i, bool further, int lane) {
    return rows ? (i / kPairs * 8 + lane / 4) * kRun + i % kPairs * 2 + (further ? 1 : 0)
                : 16 * i + lane / 4 + (further ? 8 : 0);
  }
};

// Blocks of four warps on a multiprocessor: what registers allow.
__host__ __device__ constexpr int fp16_blocks(int head_dim) { return head_dim == 64 ? 4 : head_dim <= 128 ? 3 : 2; }

template <int dim>
__global__ void __launch_bounds__(kThreads, fp16_blocks(dim)) fp16_kernel(const __grid_constant__ Fp16Arguments arguments) {
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ float row_factor[kRows];
  __shared__ int last;
  const AttendArguments& args = arguments.attend;
  using State = Warp<dim, kFewWarps>;
  using Side = Fp16Side<dim>;
  constexpr int kTiles = dim / 16, kMergeRow = merge_row(dim), kQueryRow = fp16_query_row(dim);
  constexpr int kPageTiles = kPageTokens / kTileTokens;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const kvmix_cuda_item item = args.items[blockIdx.x / static_cast<unsigned>(arguments.row_blocks)];
  if (item.sequence < 0) return;
  const int all_rows = args.group * args.q_tokens;
  const int block = static_cast<int>(blockIdx.x % static_cast<unsigned>(arguments.row_blocks));
  const int row0 = all_rows * block / arguments.row_blocks, rows = all_rows * (block + 1) / arguments.row_blocks - row0;
  const bool wide = rows > kRows / 2;  // else query rows stand in the even columns
  const auto row_offset = [&](int row) {
    const int token = (row0 + row) / args.group, head = item.kv_head * args.group + (row0 + row) % args.group;
    return (static_cast<int64_t>(item.sequence) * args.q_tokens + token) * (args.kv_heads * args.group) + head;
  };
  __half* const query = reinterpret_cast<__half*>(shared);  // [column][kQueryRow]

  const int32_t* const table = args.page_table + item.sequence * args.page_table_stride;
  const auto ids_from = [&](int page) { return page + lane < item.page_end ? table[page + lane] : 0; };
  const int32_t first_ids = ids_from(item.page_begin);  // asked for beside the queries
  if (args.overlapped) wait_for_launch_before();
  let_next_launch_begin();
  store_new_rows(args, item, dim);
  // Query rows, scaled by a power of two to at most 2^kQueryLift.
  for (int column = warp; column < kRows; column += kWarps) {
    const int row = wide ? column : column / 2;
    const bool there = row < rows && (wide || column % 2 == 0);
    float x[dim / 32], best = 0.0f;
#pragma unroll
    for (int i = 0; i < dim / 32; ++i) {
      x[i] = there ? load_query(args, row_offset(row) * dim + 32 * i + lane) : 0.0f;
      best = fmaxf(best, fabsf(x[i]));
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) best = fmaxf(best, __shfl_xor_sync(~0u, best, step));
    const int exponent = best > 0.0f ? ilogbf(best) + 1 : 0;
    if (lane == 0 && (wide || column % 2 == 0)) row_factor[row] = there ? args.scale * power(exponent) : 0.0f;
#pragma unroll
    for (int i = 0; i < dim / 32; ++i) {
      query[column * kQueryRow + 32 * i + lane] = __float2half_rn(x[i] * power(kQueryLift - exponent));
    }
  }
  __syncthreads();
  const auto row_of = [&](int column) { return wide ? 2 * (lane % 4) + column : lane % 4; };
  const float factor[2] = {row_factor[row_of(0)] * power(-kQueryLift),
                           wide ? row_factor[row_of(1)] * power(-kQueryLift) : 0.0f};
  const auto seen = [&](int column, int from, int to) {
    const int row = row0 + min(row_of(column), rows - 1);
    const int end = item.length - (args.q_tokens - 1 - row / args.group);
    return make_int2(args.sliding_window > 0 ? max(from, end - args.sliding_window) : from, min(to, end));
  };
  // All rows see the positions from..to - 1, and none sees one before `nothing`.
  const int all_to = item.length - (args.q_tokens - 1);
  const int all_from = args.sliding_window > 0 ? item.length - args.sliding_window : 0;
  const int nothing = args.sliding_window > 0 ? all_to - args.sliding_window : 0;
  uint64_t policy;
  if (item.evict_first != 0) {
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;\n" : "=l"(policy));
  } else {
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;\n" : "=l"(policy));
  }
  bool any[2] = {};  // records, rows
  for (int base = item.page_begin; base < item.page_end; base += 32) {
    const int32_t id = base == item.page_begin ? first_ids : ids_from(base);
    any[0] |= __any_sync(~0u, base + lane < item.page_end && id >= 0) != 0;
    any[1] |= __any_sync(~0u, base + lane < item.page_end && id < 0) != 0;
  }

  float* const merged = reinterpret_cast<float*>(shared + kRows * kQueryRow * 2);
  float* const merged_sums = merged + 2 * kWarps * kRows * kMergeRow;
  const auto walk = [&](auto of_rows, int part) {
    constexpr bool kOfRows = decltype(of_rows)::value;
    struct Tile {
      const uint8_t *keys, *values;
      int first, live;  // 0: there is none
    };
    int base = item.page_begin, at = warp;  // at: of the item's tiles, the next
    int32_t ids = first_ids;
    const auto next_tile = [&]() -> Tile {
      for (;; at += kWarps) {
        const int page = item.page_begin + at / kPageTiles, before = at % kPageTiles * kTileTokens;
        if (page >= item.page_end) return {nullptr, nullptr, 0, 0};
        if (page >= base + 32) base += 32, ids = ids_from(base);
        const int32_t id = __shfl_sync(~0u, ids, page - base);
        if ((id < 0) != kOfRows) continue;
        // A sink page is shorter than its slots: the rest belongs to the next page.
        const bool sinks = args.sinks > 0 && page == 0;
        const int of_page = args.sinks > 0 ? (sinks ? 0 : args.sinks + (page - 1) * kPageTokens) : page * kPageTokens;
        const int first = of_page + before;
        const int live = min(kTileTokens, min(sinks ? args.sinks : kPageTokens, item.length - of_page) - before);
        if (live <= 0 || first + live <= nothing) continue;
        at += kWarps;
        if constexpr (kOfRows) {
          const uint8_t* const keys = args.open_pages + static_cast<int64_t>(~id) * args.open_page_stride +
                                      item.kv_head * args.open_head_stride + before * dim * 2;
          return {keys, keys + value_row(args, page) * dim * 2, first, live};
        } else {
          const uint8_t* const record =
              args.records + id * args.record_page_stride + item.kv_head * args.record_head_stride + before / kTileTokens * 512;
          return {record + kHeaderBytes, record + arguments.value_begin, first, live};
        }
      }
    };
    const auto read = [&](Side& side, const uint8_t* from, int live, bool keys) {
      if constexpr (!kOfRows) {
        side.read_tiles(from, policy, lane);
      } else if (keys) {
        side.read_key_rows(from, live, policy, lane);
      } else {
        side.read_value_rows(from, live, policy, lane);
      }
    };
    State state;
    state.reset();
    Side keys, values;
    Tile now = next_tile();
    if (now.live > 0) read(keys, now.keys, now.live, true);
    while (now.live > 0) {
      read(values, now.values, now.live, false);
      float sums[2][4] = {};  // two chains of products
      const __half* const mine = query + lane / 4 * kQueryRow;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        uint32_t a[4];
        uint2 q;
        if constexpr (kOfRows) {
          keys.key_rows(i, a);
          q = *reinterpret_cast<const uint2*>(mine + 32 * (i / 2) + 8 * (lane % 4) + 4 * (i % 2));
        } else {
          keys.tile(i, a);
          q.x = *reinterpret_cast<const uint32_t*>(mine + 16 * i + 2 * (lane % 4));
          q.y = *reinterpret_cast<const uint32_t*>(mine + 16 * i + 2 * (lane % 4) + 8);
        }
        mma(sums[i % 2], a, q.x, q.y);
      }
      const Tile then = next_tile();
      if (then.live > 0) read(keys, then.keys, then.live, true);
      float s[1][4];
      uint32_t p[1][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) s[0][i] = (sums[0][i] + sums[1][i]) * factor[i & 1];
      const bool masked = now.live < kTileTokens || now.first + kTileTokens > all_to || now.first < all_from;
      state.softmax(
          s, p, now.first, masked, [&](int column) { return seen(column, now.first, now.first + now.live); }, args.softcap, 0,
          wide, lane);
      state.add_sum(p, lane);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        uint32_t a[4];
        if constexpr (kOfRows) {
          values.value_rows(i, a);
        } else {
          values.tile(i, a);
          if (now.live < kTileTokens) mask_tokens(a, 0, now.live, lane);
        }
        mma(state.acc[i], a, p[0][0], p[0][1]);
      }
      now = then;
    }
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      if (column == 1 && !wide) break;
      const int row = row_of(column);
      const float sum = state.sum_of(column, lane);
      if (row >= rows) continue;
      float* const to = merged + (part * kRows + row) * kMergeRow;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        to[Side::channel(kOfRows, i, false, lane)] = state.acc[i][column];
        to[Side::channel(kOfRows, i, true, lane)] = state.acc[i][column + 2];
      }
      if (lane < 4) {
        merged_sums[(part * kRows + row) * 2] = state.top[column];
        merged_sums[(part * kRows + row) * 2 + 1] = sum;
      }
    }
  };
  int parts = 0;
  if (any[0]) walk(std::false_type{}, warp), parts += kWarps;
  if (any[1] || parts == 0) walk(std::true_type{}, parts + warp), parts += kWarps;
  __syncthreads();
  write_rows<dim / 4>(args, item, kThreads, parts, {row0, rows, all_rows, item.ticket * arguments.row_blocks + block},
                      reinterpret_cast<float2*>(merged), &last, row_offset, [&](int w, int row) {
                        const int of = w * kRows + row;
                        return RowPart{make_float2(merged_sums[2 * of], merged_sums[2 * of + 1]),
                                       reinterpret_cast<const float4*>(merged + of * kMergeRow)};
                      });
}

}  // namespace kvmix::cuda
