// What the uniform family promises: exact code round trips, error bounds, stated results for odd inputs, true sizes,
// distortion.
#include "kvmix/codec.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "base/fp16.h"
#include "codec/encoders.h"
#include "codec/quantize.h"
#include "codec/tile_layout.h"
#include "kvmix/error.h"

namespace kvmix {
namespace {

struct Tile {
  Tile(const CodecSpec& s, Side side_, int dim_)
      : spec(s), side(side_), dim(dim_), x(static_cast<size_t>(kPageTokens * dim_)) {}

  void encode() {
    bytes.assign(tile_bytes(spec, dim), std::byte{0xa5});
    encode_tile(spec, side, dim, x.data(), bytes.data());
    decoded.resize(x.size());
    decode_tile(spec, side, dim, bytes.data(), decoded.data());
  }
  float stored(int index) const {
    uint16_t h;
    std::memcpy(&h, bytes.data() + static_cast<size_t>(index) * 2, 2);
    return f16_to_f32(h);
  }
  float scale(int token, int channel) const { return stored(scale_index(spec, dim, token, channel)); }
  float mid(int token, int channel) const {
    return spec.zero_point ? stored(scale_count(spec, dim) + scale_index(spec, dim, token, channel)) : 0.0f;
  }
  int code(int token, int channel) const {
    const int lane = side == Side::kKey ? token : channel, reduce = side == Side::kKey ? channel : token;
    return get_code(spec.bits, reinterpret_cast<const uint8_t*>(bytes.data() + tile_scale_bytes(spec, dim)),
                    unit_index(tile_geometry(side, dim), lane, reduce), byte_in_unit(lane, reduce));
  }
  template <typename Check>
  void each(Check check_one) const {
    for (int t = 0; t < kPageTokens; ++t)
      for (int c = 0; c < dim; ++c)
        check_one(t, c, f16_to_f32(x[static_cast<size_t>(t * dim + c)]), decoded[static_cast<size_t>(t * dim + c)]);
  }
  double relative_error() const {
    double error = 0, size = 0;
    each([&](int, int, float from, float to) {
      error += std::pow(static_cast<double>(from) - static_cast<double>(to), 2);
      size += std::pow(static_cast<double>(from), 2);
    });
    return std::sqrt(error / size);
  }

