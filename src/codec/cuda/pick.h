// Codes of chosen channels out of those of all, keys' (tile_layout.h).
#pragma once

#include <cstdint>

#include "codec/cuda/tile_layout.h"

namespace kvmix::cuda {

// The half that holds a word's part of a cell.
KVMIX_HOST_DEVICE inline uint16_t code_half(const uint16_t* halves, int bits, int block, const FragmentCell& at, int word) {
  return halves[(block * block_bytes(bits) + word_offset(bits, at.lane, word)) / 2 + at.half];
}

// The words of a lane of one block of 16 chosen channels, out of the codes of all.
template <int bits>
KVMIX_HOST_DEVICE inline void pick_words(const uint8_t* from, const uint8_t* chosen, int block, int lane, uint8_t* to) {
  uint32_t words[block_words(bits)] = {};
  const auto* const halves = reinterpret_cast<const uint16_t*>(from);
  for (int reg = 0; reg < 4; ++reg) {
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + 8 * (reg % 2), channel = chosen[16 * block + 2 * (lane % 4) + half + 8 * (reg / 2)];
      const FragmentCell there = fragment_cell(row, channel % 16);
      for (int field = 0; field < kFields; ++field) {
        if constexpr (bits == 16) {
          words[reg + 4 * field] |= uint32_t{code_half(halves, 16, channel / 16, there, there.reg + 4 * field)} << (16 * half);
        } else {
          for (int bit = 0; bit < bits; ++bit) {
            const CodePlace in = code_bit_place(bits, there.reg, field, bit), out = code_bit_place(bits, reg, field, bit);
            const uint32_t one = code_half(halves, bits, channel / 16, there, in.word) >> in.bit & 1u;
            words[out.word] |= one << (out.bit + 16 * half);
          }
        }
      }
    }
  }
  for (int word = 0; word < block_words(bits); ++word) {
    *reinterpret_cast<uint32_t*>(to + block * block_bytes(bits) + word_offset(bits, lane, word)) = words[word];
  }
}

}  // namespace kvmix::cuda
