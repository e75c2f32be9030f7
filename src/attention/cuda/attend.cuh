// The decode kernel. A thread block of four to kMaxWarps warps takes one item: a run of pages of one sequence and KV head. Each
// warp walks every so many'th packed page alone, copying packed halves of records (keys, then values) through its own two
// buffers of shared memory (PageCopies), one half ahead of the arithmetic. Codes are operand A of mma.m16n8k16 as fp16
// subnormals (codec/cuda/tile_layout.h) and query rows the eight columns, so codes cost one AND each pair and no conversion:
//   score = sum_c q_c (mid_c + s_c (code - centre)):  s_c 2^-shift goes into Q, the rest is one number per page and row
//   out_c = sum_t p_t (mid_t + s_t (code - centre)):  s_t goes into P, 2^-shift into the epilogue, the rest is a second sum
// The softmax is in base 2; P is held at 2^kLift times its value over the running maximum of score + value exponent, so that
// P * s_t stays inside fp16 with small weights well above its smallest numbers.
// One long file: its parts work on one set of registers.
#pragma once

#include "attention/cuda/page_copies.cuh"
#include "attention/cuda/partials.cuh"
#include "attention/cuda/shape.h"
#include "codec/cuda/words.cuh"

namespace kvmix::cuda {

// Operand A of a field: one AND a register, and one shift a word for the fields beyond the mantissa.
template <int bits>
__device__ inline void unpack(const uint32_t (&w)[block_words(bits)], int field, uint32_t (&a)[4]) {
  constexpr int kInPlace = bits == 2 ? 10 : bits == 3 ? 9 : 8;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    if (bits == 3 && field == 7 && r >= 2) {  // in the spare bits of three words
      const int first = code_place(bits, r, field).word;
      a[r] = ((w[first] >> 9) & both(1u << 6)) | ((w[first + 1] >> 8) & both(1u << 7)) | ((w[first + 2] >> 7) & both(1u << 8));
      continue;
    }
    const CodePlace place = code_place(bits, r, field);
    const bool above = place.bit >= kInPlace;
    const uint32_t word = above ? w[place.word] >> kInPlace : w[place.word];
    a[r] = word & both(((1u << bits) - 1) << (above ? place.bit - kInPlace : place.bit));
  }
}

template <int dim_, int key_bits_, int value_bits_, int key_group_, int value_group_, bool wide_>
struct Config {
  static constexpr int dim = dim_;
  static constexpr RecordShape kShape{dim, key_bits_, value_bits_, key_group_, value_group_};
  static constexpr int key_bits = key_bits_, value_bits = value_bits_;
  static constexpr int key_groups = kShape.key_groups(), value_groups = kShape.value_groups();
  // Up to four query rows stand in the even columns: half the softmax.
  static constexpr bool wide = wide_;
  static constexpr int columns = wide ? 2 : 1;  // of a lane
  static constexpr int channel_tiles = dim / 16;
  // One query fragment and one accumulator for every field and channel tile that meet: the field fixes the power of two.
  static constexpr int places = channel_tiles < kFields ? kFields : channel_tiles;
  static constexpr int tile_blocks =
      places / kFields;  // of a token tile, which with 64 channels shares its block with the next
  static constexpr bool shares_block = channel_tiles < kFields;
  // Both copies of a record start at a 128-byte line of it, that of the values value_shift bytes before them.
  static constexpr int value_begin = kShape.key_bytes() / 128 * 128, value_shift = kShape.key_bytes() - value_begin;
  static constexpr int stage_key = kShape.key_bytes(), stage_value = value_shift + kShape.value().bytes();
  static constexpr int key_pitch = (stage_key + 127) / 128 * 128;
  static constexpr int ring = key_pitch + (stage_value + 127) / 128 * 128;  // per warp
  static constexpr int query_rows = wide ? kRows : kRows / 2;
  static constexpr int query_bytes = channel_tiles * 32 * 8;
  static constexpr int merge_row = dim + 8;  // floats, without bank conflicts
  static_assert(ring >= kRows * (merge_row + 2) * 4, "a warp's part of the merge lies in its ring");
  static_assert(kWarps * ring >= kRows * kMaxSplits * 8, "the sums of all splits lie in the rings");
  // A multiprocessor's warps. Registers allow most_warps, but launches of up to few_blocks blocks a multiprocessor take
  // kMaxWarps: with records of 9 KB these keep the memory busy, and more only queue for it. With many short blocks more warps
  // hide each other's beginnings. Wider formats need the registers of eight.
  static constexpr int most_warps = dim <= 128 && ring <= 10 * 1024 ? 16 : kMaxWarps;
  static constexpr int few_blocks = dim == 64 || (dim == 128 && ring < 9 * 1024) ? 1 : 8;
  static constexpr int shared_bytes(int warps) { return query_bytes + warps * ring; }
};

