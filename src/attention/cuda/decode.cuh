// The decode kernel. A thread block of four to kMaxWarps warps takes one item, a run of pages of one sequence and KV head, with
// up to kRows query rows. Each warp walks every so many'th packed page alone, copying packed halves of records (keys, then
// values) through its own two buffers of shared memory (PageCopies), one half ahead of the arithmetic. Codes are operand A of
// mma.m16n8k16 as fp16 subnormals (codec/cuda/tile_layout.h) and query rows the eight columns, so codes cost one AND each pair
// and no conversion. Widths and groups are found at run time, page by page, so that there is one kernel for each head_dim:
//   score = sum_c q_c (mid_c + s_c (code - centre)): s_c goes into Q; a field, which is a token tile, fixes the power of two
//   out_c = sum_t p_t (mid_t + s_t (code - centre)): s_t and the field's power of two go into P
// The terms without codes are matrix products too: midpoints and scales as operand A. The sum of the weights is one of them, so
// that it adds the same rounded weights as the output does. The softmax is in base 2; P is held at 2^kLift times its value over
// the running maximum of score + value exponent, so that P * s_t stays inside fp16 with small weights well above its smallest
// numbers.
// One long file: its parts work on one set of registers.
#pragma once

#include "attention/cuda/dequantise.cuh"
#include "attention/cuda/launch.h"
#include "attention/cuda/page_copies.cuh"
#include "attention/cuda/partials.cuh"
#include "attention/cuda/shape.h"
#include "attention/cuda/trellis.cuh"
#include "base/cuda/overlap.cuh"
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

// The same from the words of a piece of the block: four, which with 4 and 8 bits hold some fields whole, or the block.
template <int bits, int words>
__device__ inline void unpack_piece(const uint32_t (&w)[words], int field, uint32_t (&a)[4]) {
  if constexpr (words == block_words(bits)) {
    unpack<bits>(w, field, a);
  } else {
    uint32_t all[block_words(bits)];
#pragma unroll
    for (int i = 0; i < block_words(bits); ++i) all[i] = w[i % 4];
    unpack<bits>(all, field, a);
  }
}
template <int words>
__device__ inline void load_piece(const uint8_t* piece, int lane, uint32_t (&w)[words]) {
  load_words<words / 2>(piece, lane, w);
}

__device__ constexpr float code_centre_of(int width) {
  return is_trellis_width(width) ? kLevelCentre : static_cast<float>((1 << width) - 1) * 0.5f;
}

// What a warp holds: sums of weights times values, and of weights times what has no codes. `thin`: keys have `key_tiles`
// channel tiles instead of all.
template <int dim, int most_warps, bool thin = false>
struct Warp {
  // Channel tiles of values side by side, where registers allow: twelve warps on a multiprocessor have 168 a thread.
  static constexpr int kValueTiles = most_warps <= kFewWarps ? 4 : 2;
  static constexpr int kTiles = dim / 16, kSumRow = 7;
  float acc[kTiles][4];  // weights times scale times code, times 2^-23
  // Row r of 16: midpoints of value group r, the weights themselves (kSumRow), scales of group r - 8.
  float side[4];
  float top[2];

  __device__ void reset() {
#pragma unroll
    for (int c = 0; c < kTiles; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[c][i] = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) side[i] = 0.0f;
    top[0] = top[1] = kFloor;
  }

