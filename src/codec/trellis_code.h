// The code of the trellis family: which number a code stands for. A code of b bits is read with what came before it in its
// *chain*: the last 8 bits of a chain, its *window*, name one of 256 levels. An encoder that knows the whole chain finds the
// codes whose levels lie nearest (Viterbi), so that with 2^b choices a number it uses far more than 2^b levels: trellis-coded
// quantisation (Marcellin and Fischer, IEEE Trans. Commun. 38, 1990) with the shift register of QTIP (arXiv 2406.11235, section
// 3.1). At 4 bits a Gaussian's squared error is half of what even levels leave, at 2 and 3 bits two thirds.
//
// Levels are of 7 bits, so that int8 products take them, and are made of two tables of 16, so that a byte shuffle finds them:
//     level(window) = A[(a low + b high) % 16] + B[(c low + d high) % 16]      low, high: the window's halves
// where B is one of two, by the first index. bench/trellis_levels.cc finds a, b, c, d and the tables on Gaussian samples. What
// is left of a Gaussian's variance at 2 to 5 bits is .0861, .0226, .0064 and .0019 (even levels: .119, .037, .0115 and .0035);
// read `gain` times larger, so that it does not shrink, .095, .0231, .0064 and .0020.
#pragma once

#include <array>
#include <cstdint>

#include "codec/tile_layout.h"

namespace kvmix {

inline constexpr std::array kTrellisBits = {2, 3, 4, 5};
inline constexpr int kTrellisGroup = 128;  // channels that share a token's scale
inline constexpr int kChainTokens = 32, kChains = kPageTokens / kChainTokens, kLevels = 256;
inline constexpr int kLevelBits = 7;
inline constexpr float kLevelCentre = 63.5f;

struct TrellisCode {
  int bits;
  float unit;               // levels to the standard deviation of a Gaussian
  float gain;               // of pages of a Gaussian x and what their codes say, sum x^2 over sum x x^
  int first[2], second[2];  // a, b and c, d
  uint16_t outer;           // bit i: first index i takes the second B
  uint8_t a[16], b[2][16];

  constexpr int first_index(int window) const { return (first[0] * (window & 15) + first[1] * (window >> 4)) & 15; }
  constexpr int second_index(int window) const { return (second[0] * (window & 15) + second[1] * (window >> 4)) & 15; }
  constexpr uint8_t level(int window) const {
    const int i = first_index(window);
    return static_cast<uint8_t>(a[i] + b[(outer >> i) & 1][second_index(window)]);
  }
};

#include "codec/trellis_levels.inc"

constexpr const TrellisCode& trellis_code(int bits) { return kTrellisCodes[static_cast<size_t>(bits - kTrellisBits.front())]; }

constexpr std::array<uint8_t, kLevels> level_table(int bits) {
  std::array<uint8_t, kLevels> levels{};
  for (int w = 0; w < kLevels; ++w) levels[static_cast<size_t>(w)] = trellis_code(bits).level(w);
  return levels;
}

// A chain is 32 tokens of one channel in the order in which a kernel meets them:
//   key:   8 lanes of a lane group, each with its 4 blocks; then the next lane
//   value: every fourth token
constexpr int chain_token(Side side, int chain, int i) {
  return side == Side::kKey ? chain / 2 * 64 + i % 4 * kUnitLanes + chain % 2 * 8 + i / 4 : 4 * i + chain;
}

// Scales are 8 bits, 5 of exponent and 3 of mantissa, 2^-20 to 1.875 x 2^11; 0 is 0.
inline constexpr uint32_t kScaleBase = 107u << 23;
inline constexpr int kScaleShift = 20;

}  // namespace kvmix
