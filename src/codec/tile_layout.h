// The order of codes inside an encoded tile of the uniform family: one constexpr map that the packer, the kernels and the tests
// share.
//
// A tile is seen as lanes x reduce: a dot product runs along `reduce` and leaves one number per lane.
//   key:   lanes = kPageTokens tokens, reduce = width channels    (scores = K q)
//   value: lanes = width channels,  reduce = kPageTokens tokens   (output = V^T p)
// A *unit* is 64 codes: 16 lanes x 4 reduce, code (lane, r) at byte 4 * (lane % 16) + r % 4 -- the operand order of an int8
// dot-product instruction (VNNI: 16 int32 lanes, 4 products each). Units are ordered by lane group (4 lane blocks of 16; the
// last group of a side may have fewer), then reduce quad, then lane block within the group.
// A *block* is 8 consecutive units = 512 codes = bits vectors of 64 bytes. Unit f of a block (its field) lives in the
// same bits of every byte, so one AND takes a field out of a vector in place:
//   1 bit:  vector 0, bit f
//   2 bits: vector f / 4, bits 2 (f % 4)
//   3 bits: f < 6: vector f / 2, bits 3 (f % 2). Bits 6..7 of vectors 0, 1, 2 make a 6-bit number (vector 0 lowest) that
//           holds fields 6 (low three bits) and 7
//   4 bits: vector f / 2, bits 4 (f % 2)
//   5 bits: the low 4 bits as for 4, then vector 4 as for 1 bit holds bit 4
//   6 bits: the low 4 bits as for 4, then vectors 4, 5 as for 2 bits hold bits 4..5
//   8 bits: vector f
//
// Before the codes stand the scales, fp16, then (with a zero point) the midpoints in the same order:
//   Axis::kChannel: [kPageTokens / group][width]       Axis::kToken: [ceil(width / group)][kPageTokens]
// padded together to 64 bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "kvmix/codec.h"