  // Scores to weights times 2^exponent at 2^kLift over the running maximum, as operand B; `exponent` is the value scales'.
  // Where `masked`, a column sees the positions range(column) only. Of a lane's two columns the second counts where `wide`.
  // `chained`: weights in the order of value_column_token.
  template <bool may_chain = false, int tiles, class Range>
  __device__ __forceinline__ void softmax(float (&s)[tiles][4], uint32_t (&p)[tiles][2], int first, bool masked,
                                          const Range& range, float softcap, int exponent, bool wide, int lane,
                                          bool chained = false) {
    const auto peak = [&](const int column) {
      // One branch each for what is rare, so that the common path is straight.
      if (softcap > 0.0f) {
        const float inverse = 1.0f / softcap;
#pragma unroll
        for (int b = 0; b < tiles; ++b)
#pragma unroll
          for (int i = column; i < 4; i += 2) s[b][i] = softcap * tanh_fast(s[b][i] * inverse);
      }
      if (masked) {
        const int2 seen = range(column);
#pragma unroll
        for (int b = 0; b < tiles; ++b)
#pragma unroll
          for (int i = column; i < 4; i += 2) {
            const int position = first + 16 * b + lane / 4 + 8 * (i >> 1);
            if (position < seen.x || position >= seen.y) s[b][i] = -INFINITY;
          }
      }
      float m = -INFINITY;
#pragma unroll
      for (int b = 0; b < tiles; ++b) m = fmaxf(m, fmaxf(s[b][column], s[b][column + 2]));
#pragma unroll
      for (int step = 4; step < 32; step *= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, step));
      return m + static_cast<float>(exponent);
    };
    float best[2] = {peak(0), -INFINITY};
    if (wide) best[1] = peak(1);
    // Weights may pass the old maximum twofold before everything is rescaled.
    if (__any_sync(~0u, best[0] > top[0] + 1.0f || best[1] > top[1] + 1.0f)) {
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const float next = fmaxf(top[column], best[column]);
        const float shrink = exp2_fast(top[column] - next);
        top[column] = next;
        side[column] *= shrink, side[column + 2] *= shrink;
#pragma unroll
        for (int c = 0; c < kTiles; ++c) acc[c][column] *= shrink, acc[c][column + 2] *= shrink;
      }
    }
    const float lift = kLift + static_cast<float>(exponent);
    const auto weigh = [&](const int column) {
      const float offset = lift - top[column];
#pragma unroll
      for (int b = 0; b < tiles; ++b) {
        s[b][column] = exp2_fast(s[b][column] + offset);
        s[b][column + 2] = exp2_fast(s[b][column + 2] + offset);
      }
    };
    weigh(0);
    if (wide) {
      weigh(1);
    } else {
#pragma unroll
      for (int b = 0; b < tiles; ++b) s[b][1] = s[b][3] = 0.0f;
    }
    const int from = chained ? 4 * value_column_token(lane / 4) + lane % 4 : lane;
    const auto column = [&](float a, float b) {
      const uint32_t v = pack(a, b);
      return transpose(may_chain ? __shfl_sync(~0u, v, from) : v);
    };