template <class C>
struct Warp {
  float acc[C::places][4];
  float top[2], sum[2], zero[C::value_groups][2];

  __device__ void reset() {
#pragma unroll
    for (int f = 0; f < C::places; ++f)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[f][i] = 0.0f;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      top[i] = kFloor, sum[i] = 0.0f;
#pragma unroll
      for (int g = 0; g < C::value_groups; ++g) zero[g][i] = 0.0f;
    }
  }

  // Raw scores to weights at 2^kLift over the running maximum; `exponent` is the value scales'. Where `masked`, a column sees
  // the positions range(column) only.
  template <class Range>
  __device__ void softmax(float (&s)[kPageBlocks][4], const float (&factor)[2], int first, bool masked, const Range& range,
                          float softcap, int exponent, int lane) {
    // One branch each for what is rare, so that the common path is straight.
#pragma unroll
    for (int b = 0; b < kPageBlocks; ++b)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if ((i & 1) < C::columns) s[b][i] *= factor[i & 1];
    if (softcap > 0.0f) {
      const float inverse = 1.0f / softcap;
#pragma unroll
      for (int b = 0; b < kPageBlocks; ++b)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if ((i & 1) < C::columns) s[b][i] = softcap * tanh_fast(s[b][i] * inverse);
    }
    if (masked) {
#pragma unroll
      for (int column = 0; column < C::columns; ++column) {
        const int2 seen = range(column);
#pragma unroll
        for (int b = 0; b < kPageBlocks; ++b)
#pragma unroll
          for (int i = column; i < 4; i += 2) {
            const int position = first + 16 * b + lane / 4 + 8 * (i >> 1);
            if (position < seen.x || position >= seen.y) s[b][i] = -INFINITY;
          }
      }
    }
    float best[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int b = 0; b < kPageBlocks; ++b)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if ((i & 1) < C::columns) best[i & 1] = fmaxf(best[i & 1], s[b][i]);
    bool grows = false;
#pragma unroll
    for (int column = 0; column < C::columns; ++column) {
      float m = best[column];
#pragma unroll
      for (int step = 4; step < 32; step *= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, step));
      best[column] = m + static_cast<float>(exponent);
      // Weights may pass the old maximum twofold before everything is rescaled.
      grows |= best[column] > top[column] + 1.0f;
    }
    if (__any_sync(~0u, grows)) {
#pragma unroll
      for (int column = 0; column < C::columns; ++column) {
        const float next = fmaxf(top[column], best[column]);
        const float shrink = exp2_fast(top[column] - next);
        top[column] = next;
        sum[column] *= shrink;
#pragma unroll
        for (int g = 0; g < C::value_groups; ++g) zero[g][column] *= shrink;
#pragma unroll
        for (int f = 0; f < C::places; ++f) acc[f][column] *= shrink, acc[f][column + 2] *= shrink;
      }
    }
    float offset[2];
#pragma unroll
    for (int column = 0; column < C::columns; ++column) offset[column] = kLift - top[column];
