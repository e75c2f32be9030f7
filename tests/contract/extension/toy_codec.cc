// A codec family for scripts/extend: sign and size of a row, 2 bits a number and an fp16 scale a token. The two bits are a
// uniform code of four levels over the row's largest magnitude.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "base/fp16.h"
#include "codec/codec_family.h"
#include "kvmix/error.h"

namespace kvmix {
namespace {

const std::array kInfos = {CodecInfo{"toy2", 2, "four levels of a token's largest magnitude"}};

size_t scales_of(const TileShape& shape) { return (static_cast<size_t>(shape.slots) * 2 + 63) / 64 * 64; }
size_t row_codes(int width) { return static_cast<size_t>(width) / 4; }
size_t codes_of(const TileShape& shape) { return (static_cast<size_t>(shape.slots) * row_codes(shape.width) + 63) / 64 * 64; }

// A row as its record: the scale, then the codes.
void encode_row(const float* x, int width, std::byte* record) {
  const auto finite = [](float v) { return std::isfinite(v) ? v : 0.0f; };
  float top = 0;
  for (int i = 0; i < width; ++i) top = std::max(top, std::abs(finite(x[i])));
  const uint16_t scale = f32_to_f16(std::min(top * 0.5f, 65504.0f));
  std::memcpy(record, &scale, 2);
  std::memset(record + 2, 0, row_codes(width));
  const float s = f16_to_f32(scale);
  for (int i = 0; i < width; ++i) {
    const float level = s > 0 ? std::floor(finite(x[i]) / s) + 2.0f : 0.0f;
    const auto code = static_cast<unsigned>(std::clamp(level, 0.0f, 3.0f));
    record[2 + i / 4] |= static_cast<std::byte>(code << (2 * (i % 4)));
  }
}

void decode_record(const std::byte* record, int width, float* x) {
  uint16_t scale;
  std::memcpy(&scale, record, 2);
  for (int i = 0; i < width; ++i) {
    const int code = std::to_integer<int>(record[2 + i / 4] >> (2 * (i % 4))) & 3;
    x[i] = f16_to_f32(scale) * (static_cast<float>(code) - 1.5f);
  }
}

class ToyRows final : public RowCodec {
 public:
  size_t record_bytes(const CodecSpec&, int width) const override { return 2 + row_codes(width); }
  void store(const CodecSpec&, const TileShape& shape, const std::byte* record, int slot, std::byte* tile) const override {
    std::memcpy(tile + slot * 2, record, 2);
    std::memcpy(tile + scales_of(shape) + static_cast<size_t>(slot) * row_codes(shape.width), record + 2,
                row_codes(shape.width));
  }
  void load(const CodecSpec&, const TileShape& shape, const std::byte* tile, int slot, std::byte* record) const override {
    std::memcpy(record, tile + slot * 2, 2);
    std::memcpy(record + 2, tile + scales_of(shape) + static_cast<size_t>(slot) * row_codes(shape.width),
                row_codes(shape.width));
  }
  void decode(const CodecSpec&, int width, const std::byte* record, float* x) const override {
    decode_record(record, width, x);
  }
};
const ToyRows kRows;

void encode_tile_of_toys(const CodecSpec& spec, const TileShape& shape, const uint16_t* x, const float*, std::byte* out) {
  std::memset(out, 0, scales_of(shape) + codes_of(shape));
  for (int t = 0; t < shape.slots; ++t) {
    float row[kMostWidth];
    std::byte record[2 + kMostWidth / 4];
    for (int i = 0; i < shape.width; ++i) row[i] = f16_to_f32(x[t * shape.width + i]);
    encode_row(row, shape.width, record);
    kRows.store(spec, shape, record, t, out);
  }
}

void encode_rows_of_toys(const CodecSpec&, int width, int n, const float* x, const float*, std::byte* records) {
  for (int r = 0; r < n; ++r)
    encode_row(x + static_cast<ptrdiff_t>(r) * width, width, records + static_cast<size_t>(r) * (2 + row_codes(width)));
}

const TileEncoder kSerial = {"serial", [] { return true; }, encode_tile_of_toys, encode_rows_of_toys};
const std::array kEncoders = {&kSerial};

class Toy final : public Codec {
 public:
  const char* name() const override { return "toy"; }
  std::span<const CodecInfo> infos() const override { return kInfos; }
  std::vector<CodecSpec> specs() const override { return {CodecSpec{.bits = 2}}; }
  std::string spellings() const override { return "toy2"; }
  std::string row_spellings() const override { return "toy2"; }
  std::string to_string(const CodecSpec&) const override { return "toy2"; }
  std::optional<CodecSpec> parse(std::string_view text) const override {
    return text == "toy2" ? std::optional(specs().front()) : std::nullopt;
  }
  void check(const CodecSpec& spec, const TileShape& shape) const override {
    if (spec.bits != 2)
      throw Error(Status::kInvalidArgument, "toy codes of " + std::to_string(spec.bits) + " bits; expected 2");
    if (shape.slots != kPageTokens) {
      throw Error(Status::kInvalidArgument, "toy tiles of " + std::to_string(shape.slots) + " slots; expected 128");
    }
  }
  size_t bytes(const CodecSpec&, const TileShape& shape) const override { return scales_of(shape) + codes_of(shape); }
  size_t scale_bytes(const CodecSpec&, const TileShape& shape) const override { return scales_of(shape); }
  std::span<const TileEncoder* const> encoders() const override { return kEncoders; }
  void decode(const CodecSpec& spec, const TileShape& shape, const std::byte* tile, float* x) const override {
    for (int t = 0; t < shape.slots; ++t) {
      std::byte record[2 + kMostWidth / 4];
      kRows.load(spec, shape, tile, t, record);
      decode_record(record, shape.width, x + static_cast<ptrdiff_t>(t) * shape.width);
    }
  }
  const RowCodec* rows(const CodecSpec&) const override { return &kRows; }
};

}  // namespace

const Codec& toy_codec();
const Codec& toy_codec() {
  static const Toy codec;
  return codec;
}

}  // namespace kvmix
