// What every registered codec family must do, whichever it is.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "attention/cpu/kernel.h"
#include "base/fp16.h"
#include "codec/codec_family.h"
#include "codec/row.h"
#include "codec/trellis.h"
#include "kvmix/error.h"
#include "support/aligned_bytes.h"

namespace kvmix {
namespace {

constexpr int kWidths[] = {kLeastWidth, 64, 80, 128};

float gauss(std::mt19937& random) { return std::normal_distribution<float>()(random); }

std::vector<uint16_t> random_rows(int width, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<uint16_t> x(static_cast<size_t>(kPageTokens * width));
  for (size_t i = 0; i < x.size(); ++i) x[i] = f32_to_f16(gauss(random) * (i % 16 == 3 ? 4.0f : 1.0f));
  return x;
}

std::vector<float> random_feedback(int width, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<float> weights(static_cast<size_t>(width * (width - 1) / 2));
  for (float& w : weights) w = 0.05f * gauss(random);
  return weights;
}

// Calls visit(spec, shape) for every spec of every family at some widths, of both sides.
template <class Visit>
void for_every_tile(const Visit& visit) {
  for (const CodecSpec& spec : all_codec_specs()) {
    for (const int width : kWidths) {
      for (const Side side : {Side::kKey, Side::kValue}) visit(spec, TileShape{kPageTokens, width, side});
    }
  }
}

std::vector<float> decoded(const CodecSpec& spec, const TileShape& shape, const std::byte* tile) {
  std::vector<float> x(static_cast<size_t>(shape.slots * shape.width), std::numeric_limits<float>::quiet_NaN());
  codec_of(spec).decode(spec, shape, tile, x.data());
  return x;
}

TEST(CodecContract, NamesAndSpellingsAreTheirOwn) {
  std::vector<std::string> families, spellings;
  for (const Codec* codec : codec_registry()) {
    std::printf("[ REGISTRY ] codec %s\n", codec->name());  // read by scripts/extend
    EXPECT_EQ(std::count(families.begin(), families.end(), codec->name()), 0) << codec->name();
    families.emplace_back(codec->name());
    EXPECT_FALSE(codec->infos().empty()) << codec->name();
    EXPECT_FALSE(codec->spellings().empty()) << codec->name();
    EXPECT_FALSE(codec->encoders().empty()) << codec->name();
    EXPECT_TRUE(codec->encoders().back()->available()) << codec->name() << ": the reference runs everywhere";
  }
  for (const CodecSpec& spec : all_codec_specs()) {
    spellings.push_back(to_string(spec));
    EXPECT_EQ(parse_codec(spellings.back()), spec) << spellings.back();
    EXPECT_THROW(parse_codec(spellings.back() + "x"), Error) << spellings.back();
  }
  std::sort(spellings.begin(), spellings.end());
  EXPECT_EQ(std::adjacent_find(spellings.begin(), spellings.end()), spellings.end());
}

TEST(CodecContract, AnUnknownSpellingIsRefusedWithAllKnownOnes) {
  try {
    parse_codec("no such codec");
    FAIL();
  } catch (const Error& e) {
    for (const Codec* codec : codec_registry()) {
      EXPECT_NE(std::string(e.what()).find(codec->spellings()), std::string::npos) << e.what();
    }
  }
  EXPECT_THROW(to_string(CodecSpec{.family = 255}), Error);
}

TEST(CodecContract, SizesAreWholeLinesAndTheSameOnBothSides) {
  for_every_tile([](const CodecSpec& spec, const TileShape& shape) {
    const TileFormat f = tile_format(spec, shape);
    EXPECT_EQ(f.bytes % 64, 0u) << to_string(spec);
    EXPECT_EQ(f.scale_bytes % 64, 0u) << to_string(spec);
    EXPECT_LT(f.scale_bytes, f.bytes) << to_string(spec);
    EXPECT_EQ(f.bytes, tile_bytes(spec, shape.width)) << to_string(spec);
    EXPECT_EQ(f.scale_bytes, tile_scale_bytes(spec, shape.width)) << to_string(spec);
  });
}

TEST(CodecContract, BadShapesAreRefusedByTheirValue) {
  for (const CodecSpec& spec : all_codec_specs()) {
    for (const TileShape& shape : {TileShape{kPageTokens, 40}, TileShape{kPageTokens, kMostWidth + kWidthStep},
                                   TileShape{kPageTokens, 0}, TileShape{127, 64}, TileShape{0, 64}}) {
      const int wrong = shape.slots != kPageTokens ? shape.slots : shape.width;
      try {
        tile_format(spec, shape);
        ADD_FAILURE() << to_string(spec) << " takes " << shape.slots << " x " << shape.width;
      } catch (const Error& e) {
        EXPECT_EQ(e.status(), Status::kInvalidArgument);
        EXPECT_NE(std::string(e.what()).find(std::to_string(wrong)), std::string::npos) << e.what();
      }
    }
  }
}

// The mean squared error is at most four times that of a uniform code of as many bits over the tile's whole range.
TEST(CodecContract, WhatComesBackIsAsCloseAsItsBitsAllow) {
  for_every_tile([](const CodecSpec& spec, const TileShape& shape) {
    const std::vector<uint16_t> x = random_rows(shape.width, 3);
    const TileFormat f = tile_format(spec, shape);
    AlignedBytes tile(f.bytes);
    codec_of(spec).encode(spec, shape, x.data(), nullptr, tile.data());
    const std::vector<float> back = decoded(spec, shape, tile.data());
    double squares = 0, low = 0, high = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const auto v = static_cast<double>(f16_to_f32(x[i]));
      squares += std::pow(v - static_cast<double>(back[i]), 2);
      low = std::min(low, v), high = std::max(high, v);
    }
    const auto count = static_cast<double>(x.size());
    const double bits = std::floor(8 * static_cast<double>(f.bytes - f.scale_bytes) / count);
    const double step = (high - low) / (std::exp2(bits) - 1);
    EXPECT_LT(squares / count, 4 * step * step / 12) << to_string(spec) << " " << shape.width;
  });
}

TEST(CodecContract, EveryEncoderWritesTheReferencesBytes) {
  for_every_tile([](const CodecSpec& spec, const TileShape& shape) {
    const Codec& codec = codec_of(spec);
    const std::vector<uint16_t> x = random_rows(shape.width, 5);
    const std::vector<float> feedback = random_feedback(shape.width, 6);
    for (const float* weights : {static_cast<const float*>(nullptr), feedback.data()}) {
      const size_t bytes = codec.bytes(spec, shape);
      AlignedBytes want(bytes), got(bytes, std::byte{0xa5});
      codec.encoders().back()->encode(spec, shape, x.data(), weights, want.data());
      for (const TileEncoder* encoder : codec.encoders()) {
        if (!encoder->available()) continue;
        encoder->encode(spec, shape, x.data(), weights, got.data());
        ASSERT_TRUE(got == want) << encoder->name << " " << to_string(spec) << " " << shape.width;
      }
      AlignedBytes through(bytes);
      if (weights == nullptr) {
        encode_tile(spec, shape.side, shape.width, x.data(), through.data());
      } else {
        feedback_tile(spec, shape.side, shape.width, x.data(), weights, through.data());
      }
      ASSERT_TRUE(through == want) << to_string(spec);
    }
  });
}

TEST(CodecContract, NumbersThatAreNotFiniteCountAsZero) {
  for_every_tile([](const CodecSpec& spec, const TileShape& shape) {
    std::vector<uint16_t> x = random_rows(shape.width, 7), zeroed = x;
    for (size_t i = 0; i < x.size(); i += 97) {
      x[i] = i % 2 == 0 ? 0x7c00 : i % 3 == 0 ? 0xfc00 : 0x7e01;
      zeroed[i] = 0;
    }
    const size_t bytes = tile_bytes(spec, shape.width);
    AlignedBytes a(bytes), b(bytes);
    codec_of(spec).encode(spec, shape, x.data(), nullptr, a.data());
    codec_of(spec).encode(spec, shape, zeroed.data(), nullptr, b.data());
    ASSERT_TRUE(a == b) << to_string(spec) << " " << shape.width;
    for (const float v : decoded(spec, shape, a.data())) ASSERT_TRUE(std::isfinite(v)) << to_string(spec);
  });
}

// Rows stored one by one, in any order, make the tile and come back; slots that are not written stay as they are.
TEST(CodecContract, RowsMakeTheTile) {
  for_every_tile([](const CodecSpec& spec, const TileShape& shape) {
    const Codec& codec = codec_of(spec);
    const RowCodec* rows = codec.rows(spec);
    EXPECT_EQ(takes_rows(spec), rows != nullptr);
    if (rows == nullptr) return;
    const std::vector<uint16_t> x = random_rows(shape.width, 9);
    const std::vector<float> feedback = random_feedback(shape.width, 10);
    std::vector<float> columns(static_cast<size_t>(shape.width * shape.width)), row(static_cast<size_t>(shape.width)),
        back = row;
    feedback_columns(feedback.data(), shape.width, columns.data());
    const size_t bytes = codec.bytes(spec, shape), record_bytes = rows->record_bytes(spec, shape.width);
    ASSERT_LE(record_bytes, kMostRowBytes);
    for (const bool fed : {false, true}) {
      AlignedBytes want(bytes);
      codec.encode(spec, shape, x.data(), fed ? feedback.data() : nullptr, want.data());
      const std::vector<float> numbers = decoded(spec, shape, want.data());
      for (const TileEncoder* encoder : codec.encoders()) {
        if (!encoder->available()) continue;
        ASSERT_NE(encoder->encode_rows, nullptr) << encoder->name;
        AlignedBytes got(bytes);
        for (int i = 0; i < kPageTokens; ++i) {
          const int slot = i * 37 % kPageTokens;
          for (int c = 0; c < shape.width; ++c)
            row[static_cast<size_t>(c)] = f16_to_f32(x[static_cast<size_t>(slot * shape.width + c)]);
          std::vector<std::byte> record(record_bytes), again(record_bytes);
          encoder->encode_rows(spec, shape.width, 1, row.data(), fed ? columns.data() : nullptr, record.data());
          std::vector<std::byte> other_before(record_bytes), other_after(record_bytes);
          rows->load(spec, shape, got.data(), (slot + 1) % kPageTokens, other_before.data());
          rows->store(spec, shape, record.data(), slot, got.data());
          rows->load(spec, shape, got.data(), slot, again.data());
          ASSERT_EQ(record, again) << encoder->name << " " << to_string(spec);
          rows->decode(spec, shape.width, record.data(), back.data());
          ASSERT_EQ(std::memcmp(back.data(), &numbers[static_cast<size_t>(slot * shape.width)], back.size() * sizeof(float)),
                    0);
          // Another slot's record is what it was.
          rows->load(spec, shape, got.data(), (slot + 1) % kPageTokens, other_after.data());
          ASSERT_EQ(other_before, other_after);
        }
        ASSERT_TRUE(got == want) << encoder->name << " " << to_string(spec) << " " << shape.width << (fed ? " fed" : "");
      }
    }
  });
}

// The portable kernel over a page of any codec, of unequal widths, against softmax in double over the decoded rows. What slots
// behind `live` decode to does not count.
TEST(CodecContract, PortableAttentionReadsIt) {
  const AttentionKernel& portable = *attention_kernel_registry().back();
  ASSERT_STREQ(portable.name, "portable");
  std::mt19937 random(11);
  const std::vector<CodecSpec> specs = all_codec_specs();
  for (size_t s = 0; s < specs.size(); ++s) {
    const int key_width = s % 2 == 0 ? 64 : 48, value_width = s % 3 == 0 ? 64 : 80, rows = 3, live = 90;
    AttendJob job{};
    job.key = tile_format(specs[s], {kPageTokens, key_width, Side::kKey});
    job.value = tile_format(specs[(s + 5) % specs.size()], {kPageTokens, value_width, Side::kValue});
    AlignedBytes key(job.key.bytes), value(job.value.bytes);
    codec_of(job.key.spec).encode(job.key.spec, job.key.shape(), random_rows(key_width, 12).data(), nullptr, key.data());
    codec_of(job.value.spec)
        .encode(job.value.spec, job.value.shape(), random_rows(value_width, 13).data(), nullptr, value.data());
    const std::vector<float> k = decoded(job.key.spec, job.key.shape(), key.data());
    const std::vector<float> v = decoded(job.value.spec, job.value.shape(), value.data());
    const PageRef page{key.data(), value.data(), 0, live, true};
    std::vector<float> q(static_cast<size_t>(rows * key_width)), m(rows), l(rows), acc(static_cast<size_t>(rows * value_width));
    for (float& x : q) x = gauss(random);
    const std::vector<int64_t> position = {live - 1, 40, 0};
    job.scale = 0.1f, job.rows = rows, job.q = q.data(), job.position = position.data(), job.pages = {&page, 1};
    job.m = m.data(), job.l = l.data(), job.acc = acc.data();
    ASSERT_TRUE(portable.supports(job));
    AlignedBytes scratch(portable.scratch_bytes(std::max(key_width, value_width), rows), std::byte{0xff});
    portable.attend(job, scratch.data());
    for (int r = 0; r < rows; ++r) {
      double sum = 0;
      std::vector<double> out(static_cast<size_t>(value_width));
      for (int t = 0; t <= position[static_cast<size_t>(r)]; ++t) {
        double score = 0;
        for (int c = 0; c < key_width; ++c)
          score += static_cast<double>(q[static_cast<size_t>(r * key_width + c)]) *
                   static_cast<double>(k[static_cast<size_t>(t * key_width + c)]);
        const double p = std::exp(score * 0.1 - static_cast<double>(m[static_cast<size_t>(r)]));
        sum += p;
        for (int c = 0; c < value_width; ++c)
          out[static_cast<size_t>(c)] += p * static_cast<double>(v[static_cast<size_t>(t * value_width + c)]);
      }
      EXPECT_NEAR(static_cast<double>(l[static_cast<size_t>(r)]) / sum, 1, 1e-5) << to_string(job.key.spec);
      for (int c = 0; c < value_width; ++c) {
        EXPECT_NEAR(static_cast<double>(acc[static_cast<size_t>(r * value_width + c)]) / sum, out[static_cast<size_t>(c)] / sum,
                    1e-4)
            << to_string(job.key.spec) << " " << to_string(job.value.spec);
      }
    }
    // Kernels that read codes themselves know the uniform family and trellises (tests/attention), and must say so.
    const auto known = [](const CodecSpec& spec) { return spec.is_uniform() || is_trellis(spec); };
    const bool foreign = !known(job.key.spec) || !known(job.value.spec);
    for (const AttentionKernel* kernel : attention_kernel_registry()) {
      if (kernel != &portable && foreign) {
        EXPECT_FALSE(kernel->supports(job)) << kernel->name;
      }
    }
  }
}

}  // namespace
}  // namespace kvmix