#pragma unroll
    for (int b = 0; b < kPageBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = i & 1;
        if (column >= C::columns) {
          s[b][i] = 0.0f;
          continue;
        }
        s[b][i] = exp2_fast(s[b][i] + offset[column]);
        sum[column] += s[b][i];
      }
    }
  }

  // Scores of a packed key part against the query fragments.
  __device__ void packed_scores(const uint8_t* part, const uint2* query, int exponent, float (&s)[kPageBlocks][4], int lane) {
    constexpr int kBits = C::key_bits;
    const uint32_t shrink = power_half(-exponent);
    const uint4* meta = reinterpret_cast<const uint4*>(part + kHeaderBytes + C::kShape.key().meta());
#pragma unroll
    for (int group = 0; group < C::key_groups; ++group) {
      const uint4* scales = meta + group * (C::dim / 8) + (lane % 4) * (C::dim / 32);
      const uint4* mids = scales + C::key_groups * (C::dim / 8);
      uint32_t q0[C::places], q1[C::places];
      // Rows 0..7 sum query times midpoint, rows 8..15 query times scale; two chains.
      float sums[2][4] = {};
#pragma unroll
      for (int c = 0; c < C::channel_tiles; c += 2) {
        const uint4 scale = scales[c / 2], mid = mids[c / 2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint2 q = query[(c + i) * 32 + lane];
          const uint32_t s0 = i == 0 ? scale.x : scale.z, s1 = i == 0 ? scale.y : scale.w;
          const uint32_t rows[4] = {i == 0 ? mid.x : mid.z, s0, i == 0 ? mid.y : mid.w, s1};
          mma(sums[i], rows, q.x, q.y);
#pragma unroll
          for (int place = c + i; place < C::places; place += C::channel_tiles) {
            const uint32_t lift = power_half(12 - field_shift(kBits, place % kFields));
            q0[place] = multiply(multiply(q.x, lift), multiply(s0, shrink));
            q1[place] = multiply(multiply(q.y, lift), multiply(s1, shrink));
          }
        }
      }
      constexpr float kCentre = ((1 << kBits) - 1) * 0.5f;
      const float unit = power(-12 - exponent);
      const float start0 = (sums[0][0] + sums[1][0] - kCentre * (sums[0][2] + sums[1][2])) * unit;
      const float start1 = (sums[0][1] + sums[1][1] - kCentre * (sums[0][3] + sums[1][3])) * unit;
      constexpr int kAtOnce = kBits <= 4 || C::shares_block ? 2 : 1;  // chains of mma side by side
      constexpr int kGroupTiles = kPageBlocks / C::key_groups;
#pragma unroll
      for (int tile = group * kGroupTiles; tile < (group + 1) * kGroupTiles; tile += kAtOnce) {
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          s[tile + j][0] = s[tile + j][2] = start0;
          s[tile + j][1] = s[tile + j][3] = start1;
        }
        const uint8_t* codes = part + kHeaderBytes;
        if constexpr (C::shares_block) {
          uint32_t w[block_words(kBits)];
          load_words<kBits>(codes + tile / 2 * block_bytes(kBits), lane, w);
#pragma unroll
          for (int c = 0; c < C::channel_tiles; ++c) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const int field = j * C::channel_tiles + c;
              uint32_t a[4];
              unpack<kBits>(w, field, a);
              mma(s[tile + j], a, q0[field], q1[field]);
            }
          }
        } else {
#pragma unroll
          for (int part_of_tile = 0; part_of_tile < C::tile_blocks; ++part_of_tile) {
            uint32_t w[kAtOnce][block_words(kBits)];
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) {
              load_words<kBits>(codes + ((tile + j) * C::tile_blocks + part_of_tile) * block_bytes(kBits), lane, w[j]);
            }
#pragma unroll
            for (int f = 0; f < kFields; ++f) {
#pragma unroll
              for (int j = 0; j < kAtOnce; ++j) {
                uint32_t a[4];
                unpack<kBits>(w[j], f, a);
                mma(s[tile + j], a, q0[part_of_tile * kFields + f], q1[part_of_tile * kFields + f]);
              }
            }
          }
        }
      }
    }
  }

  // Adds weights times a packed value part.
  __device__ void packed_values(const uint8_t* part, const float (&p)[kPageBlocks][4], int lane) {
    constexpr int kBits = C::value_bits;
    constexpr float kCentre = ((1 << kBits) - 1) * 0.5f;
    const uint2* meta = reinterpret_cast<const uint2*>(part + C::kShape.value().meta());
    uint32_t w[C::tile_blocks][block_words(kBits)];
#pragma unroll
    for (int tile = 0; tile < kPageBlocks; ++tile) {
#pragma unroll
      for (int i = 0; i < C::tile_blocks; ++i) {
        const int block = C::shares_block ? tile / 2 : tile * C::tile_blocks + i;
        if (!C::shares_block || tile % 2 == 0) load_words<kBits>(part + block * block_bytes(kBits), lane, w[i]);
      }
#pragma unroll
      for (int group = 0; group < C::value_groups; ++group) {
        const uint2 m = meta[group * (kPageTokens / 2) + tile * 8 + lane / 4];
        const float s0 = half_bits(m.x & 0xffffu), s1 = half_bits(m.x >> 16);
        const float z0 = half_bits(m.y & 0xffffu) - kCentre * s0, z1 = half_bits(m.y >> 16) - kCentre * s1;
#pragma unroll
        for (int column = 0; column < C::columns; ++column) {
          zero[group][column] = fmaf(p[tile][column], z0, fmaf(p[tile][column + 2], z1, zero[group][column]));
        }
        const uint32_t b0 = transpose(pack(p[tile][0] * s0, p[tile][1] * s0));
        const uint32_t b1 = transpose(pack(p[tile][2] * s1, p[tile][3] * s1));
        constexpr int kGroupTiles = C::channel_tiles / C::value_groups;
#pragma unroll
        for (int i = 0; i < kGroupTiles; ++i) {
          const int place = group * kGroupTiles + i + (C::shares_block ? tile % 2 * C::channel_tiles : 0);
          uint32_t a[4];
          unpack<kBits>(w[place / kFields], place % kFields, a);
          mma(acc[place], a, b0, b1);
        }
      }
    }
  }

  // A quarter of an open page, two of its blocks: fp16 rows straight from global memory. `s` comes out as scores in units of
  // factor, as for packed keys; zero in the other blocks.
  __device__ void open_scores(const __half* keys, int live, int quarter, const uint2* query, float (&s)[kPageBlocks][4],
                              int lane) {
    const int row = 32 * quarter + lane / 4, column = 2 * (lane % 4);
    const auto load = [&](int token, int channel) {
      return token < live ? *reinterpret_cast<const uint32_t*>(keys + token * C::dim + channel) : 0u;
    };
    constexpr int kAhead = C::channel_tiles < 8 ? 2 : 4;  // tiles whose loads stand side by side; with more, registers spill
    float mine[2][4] = {};
#pragma unroll kAhead
    for (int f = 0; f < C::channel_tiles; ++f) {
      const int channel = 16 * f + column;
      const uint2 q = query[f * 32 + lane];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int token = row + 16 * j;
        const uint32_t a[4] = {load(token, channel), load(token + 8, channel), load(token, channel + 8),
                               load(token + 8, channel + 8)};
        mma(mine[j], a, q.x, q.y);
      }
    }