#pragma unroll
    for (int b = 0; b < tiles; ++b) p[b][0] = column(s[b][0], s[b][1]), p[b][1] = column(s[b][2], s[b][3]);
  }

  // Scores of a packed key part, times `factor` of a column. `groups`: of tokens.
  template <int bits, int groups>
  __device__ __forceinline__ void packed_scores(const uint8_t* part, const uint2* query, int exponent, const float (&factor)[2],
                                                bool wide, float (&s)[kFields][4], int key_tiles, int lane) {
    constexpr int kGroupFields = kFields / groups;
    const int tiles = thin ? key_tiles : kTiles, width = thin ? 16 * key_tiles : dim;
    const uint32_t shrink = power_half(-exponent);
    const uint8_t* codes = part + kHeaderBytes;
    const uint8_t* meta = codes + code_bytes(bits, width) + lane % 4 * 16;
    float sums[groups][4] = {};  // rows 0..7 sum query times midpoint, rows 8..15 query times scale
#pragma unroll
    for (int f = 0; f < kFields; ++f)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[f][i] = 0.0f;
#pragma unroll(bits == 8 ? 1 : 2)
    for (int c = 0; c < tiles; ++c) {
      const uint2 q = query[c * 32 + lane];
      uint32_t w[block_words(bits)];
      load_words<bits>(codes + c * block_bytes(bits), lane, w);
#pragma unroll
      for (int g = 0; g < groups; ++g) {
        const uint4 m = *reinterpret_cast<const uint4*>(meta + g * (width * 4) + c * 64);
        const uint32_t rows[4] = {m.z, m.x, m.w, m.y};
        mma(sums[g], rows, q.x, q.y);
        const uint32_t q0 = multiply(q.x, multiply(m.x, shrink)), q1 = multiply(q.y, multiply(m.y, shrink));
#pragma unroll
        for (int f = g * kGroupFields; f < (g + 1) * kGroupFields; ++f) {
          uint32_t a[4];
          unpack<bits>(w, f, a);
          mma(s[f], a, q0, q1);
        }
      }
    }
    const float lifted = power(24 - kQueryLift + exponent), plain = power(-kQueryLift);
    const auto finish = [&](const int column) {
#pragma unroll
      for (int f = 0; f < kFields; ++f) {
        const float(&sum)[4] = sums[f / kGroupFields];
        const float start = (sum[column] - code_centre_of(bits) * sum[column + 2]) * (factor[column] * plain);
        const float unit = factor[column] * lifted * power(-field_shift(bits, f));
#pragma unroll
        for (int i = column; i < 4; i += 2) s[f][i] = fmaf(s[f][i], unit, start);
      }
    };
    finish(0);
    if (wide) finish(1);
  }

  // Adds weights times a packed value part. `at_once` channel tiles, of one group, are chains of mma side by side.
  template <int bits, int at_once>
  __device__ __forceinline__ void packed_values(const uint8_t* part, const Stage& stage, int exponent,
                                                const uint32_t (&p)[kFields][2], int lane) {
    constexpr int kWords = block_words(bits) < 4 ? 2 : bits == 3 ? 6 : 4;  // that hold some fields whole
    constexpr int kPieces = block_words(bits) / kWords, kPieceFields = kFields / kPieces;
    const uint8_t* const meta = part + code_bytes(bits, dim) + lane % 4 * 16;
    const int row = lane / 4;
    const uint8_t* const mine = meta + min(row, stage.value_groups - 1) * (kPageTokens * 4);
    float sums[4] = {};
    uint32_t b[kFields][2];
#pragma unroll
    for (int c = 0; c < kTiles; c += at_once) {
      if (c == 0 || (16 * c & ((1 << stage.value_group_shift) - 1)) == 0) {
        const uint8_t* const scales = meta + (16 * c >> stage.value_group_shift) * (kPageTokens * 4);
#pragma unroll
        for (int f = 0; f < kFields; ++f) {
          const uint2 v = *reinterpret_cast<const uint2*>(scales + f * 64);
          const uint32_t shrink = power_half_from_24(1 - field_shift(bits, f) - exponent);
          b[f][0] = multiply(p[f][0], multiply(v.x, shrink));
          b[f][1] = multiply(p[f][1], multiply(v.y, shrink));
        }
      }
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        uint32_t w[at_once][kWords];
#pragma unroll
        for (int j = 0; j < at_once; ++j) {
          if (c + j >= kTiles) break;
          load_piece(part + (c + j) * block_bytes(bits) + 512 * piece, lane, w[j]);
        }
#pragma unroll
        for (int f = piece * kPieceFields; f < (piece + 1) * kPieceFields; ++f) {
          if (c == 0) {
            const uint4 m = *reinterpret_cast<const uint4*>(mine + f * 64);
            const uint32_t rows[4] = {row == kSumRow ? kOnes : m.z, m.x, row == kSumRow ? kOnes : m.w, m.y};
            mma(sums, rows, p[f][0], p[f][1]);
          }
#pragma unroll
          for (int j = 0; j < at_once; ++j) {
            if (c + j >= kTiles) break;
            uint32_t a[4];
            unpack_piece<bits>(w[j], f, a);
            mma(acc[c + j], a, b[f][0], b[f][1]);
          }
        }
      }
    }
    const float unit = power(-exponent);
