// The GPU's page record: one packed page of kPageTokens tokens of one KV head, keys then values, in the order of the fragments
// of mma.m16n8k16 with the codes as operand A (keys: row = token, column = channel; values: row = channel, column = token).
//
// A *block* holds 16 tokens x 128 channels: 32 lanes x 4 registers x 8 fields x 2 halves. Register r and half h of lane l are
// element (row, column) of a 16 x 16 tile; the field is the tile's index along the channels. A lane's 2 * bits words hold word
// w at 16-byte chunk w / 4 of the block (512 bytes a chunk; a last chunk of two words takes 256), so that a warp reads a chunk
// with one vector load per lane. A code lies inside one half of a word at bit field_shift() of the half after at most one right
// shift of the word: read as fp16 it is the subnormal code * 2^shift * 2^-24, and shift depends on the field alone.
//   1 bit:  word r / 2: registers r even in fields 0..7, r odd in fields 8..15 (one shift by 8)
//   2 bits: word r: bits 2 f; f >= 5 after a shift by 10
//   4 bits: words r + 4 (f / 4): bits 4 (f % 4); f % 4 >= 2 after a shift by 8
//   8 bits: words r + 4 (f / 2): bits 8 (f % 2)
//
// Record: 16-byte header | key codes | key scales | key midpoints | value codes | value scales and midpoints.
// The header's exponents e are the smallest in [-14, 14] with every scale of the side <= 2^e.
#pragma once

#include <cstdint>

#include "base/macros.h"
#include "kvmix/codec.h"

namespace kvmix::cuda {

inline constexpr int kBlockTokens = 16, kBlockChannels = 128, kPageBlocks = kPageTokens / kBlockTokens;
inline constexpr int kHeaderBytes = 16;

struct RecordHeader {
  int32_t key_exponent, value_exponent;
  int32_t unused[2];
};

// The header's exponent for the largest scale of a side (finite, not negative).
KVMIX_HOST_DEVICE inline int scale_exponent(float largest) {
  int e = -14;
  for (float bound = 1.0f / 16384.0f; e < 14 && bound < largest; bound *= 2.0f) ++e;
  return e;
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
    case 4:
      return {reg + 4 * (field / 4), 4 * (field % 4)};
    default:
      return {reg + 4 * (field / 2), 8 * (field % 2)};
  }
}

// The power of two that a field's codes carry once unpacked.
KVMIX_HOST_DEVICE constexpr int field_shift(int bits, int field) {
  switch (bits) {
    case 1:
      return field;
    case 2:
      return field < 5 ? 2 * field : 2 * (field - 5);
    case 4:
      return 4 * (field % 2);
    default:
      return 0;
  }
}

KVMIX_HOST_DEVICE constexpr int block_words(int bits) { return 2 * bits; }  // per lane
KVMIX_HOST_DEVICE constexpr int block_bytes(int bits) { return 32 * 4 * block_words(bits); }
KVMIX_HOST_DEVICE constexpr int code_bytes(int bits) { return kPageBlocks * block_bytes(bits); }

// Byte offset in a block of a lane's word.
KVMIX_HOST_DEVICE constexpr int word_offset(int bits, int lane, int word) {
  const int rest = block_words(bits) - 4 * (word / 4), width = rest < 4 ? rest : 4;
  return 512 * (word / 4) + 4 * (lane * width + word % 4);
}

// Byte offset in a side's codes and bit in that byte's 16-bit half-word of code (token, channel).
struct CodeAddress {
  int offset, bit;  // offset of the 16-bit half
};
KVMIX_HOST_DEVICE constexpr CodeAddress code_address(bool key, int bits, int token, int channel) {
  const int t = token % 16, c = channel % 16, field = channel / 16;
  const FragmentCell cell = key ? fragment_cell(t, c) : fragment_cell(c, t);
  const CodePlace place = code_place(bits, cell.reg, field);
  return {(token / 16) * block_bytes(bits) + word_offset(bits, cell.lane, place.word) + 2 * cell.half, place.bit};
}

// Index of a key scale among the 128 of its token group: the four that lane l needs for a field lie together, fields in a row.
KVMIX_HOST_DEVICE constexpr int key_scale_slot(int channel) {
  const int c = channel % 16;
  return ((c % 8) / 2) * 32 + (channel / 16) * 4 + (c / 8) * 2 + c % 2;
}
// Index of a value scale in its channel group; its midpoint is two further.
KVMIX_HOST_DEVICE constexpr int value_scale_slot(int token) { return ((token / 16) * 8 + token % 8) * 4 + (token / 8) % 2; }

struct RecordShape {
  int key_bits, value_bits, key_group, value_group;  // head_dim is kBlockChannels

  KVMIX_HOST_DEVICE constexpr int key_groups() const { return kPageTokens / key_group; }
  KVMIX_HOST_DEVICE constexpr int value_groups() const { return kBlockChannels / value_group; }
  // Offsets of the key part, from the record's start.
  KVMIX_HOST_DEVICE constexpr int key_meta() const { return kHeaderBytes + code_bytes(key_bits); }
  KVMIX_HOST_DEVICE constexpr int key_bytes() const { return key_meta() + key_groups() * kBlockChannels * 4; }
  // Offsets of the value part, from its own start.
  KVMIX_HOST_DEVICE constexpr int value_meta() const { return code_bytes(value_bits); }
  KVMIX_HOST_DEVICE constexpr int value_bytes() const { return value_meta() + value_groups() * kPageTokens * 4; }
  KVMIX_HOST_DEVICE constexpr int bytes() const { return key_bytes() + value_bytes(); }
};

}  // namespace kvmix::cuda
