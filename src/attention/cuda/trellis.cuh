// Trellis codes (codec/cuda/trellis_layout.h) in the decode kernel: to levels, and the products with them. Levels are whole
// numbers of 7 bits and go into operand A of mma.m16n8k16 as fp16 subnormals, as codes of 8 bits would:
//   score = scale_t sum_c q_c (level - 63.5) + unit sum_c q_c offset_c
//   out_c = sum_t p_t scale_t (level - 63.5)
// A level is found in shared memory, where every lane has a table of its own in a bank of its own: 32 lookups in one turn,
// where one table for all would take three and more. What binds is then a shift, a mask and a load for every code.
#pragma once

#include "attention/cuda/arguments.cuh"
#include "base/cuda/fragments.cuh"
#include "codec/cuda/format.h"
#include "codec/cuda/trellis_tables.cuh"
#include "codec/cuda/words.cuh"

namespace kvmix::cuda {

// The tables of a width, by all warps of a block: the level of window w for lane l at w * 128 + l * 4.
__device__ inline void make_tables(int bits, int warps, uint8_t* tables) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const uint2 mine =
      __ldg(reinterpret_cast<const uint2*>(kLevelTables.of[bits - kTrellisBits.front()].data()) + lane);  // of 8 windows
  for (int from = static_cast<int>(threadIdx.x) / 32; from < 32; from += warps) {
    const uint32_t words[2] = {__shfl_sync(~0u, mine.x, from), __shfl_sync(~0u, mine.y, from)};
#pragma unroll
    for (int i = 0; i < 8; ++i)
      reinterpret_cast<uint32_t*>(tables)[(from * 8 + i) * 32 + lane] = words[i / 4] >> (8 * (i % 4)) & 0xffu;
  }
}
inline constexpr int kWindowAt = 7;  // its lowest bit in a place in the tables
inline constexpr uint32_t kWindowMask = static_cast<uint32_t>(kLevels - 1) << kWindowAt;

// Levels by windows; `mine`: where the lane's table begins in shared memory, no bit of which is a window's, so that two
// instructions make an address.
struct Levels {
  uint32_t mine;
  // The window has its lowest bit kWindowAt - left bits up.
  __device__ __forceinline__ uint32_t at(uint32_t window, int left = 0) const {
    uint32_t address, level;
    if (left > 0) {  // a multiplication, as the units of shifts and masks are what is short
      asm("mad.lo.u32 %0, %1, %2, %3;\n" : "=r"(address) : "r"(window & (kWindowMask >> left)), "r"(1u << left), "r"(mine));
    } else {
      address = (window >> -left & kWindowMask) | mine;
    }
    asm volatile("ld.shared.u32 %0, [%1];\n" : "=r"(level) : "r"(address));
    return level;
  }
  // Of the two codes of a register.
  static __device__ __forceinline__ uint32_t pair(uint32_t low, uint32_t high) {
    uint32_t v;
    asm("mad.lo.u32 %0, %1, 65536, %2;\n" : "=r"(v) : "r"(high), "r"(low));
    return v;
  }
};

// The bits of a stream of `words` words from w[base] on, up to `end`, the last one lowest and `count` of them for sure. Zeros
// stand before the stream and behind it.
template <int all>
__device__ __forceinline__ uint32_t stream_bits(const uint32_t (&w)[all], int base, int words, int end, int count) {
  const int word = (end - 1) / 32 < words ? (end - 1) / 32 : words - 1, shift = 32 * (word + 1) - end;
  if (shift < 0) return w[base + word] << -shift;
  if (word > 0 && shift > 0 && end - count < 32 * word) return __funnelshift_r(w[base + word], w[base + word - 1], shift);
  return w[base + word] >> shift;
}
// A piece of keys behind what stands before it, its last bit lowest. `before`: the words of the lane that has that.
template <int bits>
__device__ __forceinline__ uint32_t key_bits(const uint32_t (&w)[2 * bits], const uint32_t (&before)[2 * bits], int piece) {
  constexpr int kBits = kPieceCodes * bits;
  const int begin = piece * kBits, end = begin + kBits;
  if constexpr (bits == 2 || bits == 4) {  // a byte or half a word
    const int word = begin / 32, at = 3 - (end - 1) % 32 / 8;
    return bits == 2 ? __byte_perm(w[word], before[word], static_cast<unsigned>(at | (4 + at) << 4))
                     : __byte_perm(w[word], before[word], at == 0 ? 0x5410 : 0x7632);
  } else {
    constexpr uint32_t kOwn = (1u << kBits) - 1;
    const uint32_t own = stream_bits(w, 0, 2 * bits, end, kBits);
    const uint32_t history = stream_bits(before, 0, 2 * bits, end + kBits, kBits + 8 - bits);
    return (own & kOwn) | (history & ~kOwn);
  }
}
// How far the window of code k of a piece is from kWindowAt.
__device__ constexpr int key_window(int bits, int k) { return kWindowAt - bits * (kPieceCodes - 1 - k); }
// The window of code i of a lane's chain of values, at kWindowAt.
template <int bits>
__device__ __forceinline__ uint32_t value_window(const uint32_t (&w)[2 * bits], int chain, int i) {
  return stream_bits(w, chain * bits, bits, (i + 1) * bits + kWindowAt, 8 + kWindowAt);
}

