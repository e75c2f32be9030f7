// Packed codes to fp16 numbers in the registers of operand A of mma.m16n8k16.
#pragma once

#include "attention/attend_cuda_common.cuh"

namespace kvmix::cuda {

__device__ inline __half2 half2_of(uint32_t v) { return reinterpret_cast<const __half2&>(v); }
__device__ inline uint32_t bits_of(__half2 v) { return reinterpret_cast<const uint32_t&>(v); }
__device__ inline __half2 low_half2(uint32_t a, uint32_t b) { return half2_of(__byte_perm(a, b, 0x5410)); }
__device__ inline __half2 high_half2(uint32_t a, uint32_t b) { return half2_of(__byte_perm(a, b, 0x7632)); }

// The two codes of a register less their centre, exact. A code that starts at bit k of a half, 1 <= k <= 10 - bits, counts from
// zero under the exponent of 2^(10 - k), where the centre, half a code, has a bit as well: one AND with OR and one subtraction.
template <int bits>
__device__ inline __half2 centred_codes(const uint32_t (&w)[block_words(bits)], int reg, int field) {
  constexpr int kAbove = bits <= 2 ? 9 : bits == 3 ? 8 : 7;  // one shift for what lies beyond the mantissa
  const CodePlace place = code_place(bits, reg, field);
  int k = 1;
  uint32_t code;
  if (bits == 3 && field == 7 && reg >= 2) {
    const uint32_t w1 = w[(place.word + 1) % block_words(bits)], w2 = w[(place.word + 2) % block_words(bits)];
    code = ((w[place.word] >> 14) & both(2)) | ((w1 >> 13) & both(4)) | ((w2 >> 12) & both(8));
  } else {
    const int shift = place.bit == 0 ? -1 : place.bit + bits <= 10 ? 0 : kAbove;
    k = place.bit - shift;
    const uint32_t word = shift < 0 ? w[place.word] << 1 : w[place.word] >> shift;
    code = word & (both((1u << bits) - 1) << k);
  }
  const uint32_t base = both(static_cast<uint32_t>(25 - k) << 10);
  return __hsub2(half2_of(code | base), half2_of(base | both(((1u << bits) - 1) << (k - 1))));
}

// Scales and midpoints of the pairs of a tile's registers. A tile lies in one group; what a lane needs of it lies together.
struct TileScales {
  __half2 scale[4], mid[4];
};
template <bool key>
__device__ inline TileScales load_scales(const uint8_t* meta, const SideShape& side, int token0, int channel0, int lane) {
  const int group_shift = 31 - __clz(side.group);
  TileScales t;
  if (!key) {
    const int slot = (channel0 >> group_shift) * kPageTokens * 2 + (token0 / 2 + 2 * (lane % 4)) * 4;
    const uint4 v = *reinterpret_cast<const uint4*>(meta + 2 * slot);
    t.scale[0] = t.scale[1] = low_half2(v.x, v.z), t.scale[2] = t.scale[3] = high_half2(v.x, v.z);
    t.mid[0] = t.mid[1] = low_half2(v.y, v.w), t.mid[2] = t.mid[3] = high_half2(v.y, v.w);
  } else if (side.per_token) {
    const int slot = (channel0 >> group_shift) * kPageTokens * 2 + (token0 / 2 + lane / 4) * 4;
    const uint2 v = *reinterpret_cast<const uint2*>(meta + 2 * slot);
    t.scale[0] = t.scale[2] = low_half2(v.x, v.x), t.scale[1] = t.scale[3] = high_half2(v.x, v.x);
    t.mid[0] = t.mid[2] = low_half2(v.y, v.y), t.mid[1] = t.mid[3] = high_half2(v.y, v.y);
  } else {
    const int slot = (token0 >> group_shift) * side.head_dim + (lane % 4) * (side.head_dim / 4) + channel0 / 4;
    const uint2 v = *reinterpret_cast<const uint2*>(meta + 2 * slot);
    const uint2 m = *reinterpret_cast<const uint2*>(meta + 2 * (slot + side.mid_step()));
    t.scale[0] = t.scale[1] = half2_of(v.x), t.scale[2] = t.scale[3] = half2_of(v.y);
    t.mid[0] = t.mid[1] = half2_of(m.x), t.mid[2] = t.mid[3] = half2_of(m.y);
  }
  return t;
}

// The tiles of one block of a side: store(first token, first channel, operand A) for each, keys with a row a token, values with
// a row a channel.
template <int dim, bool key, int bits, class Store>
__device__ inline void dequantise_block(const uint32_t (&w)[block_words(bits)], const uint8_t* meta, const SideShape& side,
                                        int block, int lane, const Store& store) {
  constexpr int kTiles = dim / 16;
  TileScales t;
#pragma unroll
  for (int field = 0; field < kFields; ++field) {
    const int tile = block * kFields + field, token0 = tile / kTiles * 16, channel0 = tile % kTiles * 16;
    uint32_t a[4];
    if constexpr (bits == 16) {
#pragma unroll
      for (int reg = 0; reg < 4; ++reg) a[reg] = w[code_place(16, reg, field).word];
    } else {
      if ((key && !side.per_token) || field == 0 || (channel0 & (side.group - 1)) == 0) {
        t = load_scales<key>(meta, side, token0, channel0, lane);
      }
#pragma unroll
      for (int reg = 0; reg < 4; ++reg) a[reg] = bits_of(__hfma2(t.scale[reg], centred_codes<bits>(w, reg, field), t.mid[reg]));
    }
    store(token0, channel0, a);
  }
}

// Calls body with the width of a side as a constant.
template <class Body>
__device__ inline void with_bits(int bits, const Body& body) {
  switch (bits) {
    case 1:
      return body(std::integral_constant<int, 1>{});
    case 2:
      return body(std::integral_constant<int, 2>{});
    case 3:
      return body(std::integral_constant<int, 3>{});
    case 4:
      return body(std::integral_constant<int, 4>{});
    case 8:
      return body(std::integral_constant<int, 8>{});
    default:
      return body(std::integral_constant<int, 16>{});
  }
}

}  // namespace kvmix::cuda
