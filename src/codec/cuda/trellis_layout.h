// Where a record has trellis codes (codec/trellis_code.h), in an order that gives each lane runs of a chain. A lane's words are
// a stream of bits, each word from its highest on, so that a window, and the windows of two codes that follow each other, are
// neighbouring bits of it.
//   keys:   lanes as of other codes (lane l has tokens l / 4 and l / 4 + 8 of each token tile). A lane has four codes of a
//   chain,
//           from four token tiles, then the same of another: a *piece*. What stands before a piece is the end of the same piece
//           of the lane four before it; before those of lanes 0 to 3 nothing.
//   values: lane l has tokens l % 4, + 4, + 8, + 12 of each token tile and channels l / 4 and l / 4 + 8: two whole chains, one
//           after the other. A matrix product takes them as its columns if the weights stand in that order
//           (value_column_token).
#pragma once

#include <cstdint>

#include "codec/cuda/tile_layout.h"
#include "codec/trellis_code.h"

namespace kvmix::cuda {

inline constexpr int kPieceCodes = 4, kPieces = 16;  // of keys, of a lane in a block

// Piece of a lane's key codes: `quad`: which four token tiles; register and half of operand A.
KVMIX_HOST_DEVICE constexpr int key_piece(int quad, int reg, int half) { return quad * 8 + reg % 2 * 4 + reg / 2 * 2 + half; }

struct StreamPlace {
  int lane, bit;  // the code's first bit, its highest
};
KVMIX_HOST_DEVICE constexpr StreamPlace stream_place(int bits, bool key, int token, int channel) {
  if (key) {
    const FragmentCell at = fragment_cell(token % 16, channel % 16);
    return {at.lane, (key_piece(token / 64, at.reg, at.half) * kPieceCodes + token / 16 % 4) * bits};
  }
  return {channel % 8 * 4 + token % 4, (channel % 16 / 8 * kChainTokens + token / 4) * bits};
}

// The token of a tile that stands in a column of operand A (and a row of operand B) where values are trellis codes.
KVMIX_HOST_DEVICE constexpr int value_column_token(int column) { return column % 8 / 2 + column % 2 * 4 + column / 8 * 8; }

// Index of a token's scale in its group, of a channel's offset behind all scales: a lane has its own with few loads.
KVMIX_HOST_DEVICE constexpr int trellis_scale_slot(bool key, int token) {
  return key ? token % 8 * 16 + token / 16 * 2 + token % 16 / 8 : token % 4 * 32 + token / 16 * 4 + token % 16 / 4;
}
KVMIX_HOST_DEVICE constexpr int trellis_offset_slot(int channel) {
  return channel / 16 * 16 + channel % 8 / 2 * 4 + channel % 16 / 8 * 2 + channel % 2;
}

// The word of a side's codes that holds a code's first bit, or the one after it.
KVMIX_HOST_DEVICE inline uint32_t& stream_word(uint8_t* codes, int bits, int channel, const StreamPlace& place, int further) {
  uint8_t* const block = codes + channel / 16 * block_bytes(bits);
  return *reinterpret_cast<uint32_t*>(block + word_offset(bits, place.lane, place.bit / 32 + further));
}
KVMIX_HOST_DEVICE inline uint32_t stream_code(const uint8_t* codes, int bits, bool key, int token, int channel) {
  auto* const from = const_cast<uint8_t*>(codes);
  const StreamPlace place = stream_place(bits, key, token, channel);
  const int after = 32 - place.bit % 32 - bits;  // below 0: bits that the next word has
  uint32_t code = after >= 0 ? stream_word(from, bits, channel, place, 0) >> after
                             : stream_word(from, bits, channel, place, 0) << -after |
                                   stream_word(from, bits, channel, place, 1) >> (32 + after);
  return code & ((1u << bits) - 1);
}
// Where the code's bits are zero before.
KVMIX_HOST_DEVICE inline void put_stream_code(uint8_t* codes, int bits, bool key, int token, int channel, uint32_t code) {
  const StreamPlace place = stream_place(bits, key, token, channel);
  const int after = 32 - place.bit % 32 - bits;
  stream_word(codes, bits, channel, place, 0) |= after >= 0 ? code << after : code >> -after;
  if (after < 0) stream_word(codes, bits, channel, place, 1) |= code << (32 + after);
}

// The window of a code: its chain's last 8 bits.
KVMIX_HOST_DEVICE inline int stream_window(const uint8_t* codes, int bits, bool key, int token, int channel) {
  const int chain = key ? token / 64 * 2 + token % 16 / 8 : token % 4;
  const int last = key ? token % 8 * 4 + token / 16 % 4 : token / 4;
  int window = 0;
  for (int i = last - (7 / bits) < 0 ? 0 : last - 7 / bits; i <= last; ++i) {
    const int t = chain_token(key ? Side::kKey : Side::kValue, chain, i);
    window = (window << bits | static_cast<int>(stream_code(codes, bits, key, t, channel))) & (kLevels - 1);
  }
  return window;
}

}  // namespace kvmix::cuda
