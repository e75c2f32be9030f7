// Trellis codes in the device's page records: tiles come back as they were, and what a record's streams say of an element is
// what the codec's decoder gives.
#include "codec/cuda/record.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "base/fp16.h"
#include "codec/cuda/format.h"
#include "codec/cuda/trellis_layout.h"
#include "codec/trellis.h"
#include "support/aligned_bytes.h"

namespace kvmix::cuda {
namespace {

struct Page {
  CodecSpec spec;
  Side side;
  int width;
  AlignedBytes tile;
  std::vector<float> decoded;

  Page(int bits, Side on, int columns, std::mt19937& random)
      : spec(trellis_spec(bits, on)), side(on), width(columns), tile(tile_bytes(spec, width)) {
    std::normal_distribution<float> normal;
    std::vector<uint16_t> rows(static_cast<size_t>(kPageTokens * width));
    for (size_t i = 0; i < rows.size(); ++i) {
      const auto token = static_cast<float>(i / static_cast<size_t>(width));
      rows[i] = f32_to_f16((1.0f + token / 32) * normal(random) + static_cast<float>(i % 7));
    }
    encode_tile(spec, side, width, rows.data(), tile.data());
    decoded.resize(rows.size());
    decode_tile(spec, side, width, tile.data(), decoded.data());
  }
  const uint8_t* bytes() const { return reinterpret_cast<const uint8_t*>(tile.data()); }
};

void expect_elements(const Page& page, const SideShape& side, const uint8_t* part, int unit) {
  const bool key = page.side == Side::kKey;
  const int bits = page.spec.bits;
  const uint8_t* const scales = part + side.meta();
  for (int t = 0; t < kPageTokens; ++t) {
    for (int c = 0; c < page.width; ++c) {
      const int window = stream_window(part, bits, key, t, c);
      const float scale = trellis_scale(scales[c / kTrellisGroup * kPageTokens + trellis_scale_slot(key, t)]);
      const auto* const offsets = reinterpret_cast<const int8_t*>(scales + side.groups() * kPageTokens);
      const float offset =
          key ? static_cast<float>(offsets[trellis_offset_slot(c)]) * trellis_scale(static_cast<uint8_t>(unit)) : 0;
      ASSERT_EQ(scale * (static_cast<float>(trellis_code(bits).level(window)) - kLevelCentre) + offset,
                page.decoded[static_cast<size_t>(t * page.width + c)])
          << to_string(page.spec) << ", token " << t << ", channel " << c;
    }
  }
}

TEST(Record, HasTrellisCodesAsTheTileHasThem) {
  std::mt19937 random(3);
  HeadDims::each([&](int dim) {
    TrellisBits::each([&](int bits) {
      const Page key(bits, Side::kKey, dim, random), value(7 - bits, Side::kValue, dim, random);
      const ThinShape shape{RecordShape{dim, kTrellis + bits, kTrellis + 7 - bits, kTrellisGroup, kTrellisGroup}};
      EXPECT_EQ(static_cast<size_t>(shape.key().bytes()), tile_bytes(key.spec, dim));
      EXPECT_EQ(static_cast<size_t>(shape.value().bytes()), tile_bytes(value.spec, dim));
      AlignedBytes record(static_cast<size_t>(shape.bytes()));
      auto* const bytes = reinterpret_cast<uint8_t*>(record.data());
      record_from_tiles(shape, key.bytes(), value.bytes(), bytes);
      const auto& header = *reinterpret_cast<const RecordHeader*>(bytes);
      expect_elements(key, shape.key(), bytes + kHeaderBytes, header.key_unit);
      expect_elements(value, shape.value(), bytes + shape.key_bytes(), 0);
      std::vector<uint8_t> key_tile(key.tile.size()), value_tile(value.tile.size());
      tiles_from_record(shape, bytes, key_tile.data(), value_tile.data());
      EXPECT_EQ(key_tile, std::vector<uint8_t>(key.bytes(), key.bytes() + key.tile.size()));
      EXPECT_EQ(value_tile, std::vector<uint8_t>(value.bytes(), value.bytes() + value.tile.size()));
    });
  });
}

}  // namespace
}  // namespace kvmix::cuda