  CodecSpec spec;
  Side side;
  int dim;
  std::vector<uint16_t> x;
  std::vector<std::byte> bytes;
  std::vector<float> decoded;
};

void fill_gaussian(Tile& tile, unsigned seed, float outlier = 1.0f) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  for (size_t i = 0; i < tile.x.size(); ++i) tile.x[i] = f32_to_f16(normal(random) * (i % 16 == 3 ? outlier : 1.0f));
}

TEST(Codec, PackingKeepsEveryCode) {
  std::mt19937 random(1);
  for (const int bits : kCodecBits) {
    if (bits == kF16Bits) continue;
    std::vector<uint8_t> packed(static_cast<size_t>(bits * kVectorBytes)), codes(kBlockUnits * kUnitCodes);
    for (uint8_t& c : codes) c = static_cast<uint8_t>(random() % (1u << bits));
    for (int u = 0; u < kBlockUnits; ++u)
      for (int i = 0; i < kUnitCodes; ++i) put_code(bits, packed.data(), u, i, codes[static_cast<size_t>(u * kUnitCodes + i)]);
    for (int u = 0; u < kBlockUnits; ++u)
      for (int i = 0; i < kUnitCodes; ++i)
        ASSERT_EQ(get_code(bits, packed.data(), u, i), codes[static_cast<size_t>(u * kUnitCodes + i)]);
  }
}

TEST(Codec, DecodedValuesAreMidPlusScaleTimesCode) {
  for (const CodecSpec& spec : codec_registry().front()->specs()) {
    for (const Side side : {Side::kKey, Side::kValue}) {
      Tile tile(spec, side, 80);
      fill_gaussian(tile, 2, 6.0f);
      tile.encode();
      const float centre = static_cast<float>((1 << spec.bits) - 1) / 2;
      tile.each([&](int t, int c, float, float to) {
        ASSERT_EQ(to, tile.mid(t, c) + tile.scale(t, c) * (static_cast<float>(tile.code(t, c)) - centre)) << to_string(spec);
      });
    }
  }
}

TEST(Codec, MinMaxErrorIsHalfAScaleAndRounding) {
  for (const CodecSpec& spec : codec_registry().front()->specs()) {
    if (spec.fit != Fit::kMinMax) continue;
    Tile tile(spec, Side::kKey, 96);
    fill_gaussian(tile, 3, 8.0f);
    tile.encode();
    const float top = static_cast<float>((1 << spec.bits) - 1);
    tile.each([&](int t, int c, float from, float to) {
      const float scale = tile.scale(t, c), mid = tile.mid(t, c);
      // fp16 rounding of the scale moves the ends of the range by centre * scale / 2048, that of mid by |mid| / 2048.
      const float rounding = scale * top / 2 / 1024 + std::abs(mid) / 1024 + 1e-6f;
      ASSERT_LE(std::abs(from - to), scale / 2 + rounding) << to_string(spec) << " token " << t << " channel " << c;
    });
  }
}

TEST(Codec, FittingNeverLosesMoreThanMinMax) {
  for (CodecSpec spec : codec_registry().front()->specs()) {
    if (spec.fit != Fit::kLeastSquares || spec.bits > 4) continue;
    Tile fitted(spec, Side::kKey, 64);
    spec.fit = Fit::kMinMax;
    Tile min_max(spec, Side::kKey, 64);
    fill_gaussian(fitted, 4);
    min_max.x = fitted.x;
    fitted.encode(), min_max.encode();
    EXPECT_LE(fitted.relative_error(), min_max.relative_error()) << to_string(fitted.spec);
  }
}

// Relative L2 error on Gaussian numbers: uniform quantisers of a group of 128 cannot beat the Gaussian's rate-distortion bound
// 2^-b, and a fitted one stays within the known gap of a uniform (Lloyd-Max) quantiser plus what finite groups add.
TEST(Codec, DistortionOfGaussians) {
  const struct {
    int bits;
    double most;
  } kFitted[] = {{1, 0.62}, {2, 0.36}, {3, 0.21}, {4, 0.115}, {5, 0.06}, {6, 0.031}, {8, 0.0085}};
  for (const auto& expected : kFitted) {
    for (const float outlier : {1.0f, 30.0f}) {
      Tile tile({expected.bits, Axis::kChannel, 128, Fit::kLeastSquares, true}, Side::kKey, 64);
      fill_gaussian(tile, 5, outlier);
      tile.encode();
      EXPECT_LT(tile.relative_error(), expected.most) << expected.bits;
      EXPECT_GT(tile.relative_error(), 0.6 * std::exp2(-expected.bits)) << expected.bits;
    }
  }
}

// How much of a Gaussian value comes back: the slope of what is read on what was stored. Least squares shrink it by 1 - R^2, an
// unbiased scale does not at one bit, where codes are signs whatever the scale; at more bits its codes are rounded anew, and
// more of them stay inside the range.
TEST(Codec, UnbiasedScalesShrinkLess) {
  const auto slope = [](int bits, Axis axis, bool zero_point, Fit fit) {
    Tile tile({bits, axis, 128, fit, zero_point}, Side::kKey, 128);
    fill_gaussian(tile, 6);
    tile.encode();
    double product = 0, square = 0;
    tile.each([&](int, int, float from, float to) {
      product += static_cast<double>(from) * static_cast<double>(to);
      square += static_cast<double>(from) * static_cast<double>(from);
    });
    return product / square;
  };
  const struct {
    int bits;
    double most_fitted, least_unbiased;
  } kExpected[] = {{1, 0.68, 0.98}, {2, 0.91, 0.93}, {3, 0.973, 0.975}, {4, 0.994, 0.9945}};
  for (const auto& expected : kExpected) {
    for (const Axis axis : {Axis::kChannel, Axis::kToken}) {
      for (const bool zero_point : {true, false}) {
        const double fitted = slope(expected.bits, axis, zero_point, Fit::kLeastSquares);
        const double unbiased = slope(expected.bits, axis, zero_point, Fit::kUnbiased);
        EXPECT_LT(fitted, unbiased) << expected.bits;
        if (!zero_point) continue;
        EXPECT_LT(fitted, expected.most_fitted) << expected.bits;
        EXPECT_GT(unbiased, expected.least_unbiased) << expected.bits;
        EXPECT_LT(unbiased, 1.02) << expected.bits;
      }
    }
  }
}

TEST(Codec, OddInputsHaveStatedResults) {
  for (const CodecSpec& spec : codec_registry().front()->specs()) {
    Tile tile(spec, Side::kValue, 32);
    // Constant: with a zero point it comes back exactly.
    std::fill(tile.x.begin(), tile.x.end(), f32_to_f16(3.140625f));
    tile.encode();
    if (spec.zero_point) {
      tile.each([&](int t, int c, float from, float to) {
        ASSERT_EQ(from, to) << to_string(spec);
        ASSERT_EQ(tile.scale(t, c), 0.0f);
      });
    }
    // Zeros of any kind are zero.
    std::fill(tile.x.begin(), tile.x.end(), uint16_t{0x8000});
    tile.encode();
    tile.each([&](int, int, float, float to) { ASSERT_EQ(to, 0.0f); });
    // NaN and infinity count as zero.
    const uint16_t odd[] = {0x7c00, 0xfc00, 0x7e00, 0xfe01};
    for (size_t i = 0; i < tile.x.size(); ++i) tile.x[i] = odd[i % 4];
    tile.encode();
    tile.each([&](int, int, float, float to) { ASSERT_EQ(to, 0.0f); });
    // The whole range of fp16 stays finite.
    for (size_t i = 0; i < tile.x.size(); ++i) tile.x[i] = (i * 7 / 3) % 2 == 0 ? 0x7bff : 0xfbff;
    tile.encode();
    tile.each([&](int, int, float, float to) { ASSERT_TRUE(std::isfinite(to)) << to_string(spec); });
    // Subnormals stay within a subnormal step of the range.
    for (size_t i = 0; i < tile.x.size(); ++i) tile.x[i] = static_cast<uint16_t>(i % 40 | (i % 3 == 0 ? 0x8000 : 0));
    tile.encode();
    tile.each([&](int, int, float, float to) { ASSERT_LT(std::abs(to), 1e-5f); });
  }
}

TEST(Codec, SizesAreTheBitsTheySay) {
  for (const CodecSpec& spec : codec_registry().front()->specs()) {
    for (const int dim : {32, 80, 256}) {
      EXPECT_EQ((tile_bytes(spec, dim) - tile_scale_bytes(spec, dim)) * 8, static_cast<size_t>(kPageTokens * dim * spec.bits));
      EXPECT_EQ(tile_scale_bytes(spec, dim) % 64, 0u);
      EXPECT_EQ(tile_bytes(spec, dim) % 64, 0u);
    }
  }
  EXPECT_EQ(tile_bytes({3, Axis::kChannel, 128, Fit::kMinMax, true}, 64), 128u * 64 * 3 / 8 + 64 * 4);
}

TEST(Codec, NamesRoundTripAndStrangersAreRefused) {
  for (const CodecSpec& spec : codec_registry().front()->specs()) EXPECT_EQ(parse_codec(to_string(spec)), spec);
  EXPECT_TRUE(parse_codec("f16").is_f16());
  for (const char* text :
       {"", "int7.channel.g128.minmax.zero", "int3", "int3.channel.g128.minmax.zero ", "F16", "int3.channel.g16.minmax.zero"})
    EXPECT_THROW(parse_codec(text), Error) << text;
  EXPECT_THROW(check_codec({3, Axis::kChannel, 128, Fit::kMinMax, true}, 40), Error);
  EXPECT_THROW(check_codec({3, Axis::kChannel, 128, Fit::kMinMax, true}, 272), Error);
  EXPECT_THROW(check_codec({7, Axis::kChannel, 128, Fit::kMinMax, true}, 64), Error);
  EXPECT_THROW(check_codec({3, Axis::kChannel, 100, Fit::kMinMax, true}, 64), Error);
}

}  // namespace
}  // namespace kvmix
