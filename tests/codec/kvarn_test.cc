// What the kvarn family promises: the normalisation's scales, sizes, codes of tiles that can be worked out by hand, and less
// distortion than plain codecs where tokens and channels differ in size.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "base/fp16.h"
#include "codec/tile_layout.h"
#include "kvmix/codec.h"
#include "support/aligned_bytes.h"

namespace kvmix {
namespace {

constexpr int kWidth = 64;

struct Coded {
  Coded(const std::string& codec, Side side, const std::vector<float>& values, const float* feedback = nullptr,
        int width = kWidth)
      : spec(parse_codec(codec)), tile(tile_bytes(spec, width)), back(values.size()) {
    std::vector<uint16_t> x;
    for (const float v : values) x.push_back(f32_to_f16(v));
    if (feedback == nullptr) {
      encode_tile(spec, side, width, x.data(), tile.data());
    } else {
      feedback_tile(spec, side, width, x.data(), feedback, tile.data());
    }
    decode_tile(spec, side, width, tile.data(), back.data());
    double squares = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const double e = static_cast<double>(back[i]) - static_cast<double>(f16_to_f32(x[i]));
      error += e * e, squares += static_cast<double>(f16_to_f32(x[i])) * static_cast<double>(f16_to_f32(x[i]));
    }
    error = std::sqrt(error / squares);
  }
  float half(int index) const {
    uint16_t h;
    std::memcpy(&h, tile.data() + static_cast<ptrdiff_t>(index) * 2, 2);
    return f16_to_f32(h);
  }

  CodecSpec spec;
  AlignedBytes tile;
  std::vector<float> back;
  double error = 0;  // relative, root of mean squares
};

// Gaussian numbers times a size of the token and one of the channel, powers of two around 1 spread by so many octaves.
std::vector<float> product_tile(float token_octaves, float channel_octaves, unsigned seed, int width = kWidth) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> token(kPageTokens), channel(static_cast<size_t>(width)), x;
  for (float& s : token) s = std::exp2(token_octaves * normal(random));
  for (float& s : channel) s = std::exp2(channel_octaves * normal(random));
  for (const float t : token) {
    for (const float c : channel) x.push_back(t * c * normal(random));
  }
  return x;
}

// Signs (+ for t + c even) times a token's size and a channel's: after one sweep every number is +1 or -1, so the scales are
// the sizes, around 1 on the axis that is stored apart, and codes are the least and the largest.
TEST(Kvarn, ScalesOfAProductAreItsFactors) {
  std::vector<float> x;
  const auto token = [](int t) { return t % 4 == 0 ? 8.0f : t % 4 == 1 ? 0.125f : 1.0f; };
  const auto channel = [](int c) { return c % 8 == 2 ? 4.0f : c % 8 == 3 ? 0.25f : 1.0f; };
  for (int t = 0; t < kPageTokens; ++t) {
    for (int c = 0; c < kWidth; ++c) x.push_back(token(t) * channel(c) * (((t / 4) + (c / 8)) % 2 == 0 ? 1.0f : -1.0f));
  }
  const Coded keys("kvarn2.channel.minmax", Side::kKey, x), values("kvarn2.token.minmax", Side::kValue, x);
  for (int c = 0; c < kWidth; ++c) {
    EXPECT_NEAR(keys.half(c), channel(c) * 2 / 3, 2e-3f * channel(c));  // range 2 in 3 steps
    EXPECT_NEAR(keys.half(kWidth + c), 0, 2e-3f * channel(c));          // midpoint
    EXPECT_NEAR(values.half(2 * kPageTokens + c), channel(c), 2e-3f * channel(c));
  }
  for (int t = 0; t < kPageTokens; ++t) {
    EXPECT_NEAR(keys.half(2 * kWidth + t), token(t), 2e-3f * token(t));
    EXPECT_NEAR(values.half(t), token(t) * 2 / 3, 2e-3f * token(t));
  }
  EXPECT_LT(keys.error, 2e-3);
  EXPECT_LT(values.error, 2e-3);
}

TEST(Kvarn, SizesAreTheUniformOnesAndAnAxisOfScales) {
  EXPECT_EQ(tile_bytes(parse_codec("kvarn4.channel.minmax"), 64), 4096u + 2 * (64 + 64 + 128));
  EXPECT_EQ(tile_bytes(parse_codec("kvarn4.token.minmax"), 64), 4096u + 2 * (128 + 128 + 64));
  EXPECT_EQ(tile_bytes(parse_codec("kvarn3.token.fitted"), 256), 12288u + 2 * (256 + 256 + 256));
  EXPECT_EQ(tile_scale_bytes(parse_codec("kvarn2.channel.fitted"), 80), 576u);  // 2 (80 + 80 + 128) = 576
}