#pragma unroll
    for (int block = 0; block < kPageBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[block][i] = block / 2 == quarter ? mine[block % 2][i] : 0.0f;
    }
  }

  __device__ void open_values(const __half* values, int live, int quarter, const float (&p)[kPageBlocks][4], int lane) {
    const int row = 32 * quarter + lane / 4, column = 2 * (lane % 4);
    const auto load = [&](int token, int channel) {
      return transpose(token < live ? *reinterpret_cast<const uint32_t*>(values + token * C::dim + channel) : 0u);
    };
    float mine[2][4] = {};
#pragma unroll
    for (int block = 0; block < kPageBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) mine[block % 2][i] = block / 2 == quarter ? p[block][i] : mine[block % 2][i];
    }
    uint32_t b0[2], b1[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      b0[j] = transpose(pack(mine[j][0], mine[j][1]));
      b1[j] = transpose(pack(mine[j][2], mine[j][3]));
    }
#pragma unroll
    for (int f = 0; f < C::channel_tiles; ++f) {
      float part[4] = {};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int token = row + 16 * j, channel = 16 * f + column;
        const uint32_t a[4] = {load(token, channel), load(token, channel + 8), load(token + 8, channel),
                               load(token + 8, channel + 8)};
        mma(part, a, b0[j], b1[j]);
      }
      // Accumulators are in units of the packed codes.
      const float unit = power(field_shift(C::value_bits, f % kFields) - 24);
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[f][i] = fmaf(part[i], unit, acc[f][i]);
    }
  }
};

