// Every encoder of the uniform family writes the bytes of the serial reference.
#include "codec/encoders.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "base/fp16.h"
#include "codec/row.h"

namespace kvmix {
namespace {

struct Input {
  const char* name;
  uint16_t (*value)(std::mt19937& random, int token, int channel);
};

float gauss(std::mt19937& random) { return std::normal_distribution<float>()(random); }

const Input kInputs[] = {
    {"gaussian", [](std::mt19937& r, int, int) { return f32_to_f16(gauss(r)); }},
    {"outlier channels",
     [](std::mt19937& r, int, int c) {
       return f32_to_f16(gauss(r) * (c % 16 == 3 ? 40.0f : 0.5f) + (c % 32 == 5 ? 30.0f : 0.0f));
     }},
    {"constant", [](std::mt19937&, int, int c) { return f32_to_f16(static_cast<float>(c % 3) - 1.0f); }},
    {"zeros of both signs", [](std::mt19937& r, int, int) { return static_cast<uint16_t>(r() % 2 ? 0x8000 : 0); }},
    {"subnormal", [](std::mt19937& r, int, int) { return static_cast<uint16_t>((r() & 0x8000u) | (r() % 40)); }},
    {"huge", [](std::mt19937& r, int, int) { return f32_to_f16(60000.0f * std::tanh(3.0f * gauss(r))); }},
    {"any bits", [](std::mt19937& r, int, int) { return static_cast<uint16_t>(r()); }},
};

TEST(Encoders, WriteTheSerialBytes) {
  const TileEncoder& serial = *tile_encoders().back();
  for (const TileEncoder* encoder : tile_encoders()) {
    if (encoder == &serial || !encoder->available()) continue;
    for (const int head_dim : {32, 48, 64, 80, 96, 128, 256}) {
      for (const CodecSpec& spec : codec_registry().front()->specs()) {
        std::mt19937 random(static_cast<unsigned>(head_dim));
        for (const Input& input : kInputs) {
          // The wide heads repeat what the narrow ones do; one input is enough for them.
          if (head_dim > 96 && &input != &kInputs[1]) continue;
          std::vector<uint16_t> x(static_cast<size_t>(kPageTokens * head_dim));
          for (int i = 0; i < kPageTokens * head_dim; ++i)
            x[static_cast<size_t>(i)] = input.value(random, i / head_dim, i % head_dim);
          for (const Side side : {Side::kKey, Side::kValue}) {
            const size_t bytes = tile_bytes(spec, head_dim);
            std::vector<std::byte> expected(bytes), got(bytes, std::byte{0xa5});
            serial.encode(spec, {kPageTokens, head_dim, side}, x.data(), nullptr, expected.data());
            encoder->encode(spec, {kPageTokens, head_dim, side}, x.data(), nullptr, got.data());
            ASSERT_EQ(std::memcmp(expected.data(), got.data(), bytes), 0)
                << encoder->name << " " << to_string(spec) << " head_dim " << head_dim << " input " << input.name << " "
                << (side == Side::kKey ? "key" : "value");
          }
        }
      }
    }
  }
}

// Rows one by one make the tile that encode_tile makes of all of them; keys here with feedback.
TEST(Encoders, RowsMakeTheTile) {
  for (const TileEncoder* encoder : tile_encoders()) {
    if (!encoder->available()) continue;
    for (const int head_dim : {32, 48, 64, 80, 128, 256}) {
      for (const CodecSpec& spec : codec_registry().front()->specs()) {
        if (!takes_rows(spec)) continue;
        std::mt19937 random(static_cast<unsigned>(head_dim));
        std::vector<float> weights(static_cast<size_t>(head_dim * (head_dim - 1) / 2)),
            columns(static_cast<size_t>(head_dim * head_dim));
        for (float& w : weights) w = 0.1f * gauss(random);
        feedback_columns(weights.data(), head_dim, columns.data());
        for (const Input& input : kInputs) {
          std::vector<uint16_t> x(static_cast<size_t>(kPageTokens * head_dim));
          for (int i = 0; i < kPageTokens * head_dim; ++i)
            x[static_cast<size_t>(i)] = input.value(random, i / head_dim, i % head_dim);
          for (const Side side : {Side::kKey, Side::kValue}) {
            const size_t bytes = tile_bytes(spec, head_dim);
            std::vector<std::byte> expected(bytes), got(bytes);
            encode_tile(spec, side, head_dim, x.data(), expected.data());
            const bool with_feedback = side == Side::kKey;
            if (with_feedback) feedback_tile(spec, side, head_dim, x.data(), weights.data(), expected.data());
            std::vector<float> decoded(x.size()), rows(static_cast<size_t>(8 * head_dim));
            decode_tile(spec, side, head_dim, expected.data(), decoded.data());
            const size_t record_bytes = row_bytes(spec, head_dim);
            for (int i = 0, n = 0; i < kPageTokens; i += n) {
              n = std::min(kPageTokens - i, 1 + i % 7);
              const auto token = [i](int r) { return (i + r) * 37 % kPageTokens; };  // in any order
              for (int r = 0; r < n; ++r) {
                for (int c = 0; c < head_dim; ++c)
                  rows[static_cast<size_t>(r * head_dim + c)] = f16_to_f32(x[static_cast<size_t>(token(r) * head_dim + c)]);
              }
              std::byte records[8 * kMostRowBytes], back[kMostRowBytes];
              encoder->encode_rows(spec, head_dim, n, rows.data(), with_feedback ? columns.data() : nullptr, records);
              for (int r = 0; r < n; ++r) {
                const std::byte* record = records + static_cast<size_t>(r) * record_bytes;
                store_row(spec, side, head_dim, record, token(r), got.data());
                load_row(spec, side, head_dim, got.data(), token(r), back);
                ASSERT_EQ(std::memcmp(record, back, record_bytes), 0);
                decode_row(spec, head_dim, record, rows.data());
                ASSERT_EQ(std::memcmp(rows.data(), &decoded[static_cast<size_t>(token(r) * head_dim)],
                                      static_cast<size_t>(head_dim) * sizeof(float)),
                          0);
              }
            }
            ASSERT_EQ(std::memcmp(expected.data(), got.data(), bytes), 0)
                << encoder->name << " " << to_string(spec) << " head_dim " << head_dim << " input " << input.name;
          }
        }
      }
    }
  }
}

TEST(Encoders, FeedBackErrorsAlike) {
  const TileEncoder& serial = *tile_encoders().back();
  for (const int head_dim : {48, 64, 256}) {
    std::mt19937 random(static_cast<unsigned>(head_dim));
    std::vector<float> weights(static_cast<size_t>(head_dim * (head_dim - 1) / 2));
    for (float& w : weights) w = 0.1f * gauss(random);
    for (const CodecSpec& spec : codec_registry().front()->specs()) {
      // Feedback follows scales, however they were fitted.
      if (spec.fit == Fit::kMinMax && spec.axis == Axis::kChannel) continue;
      if (head_dim == 256 && (spec.group == 64 || spec.bits > 3)) continue;
      for (const Input& input : kInputs) {
        if (head_dim == 256 && &input != &kInputs[1]) continue;
        std::vector<uint16_t> x(static_cast<size_t>(kPageTokens * head_dim));
        for (int i = 0; i < kPageTokens * head_dim; ++i)
          x[static_cast<size_t>(i)] = input.value(random, i / head_dim, i % head_dim);
        for (const Side side : {Side::kKey, Side::kValue}) {
          const TileShape shape{kPageTokens, head_dim, side};
          const size_t bytes = tile_bytes(spec, head_dim);
          std::vector<std::byte> plain(bytes), expected(bytes), got(bytes, std::byte{0xa5});
          serial.encode(spec, shape, x.data(), nullptr, plain.data());
          serial.encode(spec, shape, x.data(), weights.data(), expected.data());
          const std::vector<float> none(weights.size(), 0.0f);
          serial.encode(spec, shape, x.data(), none.data(), got.data());
          ASSERT_EQ(std::memcmp(plain.data(), got.data(), bytes), 0) << to_string(spec) << " without weights, " << input.name;
          for (const TileEncoder* encoder : tile_encoders()) {
            if (encoder == &serial || !encoder->available()) continue;
            encoder->encode(spec, shape, x.data(), weights.data(), got.data());
            ASSERT_EQ(std::memcmp(expected.data(), got.data(), bytes), 0)
                << encoder->name << " " << to_string(spec) << " head_dim " << head_dim << " input " << input.name;
          }
        }
      }
    }
  }
}

TEST(Encoders, ConvertRowsAlike) {
  const HalfEncoder& serial = *half_encoders().back();
  std::mt19937 random(7);
  std::vector<float> x(4096);
  for (float& v : x) v = gauss(random) * std::exp2(static_cast<float>(static_cast<int>(random() % 60) - 40));
  x[0] = 65519.9f, x[1] = 65520.0f, x[2] = -0.0f, x[3] = 5.9604645e-8f, x[4] = 2.98e-8f, x[5] = -70000.0f;
  std::vector<uint16_t> expected(x.size()), got(x.size());
  serial.to_f16(x.data(), static_cast<int>(x.size()), expected.data());
  for (const HalfEncoder* encoder : half_encoders()) {
    if (!encoder->available()) continue;
    encoder->to_f16(x.data(), static_cast<int>(x.size()), got.data());
    EXPECT_EQ(expected, got) << encoder->name;
  }
}

}  // namespace
}  // namespace kvmix