#pragma unroll
    for (int i = 0; i < 4; ++i) side[i] = fmaf(sums[i], unit, side[i]);
  }

  // A quarter of an open page, two token tiles: fp16 rows straight from global memory.
  __device__ void open_scores(const __half* keys, int live, int quarter, const uint2* query, const float (&factor)[2],
                              float (&s)[2][4], int lane) {
    const int row = 32 * quarter + lane / 4, column = 2 * (lane % 4);
    const auto load = [&](int token, int channel) {
      return token < live ? *reinterpret_cast<const uint32_t*>(keys + token * dim + channel) : 0u;
    };
    constexpr int kAhead = kTiles < 8 ? 2 : 4;  // tiles whose loads stand side by side; with more, registers spill
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[j][i] = 0.0f;
#pragma unroll kAhead
    for (int f = 0; f < kTiles; ++f) {
      const int channel = 16 * f + column;
      const uint2 q = query[f * 32 + lane];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int token = row + 16 * j;
        const uint32_t a[4] = {load(token, channel), load(token + 8, channel), load(token, channel + 8),
                               load(token + 8, channel + 8)};
        mma(s[j], a, q.x, q.y);
      }
    }
    const float plain = power(-kQueryLift);
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[j][i] *= factor[i & 1] * plain;
  }

  __device__ void open_values(const __half* values, int live, int quarter, const uint32_t (&p)[2][2], int lane) {
    const int row = 32 * quarter + lane / 4, column = 2 * (lane % 4);
    const auto load = [&](int token, int channel) {
      return transpose(token < live ? *reinterpret_cast<const uint32_t*>(values + token * dim + channel) : 0u);
    };
    add_sum(p, lane);
#pragma unroll
    for (int f = 0; f < kTiles; ++f) {
      float part[4] = {};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int token = row + 16 * j, channel = 16 * f + column;
        const uint32_t a[4] = {load(token, channel), load(token, channel + 8), load(token + 8, channel),
                               load(token + 8, channel + 8)};
        mma(part, a, p[j][0], p[j][1]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[f][i] = fmaf(part[i], power(-kCodeLift), acc[f][i]);
    }
  }

  // The same of a page of 8-bit rows, whose quarter is a chunk of each block: numbers are made in registers.
  __device__ void coded_scores(const uint8_t* part, const SideShape& side, int quarter, const uint2* query,
                               const float (&factor)[2], float (&s)[2][4], int lane) {
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[j][i] = 0.0f;
    each_quarter_tile<Operand::kKeysPerToken>(part, side, quarter, lane, [&](int c, int j, const uint32_t(&a)[4]) {
      const uint2 q = query[c * 32 + lane];
      mma(s[j], a, q.x, q.y);
    });
    const float plain = power(-kQueryLift);
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[j][i] *= factor[i & 1] * plain;
  }

  __device__ void coded_values(const uint8_t* part, const SideShape& side, int live, int quarter, const uint32_t (&p)[2][2],
                               int lane) {
    add_sum(p, lane);
    float sums[4];
    each_quarter_tile<Operand::kValues>(part, side, quarter, lane, [&](int c, int j, uint32_t(&a)[4]) {
      mask_tokens(a, 32 * quarter + 16 * j, live, lane);
      if (j == 0) sums[0] = sums[1] = sums[2] = sums[3] = 0.0f;
      mma(sums, a, p[j][0], p[j][1]);
      if (j == 0) return;
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[c][i] = fmaf(sums[i], power(-kCodeLift), acc[c][i]);
    });
  }

  // Adds to the sums of weights, where no product with midpoints does.
  template <int tiles>
  __device__ void add_sum(const uint32_t (&p)[tiles][2], int lane) {
    const uint32_t ones = lane / 4 == kSumRow ? kOnes : 0u, rows[4] = {ones, 0u, ones, 0u};
#pragma unroll
    for (int j = 0; j < tiles; ++j) mma(side, rows, p[j][0], p[j][1]);
  }

  // Of columns: the sum of weights, and what the codes' midpoints of a group and the centre of `bits` give.
  __device__ float sum_of(int column, int lane) const { return __shfl_sync(~0u, side[column], 4 * kSumRow + lane % 4); }
  __device__ float zero_of(int column, int group, int bits, int lane) const {
    return __shfl_sync(~0u, side[column] - code_centre_of(bits) * side[column + 2], 4 * group + lane % 4);
  }

  static constexpr int kCodeLift = 23;

 private:
  // Calls tile(channel tile, token tile of the quarter, operand A).
  template <Operand what, class Tile>
  __device__ void each_quarter_tile(const uint8_t* part, const SideShape& side, int quarter, int lane, const Tile& tile) {
    constexpr int kAhead = kTiles < 8 ? 2 : 4;  // as of rows
    LaneScales<what> scales[2] = {{part + side.meta(), side, lane}, {part + side.meta(), side, lane}};
    const auto* const codes = reinterpret_cast<const uint4*>(part + 512 * quarter) + lane;
    static_assert(kTiles % kAhead == 0);
#pragma unroll
    for (int first = 0; first < kTiles; first += kAhead) {
      uint4 words[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) words[i] = __ldg(codes + (first + i) * (block_bytes(8) / 16));
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int c = first + i;
        const uint32_t w[block_words(8)] = {words[i].x, words[i].y, words[i].z, words[i].w};
        const bool new_group = (16 * c & (side.group - 1)) == 0;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if (new_group) scales[j].load(static_cast<unsigned>(32 * quarter + 16 * j), static_cast<unsigned>(16 * c), true);
          uint32_t a[4];
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            a[r] = bits_of(__hfma2(scales[j].scale[r], centred_codes<8>(w, r, j), scales[j].mid[r]));
          }
          tile(c, j, a);
        }
      }
    }
  }
};

