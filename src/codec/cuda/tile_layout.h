// The GPU's page record: one packed page of kPageTokens tokens of one KV head, keys then values, in the order of the fragments
// of mma.m16n8k16 with the codes as operand A (keys: row = token, column = channel; values: row = channel, column = token).
//
// A side is 16 x 16 tiles. A *block* is the 16 channels of a channel tile over the whole page: its eight token tiles are its
// fields. Blocks stand in a row, so head_dim is any multiple of 16. A block holds 32 lanes x 4
// registers x 8 fields x 2 halves. Register r and half h of lane l are element (row,
// column) of a tile. A lane's 2 * bits words hold word w at 16-byte chunk w / 4 of the block (512 bytes a chunk; a last chunk
// of two words takes 256), so that a warp reads a chunk with one vector load per lane. A code lies inside one half of a word at
// bit field_shift() of the half after at most one right shift of the word: read as fp16 it is the subnormal code * 2^shift *
// 2^-24, and shift depends on the field alone.
//   1 bit:   word r / 2: registers r even in fields 0..7, r odd in fields 8..15 (one shift by 8)
//   2 bits:  word r: bits 2 f; f >= 5 after a shift by 10
//   3 bits:  five codes a half at bits 0, 3, 6 and, after a shift by 9, 9 and 12; registers 2 and 3 of field 7 are bit 15 of
//   words
//            0..2 and 3..5
//   4 bits:  words r + 4 (f / 4): bits 4 (f % 4); f % 4 >= 2 after a shift by 8
//   8 bits:  words r + 4 (f / 2): bits 8 (f % 2)
//   16 bits: word r + 4 f, the fp16 numbers themselves, without scales
//
// Record: 16-byte header | key codes | key scales and midpoints | value codes | value scales and midpoints.
// Scales and midpoints of a group stand together, in an order that gives a lane those of its fragment with one load: for every
// 16 of them (channels of keys, tokens otherwise) four lanes' 2 j, 2 j + 1, 2 j + 8, 2 j + 9, scales first. Groups stand in a
// row. The header's exponents e are the smallest in [-14, 14] with every scale of the side <= 2^e. Keys of chosen channels are
// a side of fewer columns, whose number the header has.
//
// Trellis codes (codec/trellis_code.h) are a width of their own, kTrellis + bits; their bits lie as trellis_layout.h says, and
// behind them instead of scales and midpoints a byte of scale for each token, keys' with a byte of offset for each channel,
// which counts in units of the largest scale, in the header.
//
// An open page of 8-bit rows is a record too, with scales per token on both sides and nothing in its header: a token's codes
// and scales have places of their own, so rows are stored one by one. Slots without a token may hold anything there.
#pragma once

#include <cstdint>

#include "base/macros.h"
#include "kvmix/codec.h"

namespace kvmix::cuda {

inline constexpr int kFields = 8;  // of a block, token tiles of a page
static_assert(kFields * 16 == kPageTokens);
inline constexpr int kHeaderBytes = 16;

inline constexpr int kTrellis = 32;
KVMIX_HOST_DEVICE constexpr bool is_trellis_width(int width) { return width > kTrellis; }
// Bits of a code of a width.
KVMIX_HOST_DEVICE constexpr int code_bits(int width) { return is_trellis_width(width) ? width - kTrellis : width; }

struct RecordHeader {
  int32_t key_exponent, value_exponent;
  int32_t key_width;  // of keys of chosen channels; 0: all are there
  int32_t key_unit;   // of trellis keys: the largest scale, as stored; else 0
};

// The header's exponent for the largest scale of a side (finite, not negative).
KVMIX_HOST_DEVICE inline int scale_exponent(float largest) {
  const auto bits = static_cast<int>(float_to_bits(largest));
  const int e = ((bits + 0x7fffff) >> 23) - 127;  // rounded up to a power of two
  return e < -14 ? -14 : (e > 14 ? 14 : e);
}

// The cell of an element of a 16 x 16 operand-A tile.
struct FragmentCell {
  int lane, reg, half;
};
KVMIX_HOST_DEVICE constexpr FragmentCell fragment_cell(int row, int column) {
  return {(row % 8) * 4 + (column % 8) / 2, row / 8 + 2 * (column / 8), column % 2};
}

struct CodePlace {
  int word, bit;  // bit of the half, before any shift
};
KVMIX_HOST_DEVICE constexpr CodePlace code_place(int bits, int reg, int field) {
  switch (bits) {
    case 1:
      return {reg / 2, 8 * (reg % 2) + field};
    case 2:
      return {reg, 2 * field};
    case 3: {
      if (field >= 6) return field == 6 ? CodePlace{reg, 6} : reg < 2 ? CodePlace{4 + reg, 6} : CodePlace{3 * (reg - 2), 15};
      const int index = 4 * (field % 3) + reg, low = 3 * (field / 3);
      return {index % 6, index < 6 ? low : low + 9};
    }
    case 4:
      return {reg + 4 * (field / 4), 4 * (field % 4)};
    case 16:
      return {reg + 4 * field, 0};
    default:
      return {reg + 4 * (field / 2), 8 * (field % 2)};
  }
}

// Where bit `bit` of a code lies.
KVMIX_HOST_DEVICE constexpr CodePlace code_bit_place(int bits, int reg, int field, int bit) {
  const CodePlace place = code_place(bits, reg, field);
  if (bits == 3 && field == 7 && reg >= 2) return {place.word + bit, place.bit};
  return {place.word, place.bit + bit};
}

// The power of two that a field's codes carry once unpacked.
KVMIX_HOST_DEVICE constexpr int field_shift(int bits, int field) {
  switch (bits) {
    case 1:
      return field;
    case 2:
      return field < 5 ? 2 * field : 2 * (field - 5);
    case 3:
      return field < 6 ? 3 * (field / 3) : 6;
    case 4:
      return 4 * (field % 2);
    default:
      return 0;
  }
}

KVMIX_HOST_DEVICE constexpr int block_words(int bits) { return 2 * code_bits(bits); }  // per lane
KVMIX_HOST_DEVICE constexpr int block_bytes(int bits) { return 32 * 4 * block_words(bits); }
KVMIX_HOST_DEVICE constexpr int code_bytes(int bits, int head_dim) { return head_dim / 16 * block_bytes(bits); }

// Byte offset in a block of a lane's word.
KVMIX_HOST_DEVICE constexpr int word_offset(int bits, int lane, int word) {
  const int rest = block_words(bits) - 4 * (word / 4), width = rest < 4 ? rest : 4;
  return 512 * (word / 4) + 4 * (lane * width + word % 4);
}

// The block, lane, register, field and half of code (token, channel).
struct CodeCell {
  int block, field;
  FragmentCell at;
};
KVMIX_HOST_DEVICE constexpr CodeCell code_cell(bool key, int token, int channel) {
  const int t = token % 16, c = channel % 16;
  return {channel / 16, token / 16, key ? fragment_cell(t, c) : fragment_cell(c, t)};
}

// Index of the scale of channel or token i in its group; its midpoint is kMidStep further.
inline constexpr int kMidStep = 4;
KVMIX_HOST_DEVICE constexpr int scale_slot(int i) { return i / 16 * 32 + i % 8 / 2 * 8 + i % 16 / 8 * 2 + i % 2; }

// Where one side of a record lies; offsets from the side's start.
struct SideShape {
  int head_dim, bits, group;
  bool per_token;  // of trellis codes: values, which have no offsets