// What the sweeps leave: divided by the stored and implied scales, tokens and channels have deviations within a few percent of
// each other. Read from 8-bit codes, whose own error is far smaller.
TEST(Kvarn, SweepsBalanceTokensAndChannels) {
  const std::vector<float> x = product_tile(1.5f, 1.5f, 3);
  const Coded keys("kvarn8.channel.minmax", Side::kKey, x), values("kvarn8.token.minmax", Side::kValue, x);
  std::vector<double> token(kPageTokens), channel(kWidth);
  for (int t = 0; t < kPageTokens; ++t) {
    for (int c = 0; c < kWidth; ++c) {
      // Keys store the token's scale, values the channel's: together both axes of the same sweeps.
      const double y = static_cast<double>(x[static_cast<size_t>(t * kWidth + c)]) /
                       (static_cast<double>(keys.half(2 * kWidth + t)) * static_cast<double>(values.half(2 * kPageTokens + c)));
      token[static_cast<size_t>(t)] += y * y, channel[static_cast<size_t>(c)] += y * y;
    }
  }
  const auto spread = [](const std::vector<double>& squares) {
    const auto [low, high] = std::minmax_element(squares.begin(), squares.end());
    return std::sqrt(*high / *low);
  };
  EXPECT_LT(spread(channel), 1.1);
  EXPECT_LT(spread(token), 1.1);
}

TEST(Kvarn, LessDistortionWhereTokensDifferInSize) {
  for (const int bits : {2, 3, 4}) {
    const std::string b = std::to_string(bits);
    const auto error = [&](const std::string& codec, float tokens, float channels) {
      return Coded(codec, Side::kKey, product_tile(tokens, channels, 5)).error;
    };
    // Errors of a tile are those of its large numbers, whatever these are due to.
    EXPECT_LT(error("kvarn" + b + ".channel.minmax", 1, 0), 0.8 * error("int" + b + ".channel.g128.minmax.zero", 1, 0)) << b;
    EXPECT_LT(error("kvarn" + b + ".token.minmax", 0, 1), 0.8 * error("int" + b + ".token.g64.minmax.zero", 0, 1)) << b;
    EXPECT_LT(error("kvarn" + b + ".channel.minmax", 1, 1), 0.8 * error("int" + b + ".channel.g128.minmax.zero", 1, 1)) << b;
    // Nothing to gain, nothing much lost, on a tile of one size.
    EXPECT_LT(error("kvarn" + b + ".channel.minmax", 0, 0), 1.05 * error("int" + b + ".channel.g128.minmax.zero", 0, 0)) << b;
    EXPECT_LT(error("kvarn" + b + ".channel.fitted", 1, 1), error("kvarn" + b + ".channel.minmax", 1, 1)) << b;
  }
}

// A token or channel that does not vary keeps scale 1 along its axis and comes back.
TEST(Kvarn, TilesWithoutVariance) {
  for (const char* codec : {"kvarn2.channel.minmax", "kvarn4.token.fitted"}) {
    for (const Side side : {Side::kKey, Side::kValue}) {
      const std::vector<float> zero(kPageTokens * kWidth), constant(kPageTokens * kWidth, 3.0f);
      EXPECT_EQ(Coded(codec, side, zero).back, zero) << codec;
      EXPECT_EQ(Coded(codec, side, constant).back, constant) << codec;
      std::vector<float> huge = product_tile(0, 0, 7);
      for (float& v : huge) v *= 15000;
      EXPECT_LT(Coded(codec, side, huge).error, 0.6) << codec;
    }
  }
}

// Feedback changes codes and not scales, and with weights of 0 nothing.
TEST(Kvarn, FeedbackChangesCodesAlone) {
  const std::vector<float> x = product_tile(1, 0.5f, 9);
  std::vector<float> weights(kWidth * (kWidth - 1) / 2);
  for (const char* codec : {"kvarn3.channel.minmax", "kvarn3.token.fitted"}) {
    const Coded plain(codec, Side::kKey, x), none(codec, Side::kKey, x, weights.data());
    EXPECT_TRUE(plain.tile == none.tile) << codec;
    for (float& w : weights) w = 0.2f;
    const Coded fed(codec, Side::kKey, x, weights.data());
    const size_t head = tile_scale_bytes(plain.spec, kWidth);
    EXPECT_EQ(std::memcmp(plain.tile.data(), fed.tile.data(), head), 0) << codec;
    EXPECT_FALSE(plain.tile == fed.tile) << codec;
    std::fill(weights.begin(), weights.end(), 0.0f);
  }
}

}  // namespace
}  // namespace kvmix
