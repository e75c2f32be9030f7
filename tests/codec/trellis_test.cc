// What the trellis family promises: numbers that follow from the codes alone, the nearest codes of a chain, scales and offsets,
// and less distortion than even levels in fewer bytes.
#include "codec/trellis.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "base/fp16.h"
#include "support/aligned_bytes.h"

namespace kvmix {
namespace {

constexpr int kWidth = 64;

struct Coded {
  Coded(const CodecSpec& codec, Side on, const std::vector<float>& values, const float* feedback = nullptr,
        int columns = kWidth)
      : spec(codec), side(on), width(columns), tile(tile_bytes(spec, width)), x(values.size()), back(values.size()) {
    std::vector<uint16_t> rows;
    for (size_t i = 0; i < values.size(); ++i) {
      rows.push_back(f32_to_f16(values[i]));
      x[i] = f16_to_f32(rows.back());
    }
    if (feedback == nullptr) {
      encode_tile(spec, side, width, rows.data(), tile.data());
    } else {
      feedback_tile(spec, side, width, rows.data(), feedback, tile.data());
    }
    decode_tile(spec, side, width, tile.data(), back.data());
  }
  float scale(int t, int c) const {
    return trellis_scale(static_cast<uint8_t>(tile.data()[c / kTrellisGroup * kPageTokens + t]));
  }
  uint8_t* codes() { return reinterpret_cast<uint8_t*>(tile.data()) + trellis_head_bytes(spec, width); }
  int code(int t, int c) {
    const int lane = side == Side::kKey ? t : c, reduce = side == Side::kKey ? c : t;
    return get_code(spec.bits, codes(), unit_index(tile_geometry(side, width), lane, reduce), byte_in_unit(lane, reduce));
  }
  double relative_error() const {
    double errors = 0, squares = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      errors += std::pow(static_cast<double>(back[i]) - static_cast<double>(x[i]), 2);
      squares += std::pow(static_cast<double>(x[i]), 2);
    }
    return errors / squares;
  }

  CodecSpec spec;
  Side side;
  int width;
  AlignedBytes tile;
  std::vector<float> x, back;
};

std::vector<float> gaussian(unsigned seed, float octaves = 0.0f, int width = kWidth) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x;
  for (int t = 0; t < kPageTokens; ++t) {
    const float size = std::exp2(octaves * normal(random));
    for (int c = 0; c < width; ++c) x.push_back(size * normal(random));
  }
  return x;
}

template <class Visit>
void for_each_width(const Visit& visit) {
  for (const int bits : kTrellisBits) {
    for (const Side side : {Side::kKey, Side::kValue}) visit(bits, side);
  }
}

TEST(Trellis, LevelsAreOfSevenBitsAndReachBothWays) {
  for (const int bits : kTrellisBits) {
    int low = 255, high = 0;
    for (int w = 0; w < kLevels; ++w)
      low = std::min<int>(low, trellis_code(bits).level(w)), high = std::max<int>(high, trellis_code(bits).level(w));
    EXPECT_GE(low, 0) << bits;
    EXPECT_LE(low, 8) << bits;
    EXPECT_GE(high, 119) << bits;
    EXPECT_LT(high, 1 << kLevelBits) << bits;
  }
}

// Every chain names every token once, and its numbers follow from its codes: the window shifted by each, from 0.
TEST(Trellis, NumbersFollowFromTheCodesOfAChain) {
  for_each_width([](int bits, Side side) {
    Coded coded(trellis_spec(bits, Side::kValue), side, gaussian(1));
    std::vector<int> seen(kPageTokens, 0);
    for (int chain = 0; chain < kChains; ++chain) {
      for (const int c : {0, 17, kWidth - 1}) {
        unsigned history = 0;
        for (int i = 0; i < kChainTokens; ++i) {
          const int t = chain_token(side, chain, i);
          if (c == 0) ++seen[static_cast<size_t>(t)];
          history = history << bits | static_cast<unsigned>(coded.code(t, c));
          const float level = static_cast<float>(trellis_code(bits).level(static_cast<int>(history & 255u))) - 63.5f;
          ASSERT_EQ(coded.back[static_cast<size_t>(t * kWidth + c)], coded.scale(t, c) * level) << bits << " " << t << " " << c;
        }
      }
    }
    EXPECT_EQ(std::count(seen.begin(), seen.end(), 1), kPageTokens);
  });
}

