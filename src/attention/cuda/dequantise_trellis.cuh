// Trellis codes (codec/cuda/trellis_layout.h) to fp16 numbers in the registers of operand A of mma.m16n8k16, in the places that
// other codes have there: scale (level - 63.5) + offset, rounded once.
#pragma once

#include "attention/cuda/dequantise.cuh"
#include "codec/cuda/trellis_tables.cuh"

namespace kvmix::cuda {

// The 32 bits of a lane's stream that end before bit `end`, where the last `count` of them matter.
template <int count, int words>
__device__ inline uint32_t stream_bits(const uint32_t (&w)[words], int end) {
  const int word = (end - 1) / 32, after = 31 - (end - 1) % 32;
  return after + count > 32 ? __funnelshift_r(w[word], w[word == 0 ? 0 : word - 1], after) : w[word] >> after;
}

// Twice the level of the window in the low bits.
template <int bits>
__device__ inline uint32_t twice_level(uint32_t window, uint32_t mask = kLevels - 1) {
  const auto table = reinterpret_cast<uintptr_t>(kTrellisTables.twice[bits - kTrellisBits.front()]);
  return __ldg(reinterpret_cast<const uint8_t*>(table | (window & mask)));  // the table is aligned
}

inline constexpr uint32_t k512 = 0x6000, k512Bytes = 0x60606060;  // fp16, whose last place is a half; its upper byte
// level - 63.5 of two levels, of which `halves` has the doubles as the low bytes of halves; exact.
__device__ inline __half2 centred_levels(uint32_t halves) {
  return __hsub2(half2_of(halves), half2_of(both(k512 | static_cast<uint32_t>(2 * kLevelCentre))));
}

// Two scales, bytes `low` and `high` of a word.
__device__ inline __half2 scale_pair(uint32_t stored, int low, int high) {
  const auto scale = [&](int byte) { return trellis_scale_of(stored >> (8 * byte) & 0xffu); };
  return __floats2half2_rn(scale(low), scale(high));
}

// Two neighbouring channels' offsets, bytes `first` and `first` + 1 of a word; what fp16 does not hold is as large as it can
// be.
__device__ inline __half2 offset_pair(uint32_t stored, int first, float unit) {
  const auto offset = [&](int byte) {
    const float x = static_cast<float>(static_cast<int8_t>(stored >> (8 * byte))) * unit;
    return fminf(fmaxf(x, -65504.0f), 65504.0f);
  };
  return __floats2half2_rn(offset(first), offset(first + 1));
}

// Token tiles `first` to first + count - 1 of a block of keys, whose side starts at `part`: store(first token, first channel,
// operand A) for each. With the whole warp.
template <int bits, int first, int count, class Store>
__device__ inline void dequantise_trellis_keys(const uint32_t (&w)[2 * bits], const uint8_t* part, const SideShape& side,
                                               unsigned block, int lane, const Store& store) {
  static_assert(first % 4 == 0 && count % 4 == 0);  // of a piece
  constexpr int kPieceBits = kPieceCodes * bits;
  static_assert(kPieceBits >= 8 && kPieceBits + 8 <= 32);  // with the bits before it a piece fits a word
  const uint8_t* const meta = part + side.meta();
  const uint8_t* const offsets = meta + side.groups() * kPageTokens + block * 16 + lane % 4 * 4;
  const uint4 scales = __ldg(reinterpret_cast<const uint4*>(meta + block / (kTrellisGroup / 16) * kPageTokens + lane / 4 * 16));
  const uint32_t stored = __ldg(reinterpret_cast<const uint32_t*>(offsets));
  const float unit = trellis_key_unit(part);
  const __half2 offset[2] = {offset_pair(stored, 0, unit), offset_pair(stored, 2, unit)};
  const uint32_t scale_words[4] = {scales.x, scales.y, scales.z, scales.w};
#pragma unroll
  for (int quad = first / 4; quad < (first + count) / 4; ++quad) {
    uint32_t piece[4][2];  // of a register and half, behind the 8 bits before it
#pragma unroll
    for (int reg = 0; reg < 4; ++reg) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t mine = stream_bits<kPieceBits>(w, (key_piece(quad, reg, half) + 1) * kPieceBits);
        const uint32_t before = __shfl_up_sync(~0u, mine, 4);
        piece[reg][half] = (lane < 4 ? 0 : before << kPieceBits) | (mine & ((1u << kPieceBits) - 1));
      }
    }
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
      const int field = 4 * quad + tile, after = (3 - tile) * bits;
      const uint32_t pair = scale_words[field / 2];
      const __half2 scale[2] = {scale_pair(pair, field % 2 * 2, field % 2 * 2),
                                scale_pair(pair, field % 2 * 2 + 1, field % 2 * 2 + 1)};
      uint32_t a[4];
#pragma unroll
      for (int reg = 0; reg < 4; ++reg) {
        const uint32_t low = twice_level<bits>(piece[reg][0] >> after), high = twice_level<bits>(piece[reg][1] >> after);
        const __half2 level = centred_levels(low | (high << 16) | both(k512));
        a[reg] = bits_of(__hfma2(scale[reg % 2], level, offset[reg / 2]));
      }
      store(static_cast<unsigned>(16 * field), 16 * block, a);
    }
  }
}