template <class C>
__global__ void __launch_bounds__(32 * kMaxWarps, C::most_warps / kMaxWarps)
    attend_kernel(const __grid_constant__ AttendArguments args) {
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ float row_factor[kRows];
  __shared__ kvmix_cuda_item item;  // read from here where it is needed: registers decide
  __shared__ int last, present;     // present: warps with work
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const kvmix_cuda_item mine = args.items[blockIdx.x];
  uint2* const query = reinterpret_cast<uint2*>(shared);
  uint8_t* const rings = shared + C::query_bytes;
  uint8_t* const ring = rings + warp * C::ring;
  PageCopies<C> copies(ring, lane, warp);
  // Warps without a page leave; four stay for what all of a block do.
  const int warps = min(static_cast<int>(blockDim.x) / 32, max(kWarps, mine.page_end - mine.page_begin));
  if (warp >= warps) return;
  if (threadIdx.x == 0) item = mine, present = warps;
  const int rows = args.group * args.q_tokens;
  const auto row_offset = [&](const kvmix_cuda_item& of, int row) {
    const int token = row / args.group, head = of.kv_head * args.group + row % args.group;
    return (static_cast<int64_t>(of.sequence) * args.q_tokens + token) * (args.kv_heads * args.group) + head;
  };

  constexpr int kPerLane = C::dim / 32;
  float x[kPerLane] = {};
  if (warp < rows) load_queries(args, row_offset(mine, warp) * C::dim + kPerLane * lane, x);
  // -1 past the end, as of an open page: nothing to copy.
  const auto page_id = [&](const kvmix_cuda_item& of, int page) {
    return page < of.page_end ? args.page_table[of.sequence * args.page_table_stride + page] : -1;
  };
  const auto fetch = [&](const kvmix_cuda_item& of, int32_t id, bool keys) {
    const uint8_t* const record = args.records + id * args.record_page_stride + of.kv_head * args.record_head_stride;
    copies.start(id >= 0 ? record : nullptr, keys, of.evict_first != 0);
  };
  int page = mine.page_begin + warp;
  int32_t id = page_id(mine, page), next = page_id(mine, page + warps);
  fetch(mine, id, true);
  fetch(mine, id, false);
  // Ids, in search of open pages.
  const int32_t here = mine.page_begin + lane < mine.page_end ? page_id(mine, mine.page_begin + lane) : 0;

  store_new_rows(args, mine, C::dim, 32 * warps);
  // Query rows, scaled by a power of two to at most 1, in fragment order.
  for (int row = warp; row < C::query_rows; row += warps) {
    if (row != warp) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) x[i] = 0.0f;
      if (row < rows) load_queries(args, row_offset(mine, row) * C::dim + kPerLane * lane, x);
    }
    float best = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) best = fmaxf(best, fabsf(x[i]));
