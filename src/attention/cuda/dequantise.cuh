// Packed codes to fp16 numbers in the registers of operand A of mma.m16n8k16.
#pragma once

#include "attention/cuda/arguments.cuh"
#include "codec/cuda/format.h"
#include "codec/cuda/words.cuh"

namespace kvmix::cuda {

__device__ inline uint32_t bits_of(__half2 v) { return reinterpret_cast<const uint32_t&>(v); }

// The lane's number, where what follows from it shall not be kept in registers from one use to the next.
__device__ inline int lane_again() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;\n" : "=r"(lane));
  return lane;
}

// Codes less their centre, exact. A code that starts at bit k of a half, 1 <= k <= 10 - bits, counts from zero under the
// exponent of 2^(10 - k), where the centre, half a code, has a bit as well: one AND with OR and one subtraction.
__device__ inline __half2 less_centre(uint32_t word, uint32_t mask, int k, int bits) {
  const uint32_t base = both(static_cast<uint32_t>(25 - k) << 10);
  uint32_t code;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;\n" : "=r"(code) : "r"(word), "r"(mask), "r"(base));  // (word & mask) | base, in one
  return __hsub2(half2_of(code), half2_of(base | both(((1u << bits) - 1) << (k - 1))));
}
// The same for the two codes of a register.
template <int bits>
__device__ inline __half2 centred_codes(const uint32_t (&w)[block_words(bits)], int reg, int field) {
  constexpr int kAbove = bits <= 2 ? 9 : bits == 3 ? 8 : 7;  // one shift for what lies beyond the mantissa
  const CodePlace place = code_place(bits, reg, field);
  if (bits == 3 && field == 7 && reg >= 2) {
    const uint32_t w1 = w[(place.word + 1) % block_words(bits)], w2 = w[(place.word + 2) % block_words(bits)];
    return less_centre(((w[place.word] >> 14) & both(2)) | ((w1 >> 13) & both(4)) | ((w2 >> 12) & both(8)), both(14), 1, bits);
  }
  const int shift = place.bit == 0 ? -1 : place.bit + bits <= 10 ? 0 : kAbove, k = place.bit - shift;
  const uint32_t word = shift < 0 ? w[place.word] << 1 : w[place.word] >> shift;
  return less_centre(word, both((1u << bits) - 1) << k, k, bits);
}

// A side as its kernel sees it: keys have a row a token, values a row a channel in operand A.
enum class Operand { kKeys, kKeysPerToken, kValues };

// Scales and midpoints of the pairs of a tile's registers; a tile lies in one group.
template <Operand what>
class LaneScales {
 public:
  __half2 scale[4], mid[4];

  __device__ LaneScales(const uint8_t* meta, const SideShape& side, int lane)
      : meta_(meta + (what == Operand::kKeysPerToken ? lane / 8 : lane % 4) * 16),
        mine_(lane / 4 % 2 == 0 ? 0x1010 : 0x3232),
        shift_(5 + (side.group >= 64) + (side.group >= 128)),
        group_bytes_(static_cast<unsigned>(2 * side.group_halves())) {}

  // Of a tile of a block whose first tile was loaded; with a scale per channel only where a group of tokens begins.
  __device__ void load(unsigned token0, unsigned channel0, bool first) {
    if constexpr (what == Operand::kKeys) {
      if (!first && (token0 & ((1u << shift_) - 1)) != 0) return;
    }
    const uint8_t* const from = what == Operand::kKeys ? meta_ + (token0 >> shift_) * group_bytes_ + channel0 * 4
                                                       : meta_ + (channel0 >> shift_) * group_bytes_ + token0 * 4;
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(from));
    if constexpr (what == Operand::kKeysPerToken) {
      // Rows are tokens lane / 4 and lane / 4 + 8, one scale for both columns.
      const auto own = [&](uint32_t pair) { return half2_of(__byte_perm(pair, 0, mine_)); };
      scale[0] = scale[2] = own(v.x), scale[1] = scale[3] = own(v.y);
      mid[0] = mid[2] = own(v.z), mid[1] = mid[3] = own(v.w);
    } else {
      scale[0] = scale[1] = half2_of(v.x), scale[2] = scale[3] = half2_of(v.y);
      mid[0] = mid[1] = half2_of(v.z), mid[2] = mid[3] = half2_of(v.w);
    }
  }

 private:
  const uint8_t* meta_;
  unsigned mine_;
  int shift_;
  unsigned group_bytes_;
};

// Tiles `first` to first + count - 1 of one block of a side: store(first token, first channel, operand A) for each.
template <Operand what, int bits, int first, int count, class Store>
__device__ inline void dequantise_block(const uint32_t (&w)[block_words(bits)], LaneScales<what>& scales, unsigned block,
                                        const Store& store) {
#pragma unroll
  for (unsigned field = first; field < first + count; ++field) {
    const unsigned token0 = 16 * field, channel0 = 16 * block;
    uint32_t a[4];
    scales.load(token0, channel0, field == first);
#pragma unroll
    for (int reg = 0; reg < 4; ++reg) {
      a[reg] = bits_of(__hfma2(scales.scale[reg], centred_codes<bits>(w, reg, static_cast<int>(field)), scales.mid[reg]));
    }
    store(token0, channel0, a);
  }
}

// The tiles of one fp16 block, one after the other for want of registers.
template <int first, int count, class Store>
__device__ inline void copy_block(const uint8_t* codes, unsigned block, int lane, const Store& store) {
#pragma unroll
  for (unsigned field = first; field < first + count; ++field) {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(codes + block * block_bytes(16) + 512 * field) + lane);
    uint32_t a[4] = {v.x, v.y, v.z, v.w};
    store(16 * field, 16 * block, a);
  }
}

// Operand A of values without the tokens from `live` on, which may be anything; `token0` is the tile's first.
__device__ inline void mask_tokens(uint32_t (&a)[4], int token0, int live, int lane) {
#pragma unroll
  for (int reg = 0; reg < 4; ++reg) {
    const int token = token0 + 2 * (lane % 4) + reg / 2 * 8;
    if (token + 1 >= live) a[reg] &= token < live ? 0xffffu : 0u;
  }
}

// Calls body with what a side is and its width as constants; `open`: of an open page; `trellis`: it may have such codes.
template <bool key, bool open, bool trellis, class Body>
__device__ inline void with_format(const SideShape& side, const Body& body) {
  if constexpr (open) {
    constexpr Operand what = key ? Operand::kKeysPerToken : Operand::kValues;
    List<8, 16>::visit(side.bits, [&](auto bits) { body(std::integral_constant<Operand, what>{}, bits); });
    return;
  }
  const auto with_width = [&](auto what, auto widths) { widths.visit(side.bits, [&](auto bits) { body(what, bits); }); };
  constexpr std::integral_constant<Operand, key ? Operand::kKeys : Operand::kValues> what;
  if constexpr (trellis) {
    if (side.trellis()) return with_width(what, TrellisWidths{});
  }
  if constexpr (key) {
    if (side.per_token) return with_width(std::integral_constant<Operand, Operand::kKeysPerToken>{}, Widths{});
  }
  with_width(what, Widths{});
}

}  // namespace kvmix::cuda