// Calls body with a width as constant.
template <bool trellis, class Body>
__device__ __forceinline__ void with_code_width(int width, const Body& body) {
  if constexpr (trellis) {
    if (TrellisWidths::visit(width, body)) return;
  }
  CodeWidths::visit(width, body);
}

// `thin`: all pages are sealed ones of the list's chosen key channels. `trellis`: a side or both are trellis codes.
template <int dim, int most_warps, bool thin = false, bool trellis = false>
__global__ void __launch_bounds__(32 * most_warps, 1) attend_kernel(const __grid_constant__ DecodeArguments arguments) {
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ float row_factor[kRows];
  __shared__ kvmix_cuda_item item;  // read from here where it is needed: registers decide
  __shared__ int last, present;     // present: warps with work
  const AttendArguments& args = arguments.attend;
  const Stage& stage = arguments.stage;
  constexpr int kTiles = dim / 16, kMergeRow = merge_row(dim);
  // The compiler is told that all lanes have the same warp: what follows of that are uniform registers, which copies want.
  const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
  const kvmix_cuda_item mine = args.items[blockIdx.x / arguments.row_blocks];
  if (mine.sequence < 0) return;
  // Rows are dealt out to the blocks of an item evenly, whole.
  const int all_rows = args.group * args.q_tokens, block = static_cast<int>(blockIdx.x) % arguments.row_blocks;
  const int row0 = all_rows * block / arguments.row_blocks, rows = all_rows * (block + 1) / arguments.row_blocks - row0;
  // Up to four query rows stand in the even columns: half the softmax.
  const bool wide = rows > kRows / 2;
  uint2* const query = reinterpret_cast<uint2*>(shared);
  uint8_t* const rings = shared + query_bytes(dim);
  uint8_t* const ring = rings + warp * stage.ring;
  PageCopies copies(stage, ring, lane, warp, mine.evict_first != 0);
  // Of many short blocks warps without a page leave; four stay for what all of a block do.
  const int all_warps = static_cast<int>(blockDim.x) / 32;
  const int warps = most_warps <= kFewWarps ? all_warps : min(all_warps, max(kWarps, mine.page_end - mine.page_begin));
  if (warp >= warps) return;
  if (threadIdx.x == 0) item = mine, present = warps;
  const auto row_offset = [&](const kvmix_cuda_item& of, int row) {
    const int token = (row0 + row) / args.group, head = of.kv_head * args.group + (row0 + row) % args.group;
    return (static_cast<int64_t>(of.sequence) * args.q_tokens + token) * (args.kv_heads * args.group) + head;
  };

  const int key_width = thin ? arguments.thin.width : dim;
  // Pairs of channels lane, lane + 32, ...
  constexpr int kPairs = (dim + 63) / 64;
  float2 x[kPairs];
  const auto load_row = [&](int row) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int channel = 2 * lane + 64 * i;
      if constexpr (thin) {
        x[i] = make_float2(0.0f, 0.0f);
        if (row >= rows || channel >= key_width) continue;
        const int64_t from = row_offset(mine, row) * dim;
        const uint8_t* const chosen = arguments.thin.of(mine, args.kv_heads) + channel;
        x[i] = make_float2(load_query(args, from + chosen[0]), load_query(args, from + chosen[1]));
        continue;
      }
      x[i] =
          row < rows && channel < dim ? load_query_pair(args, row_offset(mine, row) * dim + channel) : make_float2(0.0f, 0.0f);
    }
  };
  if (!args.overlapped) load_row(warp);
  uint32_t tables = 0;  // addresses in shared memory
  if constexpr (trellis) {
    constexpr uint32_t kStep = kLevelTableBytes;
    tables = (shared_address(rings) + blockDim.x / 32 * static_cast<uint32_t>(stage.ring) + kStep - 1) / kStep * kStep;
    uint8_t* const at = shared + (tables - shared_address(shared));
    if (is_trellis_width(stage.key_bits)) make_tables(code_bits(stage.key_bits), warps, at);
    if (is_trellis_width(stage.value_bits) && stage.value_bits != stage.key_bits)
      make_tables(code_bits(stage.value_bits), warps, at + stage.value_table);
  }
  // -1 past the end, as of an open page: nothing to copy.
  const auto page_id = [&](const kvmix_cuda_item& of, int page) {
    return page < of.page_end ? args.page_table[of.sequence * args.page_table_stride + page] : -1;
  };
  const auto fetch = [&](const kvmix_cuda_item& of, int32_t id, bool keys) {
    const uint8_t* const record = args.records + id * args.record_page_stride + of.kv_head * args.record_head_stride;
    copies.start(id >= 0 ? record : nullptr, keys);
  };
  int page = mine.page_begin + warp;
  int32_t id = page_id(mine, page), next = page_id(mine, page + warps);
  fetch(mine, id, true);
  fetch(mine, id, false);
  // Ids, in search of open pages.
  const int32_t here = !thin && mine.page_begin + lane < mine.page_end ? page_id(mine, mine.page_begin + lane) : 0;

  if (args.overlapped) {
    wait_for_launch_before();
    load_row(warp);
  }
  let_next_launch_begin();
  store_new_rows(args, mine, dim, 32 * warps);
  // Query rows, scaled by a power of two to at most 2^kQueryLift, in fragment order.
  for (int row = warp; row < (wide ? kRows : kRows / 2); row += warps) {
    if (row != warp) load_row(row);
    float best = 0.0f;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) best = fmaxf(best, fmaxf(fabsf(x[i].x), fabsf(x[i].y)));