// No other code at one place, and no other pair side by side, brings a chain nearer, before what is read is made `gain` larger.
TEST(Trellis, NoCodesNearbyAreBetter) {
  for_each_width([](int bits, Side side) {
    Coded coded(trellis_spec(bits, Side::kValue), side, gaussian(2, 1.0f));
    const TrellisCode& code = trellis_code(bits);
    for (int chain = 0; chain < kChains; ++chain) {
      const int c = 5 + chain;
      std::vector<int> codes;
      for (int i = 0; i < kChainTokens; ++i) codes.push_back(coded.code(chain_token(side, chain, i), c));
      const auto cost = [&] {
        unsigned history = 0;
        double sum = 0;
        for (int i = 0; i < kChainTokens; ++i) {
          const int t = chain_token(side, chain, i);
          history = history << bits | static_cast<unsigned>(codes[static_cast<size_t>(i)]);
          const double scale = static_cast<double>(coded.scale(t, c) / code.gain);
          const double level = static_cast<double>(code.level(static_cast<int>(history & 255u))) - 63.5;
          const double error = static_cast<double>(coded.x[static_cast<size_t>(t * kWidth + c)]) - scale * level;
          sum += side == Side::kKey ? error * error : error * error / (scale * scale);
        }
        return sum;
      };
      const double least = cost();
      for (int i = 0; i + 1 < kChainTokens; ++i) {
        const int one = codes[static_cast<size_t>(i)], two = codes[static_cast<size_t>(i + 1)];
        for (int other = 0; other < 1 << (2 * bits); ++other) {
          codes[static_cast<size_t>(i)] = other >> bits, codes[static_cast<size_t>(i + 1)] = other & ((1 << bits) - 1);
          ASSERT_GE(cost(), least * (1 - 1e-5)) << bits << " at " << i;
        }
        codes[static_cast<size_t>(i)] = one, codes[static_cast<size_t>(i + 1)] = two;
      }
    }
  });
}

// Of a Gaussian, which the levels were made for; even levels, fitted, leave .119, .0374, .0115 and .0035, and shrink it.
TEST(Trellis, LeavesLessOfAGaussianThanEvenLevels) {
  const double most[] = {0.0965, 0.0245, 0.0070, 0.0022};
  for (size_t b = 0; b < kTrellisBits.size(); ++b) {
    double error = 0;
    for (unsigned seed = 0; seed < 4; ++seed)
      error += Coded(trellis_spec(kTrellisBits[b], Side::kValue), Side::kValue, gaussian(seed)).relative_error() / 4;
    EXPECT_LT(error, most[b]) << kTrellisBits[b];
    EXPECT_GT(error, most[b] / 2) << kTrellisBits[b];
    const CodecSpec even{kTrellisBits[b], Axis::kToken, 64, Fit::kLeastSquares, true};
    EXPECT_LT(tile_bytes(trellis_spec(kTrellisBits[b], Side::kKey), kWidth), tile_bytes(even, kWidth));
  }
}

// Rows come back as large as they were: a product with them, or a sum of them, is neither shrunk nor stretched.
TEST(Trellis, NothingShrinks) {
  for_each_width([](int bits, Side side) {
    double product = 0, squares = 0;
    for (unsigned seed = 0; seed < 8; ++seed) {
      const Coded coded(trellis_spec(bits, side), side, gaussian(seed));
      for (size_t i = 0; i < coded.x.size(); ++i) {
        product += static_cast<double>(coded.x[i]) * static_cast<double>(coded.back[i]);
        squares += static_cast<double>(coded.x[i]) * static_cast<double>(coded.x[i]);
      }
    }
    EXPECT_NEAR(product / squares, 1.0, 0.005) << bits;
  });
}

TEST(Trellis, ScalesHoldFourteenHundredthsAndSixtyFourOctaves) {
  EXPECT_EQ(store_trellis_scale(0.0f), 0);
  EXPECT_EQ(store_trellis_scale(-1.0f), 0);
  EXPECT_EQ(trellis_scale(0), 0.0f);
  for (int b = 1; b < 256; ++b) {
    const float scale = trellis_scale(static_cast<uint8_t>(b));
    EXPECT_EQ(store_trellis_scale(scale), b);
    EXPECT_GT(scale, trellis_scale(static_cast<uint8_t>(b - 1)));
    for (const float off : {0.95f, 1.05f})
      EXPECT_NEAR(trellis_scale(store_trellis_scale(scale * off)) / (scale * off), 1.0f, b < 8 ? 1.0f : 0.0626f) << b;
  }
  EXPECT_EQ(store_trellis_scale(1e30f), 255);
}