namespace kvmix {

inline constexpr int kUnitLanes = 16;
inline constexpr int kUnitReduce = 4;
inline constexpr int kUnitCodes = kUnitLanes * kUnitReduce;
inline constexpr int kLaneGroupBlocks = 4;
inline constexpr int kBlockUnits = 8;
inline constexpr int kVectorBytes = 64;

// Throws: a width that no layout is written for.
[[noreturn]] void unknown_code_bits(int bits);

// Returns f(std::integral_constant<int, bits>()) for a width of integer codes.
template <size_t kIndex = 0, class F>
constexpr auto with_code_bits(int bits, const F& f) -> decltype(f(std::integral_constant<int, 1>())) {
  if constexpr (kIndex == kCodecBits.size()) {
    unknown_code_bits(bits);
  } else if constexpr (kCodecBits[kIndex] == kF16Bits) {
    return with_code_bits<kIndex + 1>(bits, f);
  } else {
    if (bits == kCodecBits[kIndex]) return f(std::integral_constant<int, kCodecBits[kIndex]>());
    return with_code_bits<kIndex + 1>(bits, f);
  }
}

struct TileGeometry {
  int lanes, reduce;
};

constexpr TileGeometry tile_geometry(Side side, int width) {
  return side == Side::kKey ? TileGeometry{kPageTokens, width} : TileGeometry{width, kPageTokens};
}

constexpr int unit_index(const TileGeometry& g, int lane, int reduce) {
  const int lane_block = lane / kUnitLanes, lane_blocks = g.lanes / kUnitLanes, quads = g.reduce / kUnitReduce;
  const int group = lane_block / kLaneGroupBlocks, first = group * kLaneGroupBlocks;
  const int in_group = lane_blocks - first < kLaneGroupBlocks ? lane_blocks - first : kLaneGroupBlocks;
  return first * quads + (reduce / kUnitReduce) * in_group + (lane_block - first);
}

constexpr int byte_in_unit(int lane, int reduce) { return kUnitReduce * (lane % kUnitLanes) + reduce % kUnitReduce; }

// `codes` points at the first code byte of the tile.
constexpr int get_code(int bits, const uint8_t* codes, int unit, int byte) {
  const int f = unit % kBlockUnits;
  const uint8_t* v = codes + static_cast<ptrdiff_t>(unit / kBlockUnits) * bits * kVectorBytes + byte;
  const auto at = [v](int vector) { return static_cast<int>(v[vector * kVectorBytes]); };
  switch (bits) {
    case 1:
      return (at(0) >> f) & 1;
    case 2:
      return (at(f / 4) >> (2 * (f % 4))) & 3;
    case 3: {
      if (f < 6) return (at(f / 2) >> (3 * (f % 2))) & 7;
      const int rest = (at(0) >> 6) | ((at(1) >> 6) << 2) | ((at(2) >> 6) << 4);
      return (rest >> (3 * (f - 6))) & 7;
    }
    case 4:
      return (at(f / 2) >> (4 * (f % 2))) & 15;
    case 5:
      return ((at(f / 2) >> (4 * (f % 2))) & 15) | (((at(4) >> f) & 1) << 4);
    case 6:
      return ((at(f / 2) >> (4 * (f % 2))) & 15) | (((at(4 + f / 4) >> (2 * (f % 4))) & 3) << 4);
    case 8:
      return at(f);
    default:
      unknown_code_bits(bits);
  }
}

// ORs a code into zeroed bytes.
constexpr void put_code(int bits, uint8_t* codes, int unit, int byte, int code) {
  const int f = unit % kBlockUnits;
  uint8_t* v = codes + static_cast<ptrdiff_t>(unit / kBlockUnits) * bits * kVectorBytes + byte;
  const auto put = [v](int vector, int value) {
    v[vector * kVectorBytes] = static_cast<uint8_t>(v[vector * kVectorBytes] | value);
  };
  switch (bits) {
    case 1:
      put(0, code << f);
      break;
    case 2:
      put(f / 4, code << (2 * (f % 4)));
      break;
    case 3:
      if (f < 6) {
        put(f / 2, code << (3 * (f % 2)));
      } else {
        const int rest = code << (3 * (f - 6));
        put(0, (rest & 3) << 6);
        put(1, ((rest >> 2) & 3) << 6);
        put(2, ((rest >> 4) & 3) << 6);
      }
      break;
    case 4:
      put(f / 2, code << (4 * (f % 2)));
      break;
    case 5:
      put(f / 2, (code & 15) << (4 * (f % 2)));
      put(4, (code >> 4) << f);
      break;
    case 6:
      put(f / 2, (code & 15) << (4 * (f % 2)));
      put(4 + f / 4, (code >> 4) << (2 * (f % 4)));
      break;
    case 8:
      put(f, code);
      break;
    default:
      unknown_code_bits(bits);
  }
}

constexpr int scale_groups(const CodecSpec& s, int width) {
  return s.axis == Axis::kChannel ? kPageTokens / s.group : (width + s.group - 1) / s.group;
}
// Number of scales in a tile.
constexpr int scale_count(const CodecSpec& s, int width) {
  return scale_groups(s, width) * (s.axis == Axis::kChannel ? width : kPageTokens);
}
// Index of the scale of (token, channel).
constexpr int scale_index(const CodecSpec& s, int width, int token, int channel) {
  return s.axis == Axis::kChannel ? (token / s.group) * width + channel : (channel / s.group) * kPageTokens + token;
}

// Bytes of the scales and midpoints of a tile, and of all of it.
constexpr size_t uniform_scale_bytes(const CodecSpec& s, int width) {
  if (s.is_f16()) return 0;
  const auto values = static_cast<size_t>(scale_count(s, width)) * (s.zero_point ? 2 : 1);
  return (values * sizeof(uint16_t) + kVectorBytes - 1) / kVectorBytes * kVectorBytes;
}
constexpr size_t uniform_bytes(const CodecSpec& s, int width) {
  return uniform_scale_bytes(s, width) +
         static_cast<size_t>(kPageTokens) * static_cast<size_t>(width) * static_cast<size_t>(s.bits) / 8;
}

// Of tiles that are filled token by token: scales belong to a token and codes are whole bytes. Their record: fp16 scales
// [ceil(width / group)], with a zero point as many midpoints, then `width` codes, a byte each.
inline constexpr int kRowBits = 8;
constexpr bool uniform_takes_rows(const CodecSpec& s) {
  return s.is_uniform() && s.bits == kRowBits && s.axis == Axis::kToken && s.fit == Fit::kMinMax;
}
constexpr size_t uniform_record_bytes(const CodecSpec& s, int width) {
  return static_cast<size_t>(scale_groups(s, width)) * (s.zero_point ? 2 : 1) * sizeof(uint16_t) + static_cast<size_t>(width);
}

}  // namespace kvmix