__device__ inline float scale_of_byte(uint32_t bytes, int i) { return trellis_scale_of(bytes >> (8 * i) & 0xffu); }
// Two of four scales; fp16 holds them as they are.
__device__ inline uint32_t scale_pair(uint32_t bytes, int i) {
  return pack(scale_of_byte(bytes, i), scale_of_byte(bytes, i + 1));
}
// Two of four signed bytes.
__device__ inline uint32_t signed_pair(uint32_t bytes, int i) {
  const uint32_t raised = __byte_perm(bytes ^ 0x80808080u, 0x64646464u, i == 0 ? 0x4140 : 0x4342);  // 1024 + 128 + byte
  const __half2 v = __hsub2(half2_of(raised), half2_of(both(0x6480)));
  return reinterpret_cast<const uint32_t&>(v);
}

// Scores of a packed key part, times `factor` of a column.
template <int dim, int bits>
__device__ __forceinline__ void trellis_scores(const uint8_t* part, const Levels& levels, const uint2* query,
                                               const float (&factor)[2], bool wide, float (&s)[kFields][4], int lane) {
  constexpr int kGroups = (dim + kTrellisGroup - 1) / kTrellisGroup, kGroupTiles = dim / 16 / kGroups;
  const uint8_t* const codes = part + kHeaderBytes;
  const uint8_t* const meta = codes + code_bytes(bits, dim);
  const auto* const offsets = reinterpret_cast<const uint32_t*>(meta + kGroups * kPageTokens) + lane % 4;
  const float unit = scale_of_byte(static_cast<uint32_t>(reinterpret_cast<const RecordHeader*>(part)->key_unit), 0);
  const float plain[2] = {factor[0] * power(-kQueryLift), factor[1] * power(-kQueryLift)};
  float sums[4] = {};  // rows 0..7 sum query times offset, rows 8..15 the query
  float sum_before[2] = {};
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    float acc[kFields][4];
#pragma unroll
    for (int f = 0; f < kFields; ++f)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[f][i] = 0.0f;
#pragma unroll 1
    for (int c = g * kGroupTiles; c < (g + 1) * kGroupTiles; ++c) {
      const uint2 q = query[c * 32 + lane];
      uint32_t w[2 * bits], before[2 * bits];
      load_words<bits>(codes + c * block_bytes(bits), lane, w);
      const uint32_t offset = offsets[4 * c];
      const uint32_t rows[4] = {signed_pair(offset, 0), kOnes, signed_pair(offset, 2), kOnes};
      mma(sums, rows, q.x, q.y);
#pragma unroll
      for (int i = 0; i < 2 * bits; ++i) {
        const uint32_t v = __shfl_up_sync(~0u, w[i], 4);
        before[i] = lane < 4 ? 0u : v;
      }
#pragma unroll
      for (int quad = 0; quad < 2; ++quad) {
        uint32_t a[kPieceCodes][4];
#pragma unroll
        for (int reg = 0; reg < 4; ++reg) {
          const uint32_t low = key_bits<bits>(w, before, key_piece(quad, reg, 0));
          const uint32_t high = key_bits<bits>(w, before, key_piece(quad, reg, 1));
#pragma unroll
          for (int k = 0; k < kPieceCodes; ++k) {
            const int left = key_window(bits, k);
            a[k][reg] = Levels::pair(levels.at(low, left), levels.at(high, left));
          }
        }
#pragma unroll
        for (int k = 0; k < kPieceCodes; ++k) mma(acc[quad * kPieceCodes + k], a[k], q.x, q.y);
      }
    }
    const uint4 four = *reinterpret_cast<const uint4*>(meta + g * kPageTokens + lane / 4 * 16);
    const uint32_t scales[4] = {four.x, four.y, four.z, four.w};
    const auto finish = [&](const int column) {
      const float whole = sums[column + 2];  // of all groups so far
      const float zero = -kLevelCentre * (whole - sum_before[column]);
      sum_before[column] = whole;
      const float start = unit * sums[column] * plain[column];
#pragma unroll
      for (int f = 0; f < kFields; ++f) {
#pragma unroll
        for (int i = column; i < 4; i += 2) {
          const float scale = scale_of_byte(scales[f / 2], f % 2 * 2 + (i >> 1)) * plain[column];
          const float part = fmaf(acc[f][i], power(24), zero) * scale;
          s[f][i] = g == 0 ? part : s[f][i] + part;
          if (g == kGroups - 1) s[f][i] += start;
        }
      }
    };
    finish(0);
    if (wide) finish(1);
  }
}