#pragma unroll
    for (int step = 1; step < 32; step *= 2) best = fmaxf(best, __shfl_xor_sync(~0u, best, step));
    const int exponent = best > 0.0f ? ilogbf(best) + 1 : 0;
    if (lane == 0) row_factor[row] = row < rows ? args.scale * power(exponent) : 0.0f;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int channel = 2 * lane + 64 * i, c = channel % 16, column = wide ? row : 2 * row;
      if (channel >= key_width) continue;
      uint32_t* const to = reinterpret_cast<uint32_t*>(query) + ((channel / 16) * 32 + column * 4 + (c % 8) / 2) * 2 + c / 8;
      *to = pack(x[i].x * power(kQueryLift - exponent), x[i].y * power(kQueryLift - exponent));
      if (!wide) to[4 * 2] = 0;  // the odd column
    }
  }
  __syncthreads();

  // Which of the positions from..to a column of this lane sees.
  const auto row_of = [&](int column) { return wide ? 2 * (lane % 4) + column : lane % 4; };
  const auto seen = [&](int column, int from, int to) {
    const int row = row0 + min(row_of(column), rows - 1);
    const int end = item.length - (args.q_tokens - 1 - row / args.group);
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
  unsigned open = thin ? 0u : __ballot_sync(~0u, here < 0);
  for (unsigned rest = open; warp < 4 && rest != 0; rest &= rest - 1) {
    const int at = __ffs(static_cast<int>(rest)) - 1, page = item.page_begin + at;
    const int live = live_tokens(page, first_token(page)) - 32 * warp;
    const uint8_t* keys = args.open_pages + static_cast<int64_t>(~__shfl_sync(~0u, here, at)) * args.open_page_stride +
                          item.kv_head * args.open_head_stride;
    if (!is_rows(args, page)) {
      for (int line = lane; live > 0 && line < 4 * kTiles; line += 32) {
        const int place = kHeaderBytes + line / 4 * block_bytes(8) + 512 * warp + line % 4 * 128;
        asm volatile("prefetch.global.L2 [%0];\n" ::"l"(keys + place));
        asm volatile("prefetch.global.L2 [%0];\n" ::"l"(keys + args.open.key_bytes() - kHeaderBytes + place));
      }
      continue;
    }
    keys += 32 * warp * dim * 2;
    for (int line = lane; line * 128 < min(live, 32) * dim * 2; line += 32) {
      asm volatile("prefetch.global.L2 [%0];\n" ::"l"(keys + line * 128));
      asm volatile("prefetch.global.L2 [%0];\n" ::"l"(keys + value_row(args, page) * dim * 2 + line * 128));
    }
  }
  const float factor[2] = {row_factor[row_of(0)], wide ? row_factor[row_of(1)] : 0.0f};
  using State = Warp<dim, most_warps, thin>;
  State state;
  state.reset();
  for (; page < item.page_end; page += present) {
    const int32_t after = page_id(item, page + 2 * present);
    if (id >= 0) {
      const int first = first_token(page), live = live_tokens(page, first);
      // All rows see the positions below length - (q_tokens - 1), and with a window those it leaves the newest.
      const bool masked = live < kPageTokens || first + kPageTokens > item.length - (args.q_tokens - 1) ||
                          (args.sliding_window > 0 && first < item.length - args.sliding_window);
      float s[kFields][4];
      uint32_t p[kFields][2];
      copies.wait(true);
      const int2 exponent = *reinterpret_cast<const int2*>(ring);
      with_code_width<trellis && !thin>(stage.key_bits, [&](auto bits) {
        if constexpr (is_trellis_width(bits.value)) {
          trellis_scores<dim, code_bits(bits.value)>(ring, {tables + static_cast<uint32_t>(4 * lane)}, query, factor, wide, s,
                                                     lane);
        } else {
          List<1, 2, 4>::visit(stage.key_groups, [&](auto groups) {
            state.template packed_scores<bits.value, groups.value>(ring, query, exponent.x, factor, wide, s, key_width / 16,
                                                                   lane);
          });
        }
      });
      __syncwarp();
      fetch(item, next, true);
      state.template softmax<trellis>(
          s, p, first, masked, [&](int column) { return seen(column, first, first + live); }, args.softcap, exponent.y, wide,
          lane, trellis && is_trellis_width(stage.value_bits));
      copies.wait(false);
      with_code_width<trellis>(stage.value_bits, [&](auto bits) {
        const uint8_t* const part = ring + stage.key_pitch + stage.value_shift;
        if constexpr (is_trellis_width(bits.value)) {
          trellis_values<dim, code_bits(bits.value)>(part, {tables + static_cast<uint32_t>(4 * lane + stage.value_table)},
                                                     exponent.y, p, state, lane);
        } else if (stage.value_group_shift > 5) {
          state.template packed_values<bits.value, State::kValueTiles>(part, stage, exponent.y, p, lane);
        } else {
          state.template packed_values<bits.value, 2>(part, stage, exponent.y, p, lane);
        }
      });
      __syncwarp();
      fetch(item, next, false);
    } else {
      fetch(item, next, true);
      fetch(item, next, false);
    }
    id = next, next = after;
  }

  // Open pages, a quarter a warp: alone it would be the last of its block by far. Dealt out from the warp that has passed over
  // the page on, since those behind it had fewer of the others.
  int turn = 0;
  for (int base = item.page_begin; !thin && base < item.page_end; base += 32) {
    if (base != item.page_begin) open = __ballot_sync(~0u, base + lane < item.page_end && page_id(item, base + lane) < 0);
    for (; open != 0; open &= open - 1) {
      const int page = base + __ffs(static_cast<int>(open)) - 1;
      const int32_t open_id = ~page_id(item, page);
      const int first = first_token(page), live = live_tokens(page, first), quarters = (live + 31) / 32;
      turn = max(turn, page - item.page_begin);
      const int quarter = (warp - turn % present + present) % present, from = first + 32 * quarter;
      turn += quarters;
      if (quarter >= quarters) continue;
      const uint8_t* const record =
          args.open_pages + static_cast<int64_t>(open_id) * args.open_page_stride + item.kv_head * args.open_head_stride;
      const auto* const keys = reinterpret_cast<const __half*>(record);
      const bool rows_of_fp16 = is_rows(args, page);
      float s[2][4];
      uint32_t p[2][2];
      if (rows_of_fp16) {
        state.open_scores(keys, live, quarter, query, factor, s, lane);
      } else {
        state.coded_scores(record + kHeaderBytes, args.open.key(), quarter, query, factor, s, lane);
      }
      state.softmax(
          s, p, from, true, [&](int column) { return seen(column, from, min(first + live, from + 32)); }, args.softcap, 0, wide,
          lane);
      if (rows_of_fp16) {
        state.open_values(keys + value_row(args, page) * dim, live, quarter, p, lane);
      } else {
        state.coded_values(record + args.open.key_bytes(), args.open.value(), live, quarter, p, lane);
      }
    }
  }

  // Sums over the warps through shared memory.
  __syncthreads();
  float* const merged = reinterpret_cast<float*>(rings);  // [warp][row][kMergeRow], then [warp][row][2]
  float* const merged_sums = merged + present * kRows * kMergeRow;
#pragma unroll
  for (int column = 0; column < 2; ++column) {
    if (column == 1 && !wide) break;
    const int row = row_of(column);
    const float sum = state.sum_of(column, lane);
    float* const to = merged + (warp * kRows + row) * kMergeRow;
#pragma unroll
    for (int c = 0; c < kTiles; ++c) {
      const float zero = state.zero_of(column, 16 * c >> stage.value_group_shift, stage.value_bits, lane);
      if (row >= rows) continue;
      to[16 * c + lane / 4] = fmaf(state.acc[c][column], power(State::kCodeLift), zero);
      to[16 * c + lane / 4 + 8] = fmaf(state.acc[c][column + 2], power(State::kCodeLift), zero);
    }
    if (lane < 4 && row < rows) {
      merged_sums[(warp * kRows + row) * 2] = state.top[column];
      merged_sums[(warp * kRows + row) * 2 + 1] = sum;
    }
  }
  __syncthreads();
  const kvmix_cuda_item done = item;
  const RowSpan span{row0, rows, all_rows, done.ticket * arguments.row_blocks + block};
  write_rows<dim / 4>(
      args, done, 32 * present, present, span, reinterpret_cast<float2*>(rings), &last,
      [&](int row) { return row_offset(done, row); },
      [&](int w, int row) {
        const int at = w * kRows + row;
        return RowPart{make_float2(merged_sums[2 * at], merged_sums[2 * at + 1]),
                       reinterpret_cast<const float4*>(merged + at * kMergeRow)};
      });
}

}  // namespace kvmix::cuda