// The same of values. Lane 4 c + j has tokens j, j + 4, j + 8 and j + 12 of a tile and channels c and c + 8: its tokens of
// operand A, 2 j and 2 j + 1 and those 8 further, are with lanes 2 j % 4 and 2 j % 4 + 1 of the four, of lower j the first and
// third, else the second and fourth.
template <int bits, int first, int count, class Store>
__device__ inline void dequantise_trellis_values(const uint32_t (&w)[2 * bits], const uint8_t* part, const SideShape& side,
                                                 unsigned block, int lane, const Store& store) {
  static_assert(first % 4 == 0 && count % 4 == 0);
  const int source = lane / 4 * 4 + lane % 2 * 2;  // the lane of token 2 j
  const uint32_t pick = lane % 4 < 2 ? 0x6240u : 0x7351u;
  const uint8_t* const scales =
      part + side.meta() + block / (kTrellisGroup / 16) * kPageTokens + lane % 2 * 2 * (kPageTokens / 4);
#pragma unroll
  for (int quad = first / 4; quad < (first + count) / 4; ++quad) {
    const uint4 s0 = __ldg(reinterpret_cast<const uint4*>(scales + 16 * quad));
    const uint4 s1 = __ldg(reinterpret_cast<const uint4*>(scales + kPageTokens / 4 + 16 * quad));
    const uint32_t even[4] = {s0.x, s0.y, s0.z, s0.w}, odd[4] = {s1.x, s1.y, s1.z, s1.w};
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
      const int field = 4 * quad + tile;
      const uint32_t stored = __byte_perm(even[tile], odd[tile], pick);
      const __half2 scale[2] = {scale_pair(stored, 0, 1), scale_pair(stored, 2, 3)};
      uint32_t a[4];
#pragma unroll
      for (int row = 0; row < 2; ++row) {  // channels c, c + 8
        uint32_t level[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int end = (4 * field + i + 1) * bits;  // of its chain, which has zeros before it
          level[i] = end < 8 ? twice_level<bits>(stream_bits<0>(w, row * 32 * bits + end), (1u << end) - 1)
                             : twice_level<bits>(stream_bits<8>(w, row * 32 * bits + end));
        }
        const uint32_t mine = level[0] | (level[1] << 8) | (level[2] << 16) | (level[3] << 24);
        const uint32_t at = __shfl_sync(~0u, mine, source), next = __shfl_sync(~0u, mine, source + 1);
        const uint32_t tokens = __byte_perm(at, next, pick);
        a[row] = bits_of(__hmul2(scale[0], centred_levels(__byte_perm(tokens, k512Bytes, 0x4140))));
        a[row + 2] = bits_of(__hmul2(scale[1], centred_levels(__byte_perm(tokens, k512Bytes, 0x4342))));
      }
      store(static_cast<unsigned>(16 * field), 16 * block, a);
    }
  }
}

// `bits`: a width of TrellisWidths.
template <Operand what, int bits, int first, int count, class Store>
__device__ inline void dequantise_trellis(const uint32_t (&w)[block_words(bits)], const uint8_t* part, const SideShape& side,
                                          unsigned block, int lane, const Store& store) {
  if constexpr (what == Operand::kValues) {
    dequantise_trellis_values<code_bits(bits), first, count>(w, part, side, block, lane, store);
  } else {
    dequantise_trellis_keys<code_bits(bits), first, count>(w, part, side, block, lane, store);
  }
}

}  // namespace kvmix::cuda