// Adds weights times a packed value part to a Warp's sums; weights stand in the order of value_column_token.
template <int dim, int bits, class State>
__device__ __forceinline__ void trellis_values(const uint8_t* part, const Levels& levels, int exponent,
                                               const uint32_t (&p)[kFields][2], State& state, int lane) {
  constexpr int kGroups = (dim + kTrellisGroup - 1) / kTrellisGroup, kGroupTiles = dim / 16 / kGroups;
  const uint8_t* const meta = part + code_bytes(bits, dim) + lane % 4 * 32;
  const int row = lane / 4;
  const uint32_t shrink = power_half_from_24(1 - exponent);
  const auto load_scales = [&](int group, uint32_t(&scales)[kFields]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 v = *reinterpret_cast<const uint4*>(meta + group * kPageTokens + 16 * i);
      scales[4 * i] = v.x, scales[4 * i + 1] = v.y, scales[4 * i + 2] = v.z, scales[4 * i + 3] = v.w;
    }
  };
  {
    float sums[4] = {};
    uint32_t scales[kFields];
    load_scales(min(row, kGroups - 1), scales);
#pragma unroll
    for (int f = 0; f < kFields; ++f) {
      const uint32_t ones = row == State::kSumRow ? kOnes : 0u;
      const uint32_t rows[4] = {ones, scale_pair(scales[f], 0), ones, scale_pair(scales[f], 2)};
      mma(sums, rows, p[f][0], p[f][1]);
    }
    const float unit = power(-exponent);
#pragma unroll
    for (int i = 0; i < 4; ++i) state.side[i] = fmaf(sums[i], unit, state.side[i]);
  }
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    uint32_t scales[kFields], b[kFields][2];
    load_scales(g, scales);
#pragma unroll
    for (int f = 0; f < kFields; ++f) {
      b[f][0] = multiply(p[f][0], multiply(scale_pair(scales[f], 0), shrink));
      b[f][1] = multiply(p[f][1], multiply(scale_pair(scales[f], 2), shrink));
    }
    // Rolled up: code of all tiles would not fit the caches of instructions.
#pragma unroll 1
    for (int c = g * kGroupTiles; c < (g + 1) * kGroupTiles; ++c) {
      uint32_t w[2 * bits];
      load_words<bits>(part + c * block_bytes(bits), lane, w);
      float sums[2][4] = {};
#pragma unroll
      for (int f = 0; f < kFields; ++f) {
        uint32_t a[4];
#pragma unroll
        for (int reg = 0; reg < 4; ++reg) {
          const int i = 4 * f + reg / 2 * 2;
          const uint32_t first = levels.at(value_window<bits>(w, reg % 2, i));
          a[reg] = Levels::pair(first, levels.at(value_window<bits>(w, reg % 2, i + 1)));
        }
        mma(sums[f % 2], a, b[f][0], b[f][1]);
      }
#pragma unroll
      for (int k = g * kGroupTiles; k < (g + 1) * kGroupTiles; ++k) {
        if (k == c) {
#pragma unroll
          for (int i = 0; i < 4; ++i) state.acc[k][i] += sums[0][i] + sums[1][i];
        }
      }
    }
  }
}

}  // namespace kvmix::cuda
