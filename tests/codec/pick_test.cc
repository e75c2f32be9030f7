// A page's codes of chosen key channels, picked out of those of all as the device does it, are those of the chosen ones alone.
#include "codec/cuda/pick.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "codec/cuda/format.h"

namespace kvmix::cuda {
namespace {

// Sets a code of keys, bit by bit.
void put_code(int bits, int token, int channel, int code, std::vector<uint16_t>& halves) {
  const CodeCell cell = code_cell(true, token, channel);
  for (int b = 0; b < bits; ++b) {
    const CodePlace place = code_bit_place(bits, cell.at.reg, cell.field, b);
    const int at = (cell.block * block_bytes(bits) + word_offset(bits, cell.at.lane, place.word)) / 2 + cell.at.half;
    halves[static_cast<size_t>(at)] = static_cast<uint16_t>(halves[static_cast<size_t>(at)] | (code >> b & 1) << place.bit);
  }
}

template <int bits>
void check(int dim, int width, std::mt19937& random) {
  std::vector<uint8_t> chosen(static_cast<size_t>(dim));
  std::iota(chosen.begin(), chosen.end(), uint8_t{0});
  std::shuffle(chosen.begin(), chosen.end(), random);
  chosen.resize(static_cast<size_t>(width));
  std::sort(chosen.begin(), chosen.end());
  std::vector<std::vector<int>> codes(kPageTokens, std::vector<int>(static_cast<size_t>(dim)));
  std::vector<uint16_t> all(static_cast<size_t>(code_bytes(bits, dim) / 2)),
      expected(static_cast<size_t>(code_bytes(bits, width) / 2));
  for (int t = 0; t < kPageTokens; ++t) {
    for (int c = 0; c < dim; ++c) {
      const int code = static_cast<int>(random() % (1u << bits));
      codes[static_cast<size_t>(t)][static_cast<size_t>(c)] = code;
      put_code(bits, t, c, code, all);
    }
    for (int c = 0; c < width; ++c)
      put_code(bits, t, c, codes[static_cast<size_t>(t)][chosen[static_cast<size_t>(c)]], expected);
  }
  std::vector<uint16_t> got(expected.size());
  for (int block = 0; block < width / 16; ++block) {
    for (int lane = 0; lane < 32; ++lane) {
      pick_words<bits>(reinterpret_cast<const uint8_t*>(all.data()), chosen.data(), block, lane,
                       reinterpret_cast<uint8_t*>(got.data()));
    }
  }
  EXPECT_EQ(got, expected) << bits << " bits, " << width << " of " << dim;
}

TEST(PickChannels, CodesAreThoseOfTheChosenOnes) {
  std::mt19937 random(1);
  for (const auto& [dim, width] : {std::pair{64, 32}, {64, 48}, {96, 64}, {128, 80}, {256, 208}}) {
    check<1>(dim, width, random);
    check<2>(dim, width, random);
    check<3>(dim, width, random);
    check<4>(dim, width, random);
    check<8>(dim, width, random);
    check<16>(dim, width, random);
  }
}

}  // namespace
}  // namespace kvmix::cuda