  KVMIX_HOST_DEVICE constexpr bool trellis() const { return is_trellis_width(bits); }
  KVMIX_HOST_DEVICE constexpr int groups() const {
    if (bits == 16) return 0;
    return per_token || trellis() ? (head_dim + group - 1) / group : kPageTokens / group;
  }
  KVMIX_HOST_DEVICE constexpr int meta() const { return code_bytes(bits, head_dim); }
  KVMIX_HOST_DEVICE constexpr int meta_bytes() const {
    if (trellis()) return groups() * kPageTokens + (per_token ? 0 : (head_dim + 63) / 64 * 64);
    return groups() * (per_token ? kPageTokens : head_dim) * 4;
  }
  KVMIX_HOST_DEVICE constexpr int bytes() const { return meta() + meta_bytes(); }
  KVMIX_HOST_DEVICE constexpr int group_halves() const { return 2 * (per_token ? kPageTokens : head_dim); }
  // Index, in halves from meta(), of the scale of (token, channel).
  KVMIX_HOST_DEVICE constexpr int scale_at(int token, int channel) const {
    return per_token ? channel / group * group_halves() + scale_slot(token)
                     : token / group * group_halves() + scale_slot(channel);
  }
};

struct RecordShape {
  int head_dim, key_bits, value_bits, key_group, value_group;
  bool key_per_token = false;

  // Of an open page: false where it is fp16 rows next to each other instead of a record.
  KVMIX_HOST_DEVICE constexpr bool has_codes() const { return key_bits != 16 || value_bits != 16; }
  KVMIX_HOST_DEVICE constexpr SideShape key() const { return {head_dim, key_bits, key_group, key_per_token}; }
  KVMIX_HOST_DEVICE constexpr SideShape value() const { return {head_dim, value_bits, value_group, true}; }
  KVMIX_HOST_DEVICE constexpr int key_groups() const { return key().groups(); }
  KVMIX_HOST_DEVICE constexpr int value_groups() const { return value().groups(); }
  KVMIX_HOST_DEVICE constexpr int key_bytes() const { return kHeaderBytes + key().bytes(); }
  KVMIX_HOST_DEVICE constexpr int bytes() const { return key_bytes() + value().bytes(); }
};

// A record of so many chosen key channels; 0: of all. Apart, since most kernels meet no such record.
struct ThinShape : RecordShape {
  int key_width = 0;

  KVMIX_HOST_DEVICE constexpr SideShape key() const {
    return {key_width > 0 ? key_width : head_dim, key_bits, key_group, key_per_token};
  }
  KVMIX_HOST_DEVICE constexpr int key_bytes() const { return kHeaderBytes + key().bytes(); }
  KVMIX_HOST_DEVICE constexpr int bytes() const { return key_bytes() + value().bytes(); }
};

}  // namespace kvmix::cuda