// What all tokens of a channel share is an offset, not a code: far from zero the error is that of rows around it.
TEST(Trellis, OffsetsTakeTheMeanOfAChannel) {
  std::vector<float> around = gaussian(3), moved = around;
  for (size_t i = 0; i < moved.size(); ++i) moved[i] += static_cast<float>(static_cast<int>(i % kWidth) % 7 - 3) * 1.5f;
  for_each_width([&](int bits, Side side) {
    double near = 0, far = 0, without = 0;
    const Coded at_zero(trellis_spec(bits, Side::kKey), side, around), away(trellis_spec(bits, Side::kKey), side, moved),
        bare(trellis_spec(bits, Side::kValue), side, moved);
    for (size_t i = 0; i < around.size(); ++i) {
      near += std::pow(static_cast<double>(at_zero.back[i]) - static_cast<double>(at_zero.x[i]), 2);
      far += std::pow(static_cast<double>(away.back[i]) - static_cast<double>(away.x[i]), 2);
      without += std::pow(static_cast<double>(bare.back[i]) - static_cast<double>(bare.x[i]), 2);
    }
    EXPECT_LT(far, 1.1 * near) << bits;
    EXPECT_GT(without, 2 * far) << bits;
  });
}

TEST(Trellis, RowsOfAnySizeAndEmptyOnesComeBack) {
  for_each_width([](int bits, Side side) {
    std::vector<float> x = gaussian(4, 3.0f);
    for (int c = 0; c < kWidth; ++c) x[static_cast<size_t>(9 * kWidth + c)] = 0.0f;
    const Coded coded(trellis_spec(bits, Side::kValue), side, x);
    for (int c = 0; c < kWidth; ++c) EXPECT_EQ(coded.back[static_cast<size_t>(9 * kWidth + c)], 0.0f);
    const Coded nothing(trellis_spec(bits, Side::kKey), side, std::vector<float>(x.size(), 0.0f));
    EXPECT_EQ(std::count(nothing.back.begin(), nothing.back.end(), 0.0f), static_cast<ptrdiff_t>(x.size()));
    const Coded alike(trellis_spec(bits, Side::kKey), side, std::vector<float>(x.size(), 100.0f));
    for (const float v : alike.back) ASSERT_NEAR(v, 100.0f, 10.0f);
  });
}

// With feedback an error is weighed against those before it: a metric that sees sums of channels alone has them come out right.
TEST(Trellis, FeedbackMovesErrorsWhereTheyCostLess) {
  for_each_width([](int bits, Side side) {
    const std::vector<float> x = gaussian(5);
    std::vector<float> weights;
    for (int c = 0; c < kWidth; ++c) {
      for (int i = 0; i < c; ++i) weights.push_back(i == c - 1 ? 0.9f : 0.0f);
    }
    const Coded plain(trellis_spec(bits, side), side, x), fed(trellis_spec(bits, side), side, x, weights.data());
    const auto cost = [&](const Coded& coded) {
      double sum = 0;
      for (int t = 0; t < kPageTokens; ++t) {
        double before = 0;
        for (int c = 0; c < kWidth; ++c) {
          const auto i = static_cast<size_t>(t * kWidth + c);
          const double error = static_cast<double>(coded.x[i]) - static_cast<double>(coded.back[i]);
          sum += std::pow(error + 0.9 * before, 2), before = error;
        }
      }
      return sum;
    };
    EXPECT_LT(cost(fed), 0.75 * cost(plain)) << bits;
  });
}

TEST(Trellis, SizesAreSaidInTheHead) {
  for (const int bits : kTrellisBits) {
    EXPECT_EQ(tile_bytes(trellis_spec(bits, Side::kValue), 64), 128u + 1024u * static_cast<size_t>(bits));
    EXPECT_EQ(tile_bytes(trellis_spec(bits, Side::kKey), 64), 192u + 1024u * static_cast<size_t>(bits));
    EXPECT_EQ(tile_bytes(trellis_spec(bits, Side::kKey), 256), 512u + 4096u * static_cast<size_t>(bits));
  }
  EXPECT_EQ(to_string(trellis_spec(4, Side::kKey)), "trellis4.zero");
  EXPECT_EQ(to_string(trellis_spec(4, Side::kValue)), "trellis4.sym");
}

}  // namespace
}  // namespace kvmix