#pragma unroll
    for (int step = 1; step < 32; step *= 2) best = fmaxf(best, __shfl_xor_sync(~0u, best, step));
    const int exponent = best > 0.0f ? ilogbf(best) + 1 : 0;
    if (lane == 0) row_factor[row] = row < rows ? args.scale * power(exponent) : 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; i += 2) {
      const int channel = kPerLane * lane + i, c = channel % 16, column = C::wide ? row : 2 * row;
      uint32_t* const to = reinterpret_cast<uint32_t*>(query) + ((channel / 16) * 32 + column * 4 + (c % 8) / 2) * 2 + c / 8;
      *to = pack(x[i] * power(-exponent), x[i + 1] * power(-exponent));
      if constexpr (!C::wide) to[4 * 2] = 0;  // the odd column
    }
  }
  __syncthreads();

  // Which of the positions from..to a column of this lane sees.
  const auto row_of = [&](int column) { return C::wide ? 2 * (lane % 4) + column : lane % 4; };
  const auto seen = [&](int column, int from, int to) {
    const int token = row_of(column) < rows ? row_of(column) / args.group : 0;
    const int end = item.length - (args.q_tokens - 1 - token);
    return make_int2(args.sliding_window > 0 ? max(from, end - args.sliding_window) : from, min(to, end));
  };
  // A sink page is shorter than its slots: the rest belongs to the next page.
  const auto first_token = [&](int page) {
    return args.sinks > 0 ? (page == 0 ? 0 : args.sinks + (page - 1) * kPageTokens) : page * kPageTokens;
  };
  const auto live_tokens = [&](int page, int first) {
    return min(args.sinks > 0 && page == 0 ? args.sinks : kPageTokens, item.length - first);
  };
  // Open pages are read last, without copies ahead: at least they shall be near by then.
  // Four warps share one, a quarter each, and those after them take the next.
  const int quarter = warp % 4, turns = present / 4;
  unsigned open = __ballot_sync(~0u, here < 0);
  for (unsigned rest = open; warp < 4 && rest != 0; rest &= rest - 1) {
    const int at = __ffs(static_cast<int>(rest)) - 1, page = item.page_begin + at;
    const int live = live_tokens(page, first_token(page)) - 32 * quarter;
    const uint8_t* const keys = args.open_pages + static_cast<int64_t>(~__shfl_sync(~0u, here, at)) * args.open_page_stride +
                                item.kv_head * args.open_head_stride + 32 * quarter * C::dim * 2;
    for (int line = lane; line * 128 < min(live, 32) * C::dim * 2; line += 32) {
      asm volatile("prefetch.global.L2 [%0];\n" ::"l"(keys + line * 128));
      asm volatile("prefetch.global.L2 [%0];\n" ::"l"(keys + kPageTokens * C::dim * 2 + line * 128));
    }
  }
  Warp<C> state;
  state.reset();
  for (; page < item.page_end; page += present) {
    const int32_t after = page_id(item, page + 2 * present);
    if (id >= 0) {
      const int first = first_token(page), live = live_tokens(page, first);
      // All rows see the positions below length - (q_tokens - 1), and with a window those it leaves the newest.
      const bool masked = live < kPageTokens || first + kPageTokens > item.length - (args.q_tokens - 1) ||
                          (args.sliding_window > 0 && first < item.length - args.sliding_window);
      float s[kPageBlocks][4], unit[2];
      copies.wait(true);
      const int2 exponent = *reinterpret_cast<const int2*>(ring);
      state.packed_scores(ring, query, exponent.x, s, lane);
#pragma unroll
      for (int column = 0; column < C::columns; ++column) unit[column] = row_factor[row_of(column)] * power(12 + exponent.x);
      __syncwarp();
      fetch(item, next, true);
      state.softmax(
          s, unit, first, masked, [&](int column) { return seen(column, first, first + live); }, args.softcap, exponent.y,
          lane);
      copies.wait(false);
      state.packed_values(ring + C::key_pitch + C::value_shift, s, lane);
      __syncwarp();
      fetch(item, next, false);
    } else {
      fetch(item, next, true);
      fetch(item, next, false);
    }
    id = next, next = after;
  }

  // Open pages, a quarter a warp: alone it would be the last of its block by far.
  int turn = 0;
  for (int base = item.page_begin; base < item.page_end; base += 32) {
    if (base != item.page_begin) open = __ballot_sync(~0u, base + lane < item.page_end && page_id(item, base + lane) < 0);
    for (; open != 0; open &= open - 1) {
      const int page = base + __ffs(static_cast<int>(open)) - 1;
      const int32_t open_id = ~page_id(item, page);
      const int first = first_token(page), live = live_tokens(page, first), from = first + 32 * quarter;
      const bool of_mine = turn == warp / 4;
      turn = turn + 1 < turns ? turn + 1 : 0;
      if (!of_mine || 32 * quarter >= live) continue;
      const __half* const keys = reinterpret_cast<const __half*>(
          args.open_pages + static_cast<int64_t>(open_id) * args.open_page_stride + item.kv_head * args.open_head_stride);
      float s[kPageBlocks][4], unit[2];
#pragma unroll
      for (int column = 0; column < C::columns; ++column) unit[column] = row_factor[row_of(column)];
      state.open_scores(keys, live, quarter, query, s, lane);
      state.softmax(
          s, unit, first, true, [&](int column) { return seen(column, from, min(first + live, from + 32)); }, args.softcap, 0,
          lane);
      state.open_values(keys + kPageTokens * C::dim, live, quarter, s, lane);
    }
  }

  // Sums over the lanes of a column, then over the warps through shared memory.
#pragma unroll
  for (int column = 0; column < C::columns; ++column) {
#pragma unroll
    for (int step = 4; step < 32; step *= 2) {
      state.sum[column] += __shfl_xor_sync(~0u, state.sum[column], step);
#pragma unroll
      for (int g = 0; g < C::value_groups; ++g) state.zero[g][column] += __shfl_xor_sync(~0u, state.zero[g][column], step);
    }
  }
  __syncthreads();
  float* const merged = reinterpret_cast<float*>(rings);  // [warp][row][C::merge_row], then [warp][row][2]
  float* const merged_sums = merged + present * kRows * C::merge_row;
#pragma unroll
  for (int column = 0; column < C::columns; ++column) {
    const int row = row_of(column);
    if (row >= rows) continue;
    float* to = merged + (warp * kRows + row) * C::merge_row;
#pragma unroll
    for (int c = 0; c < C::channel_tiles; ++c) {
      const float zero = state.zero[c * C::value_groups / C::channel_tiles][column];
      float low = zero, high = zero;
#pragma unroll
      for (int place = c; place < C::places; place += C::channel_tiles) {
        const float unit = power(24 - field_shift(C::value_bits, place % kFields));
        low = fmaf(state.acc[place][column], unit, low);
        high = fmaf(state.acc[place][column + 2], unit, high);
      }
      to[16 * c + lane / 4] = low;
      to[16 * c + lane / 4 + 8] = high;
    }
    if (lane < 4) {
      merged_sums[(warp * kRows + row) * 2] = state.top[column];
      merged_sums[(warp * kRows + row) * 2 + 1] = state.sum[column];
    }
  }
  __syncthreads();
  const kvmix_cuda_item done = item;
  write_rows<C::dim / 4>(
      args, done, 32 * present, present, rows, rows, reinterpret_cast<float2*>(rings), &last,
      [&](int row) { return row_offset(done, row); },
      [&](int w, int row) {
        const int at = w * kRows + row;
        return RowPart{make_float2(merged_sums[2 * at], merged_sums[2 * at + 1]),
                       reinterpret_cast<const float4*>(merged + at * C::merge_row)};
      });
}

}  // namespace kvmix::cuda
