// Rows of tiles that are filled token by token: 8-bit codes with scales per token.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/fp16.h"
#include "codec/quantize.h"
#include "codec/row.h"
#include "codec/row_feedback.h"
#include "codec/tile_layout.h"
#include "codec/uniform.h"

namespace kvmix {
namespace {

// Where the tile keeps the codes of one token: visit(first channel, pointer, count, stride of the pointer).
template <typename Byte, typename Visit>
void for_codes(Side side, int width, int slot, Byte* codes, Visit visit) {
  const TileGeometry geometry = tile_geometry(side, width);
  if (side == Side::kKey) {
    for (int c = 0; c < width; c += kUnitReduce) {
      visit(c, codes + unit_index(geometry, slot, c) * kUnitCodes + byte_in_unit(slot, c), kUnitReduce, 1);
    }
  } else {
    for (int c = 0; c < width; c += kUnitLanes) {
      visit(c, codes + unit_index(geometry, c, slot) * kUnitCodes + byte_in_unit(c, slot), kUnitLanes, kUnitReduce);
    }
  }
}

// visit(index in the record, index in the tile) of every fp16 number of a token.
template <typename Visit>
void for_scales(const CodecSpec& spec, int width, int slot, Visit visit) {
  const int groups = scale_groups(spec, width), parts = spec.zero_point ? 2 : 1;
  for (int part = 0; part < parts; ++part) {
    for (int g = 0; g < groups; ++g) visit(part * groups + g, part * groups * kPageTokens + g * kPageTokens + slot);
  }
}

size_t record_codes(const CodecSpec& spec, int width) { return uniform_record_bytes(spec, width) - static_cast<size_t>(width); }

void add_error(float* wanted, const float* column, float error, int first, int width) {
  for (int k = first; k < width; ++k) wanted[k] = wanted[k] + column[k] * error;
}

class UniformRows final : public RowCodec {
 public:
  size_t record_bytes(const CodecSpec& spec, int width) const override { return uniform_record_bytes(spec, width); }

  void store(const CodecSpec& spec, const TileShape& shape, const std::byte* record, int slot, std::byte* tile) const override {
    for_scales(spec, shape.width, slot, [&](int from, int to) { std::memcpy(tile + to * 2, record + from * 2, 2); });
    const std::byte* codes = record + record_codes(spec, shape.width);
    for_codes(shape.side, shape.width, slot, tile + uniform_scale_bytes(spec, shape.width),
              [&](int c, std::byte* to, int n, int stride) {
                for (int i = 0; i < n; ++i) to[i * stride] = codes[c + i];
              });
  }

  void load(const CodecSpec& spec, const TileShape& shape, const std::byte* tile, int slot, std::byte* record) const override {
    for_scales(spec, shape.width, slot, [&](int to, int from) { std::memcpy(record + to * 2, tile + from * 2, 2); });
    std::byte* codes = record + record_codes(spec, shape.width);
    for_codes(shape.side, shape.width, slot, tile + uniform_scale_bytes(spec, shape.width),
              [&](int c, const std::byte* from, int n, int stride) {
                for (int i = 0; i < n; ++i) codes[c + i] = from[i * stride];
              });
  }

  void decode(const CodecSpec& spec, int width, const std::byte* record, float* x) const override {
    const int groups = scale_groups(spec, width);
    const auto half = [record](int index) {
      uint16_t h;
      std::memcpy(&h, record + index * 2, 2);
      return f16_to_f32(h);
    };
    const auto* codes = reinterpret_cast<const uint8_t*>(record) + record_codes(spec, width);
    const float centre = code_centre(spec.bits);
    for (int g = 0; g < groups; ++g) {
      const int end = std::min(width, (g + 1) * spec.group);
      const float scale = half(g), mid = spec.zero_point ? half(groups + g) : 0.0f;
      for (int c = g * spec.group; c < end; ++c) x[c] = mid + scale * (static_cast<float>(codes[c]) - centre);
    }
  }
};

}  // namespace

void encode_uniform_rows(const CodecSpec& spec, int width, int n, const float* x, const float* columns, std::byte* records) {
  const int groups = scale_groups(spec, width);
  for (int r = 0; r < n; ++r) {
    const float* row = x + static_cast<ptrdiff_t>(r) * width;
    std::byte* record = records + static_cast<size_t>(r) * uniform_record_bytes(spec, width);
    auto* codes = reinterpret_cast<uint8_t*>(record) + record_codes(spec, width);
    for (int g = 0; g < groups; ++g) {
      const int first = g * spec.group, count = std::min(spec.group, width - first);
      float values[kMaxGroup] = {};
      for (int i = 0; i < count; ++i) values[i] = std::isfinite(row[first + i]) ? row[first + i] : 0.0f;
      const GroupScale scale = quantize_group(values, count, spec.bits, spec.fit, spec.zero_point, codes + first);
      std::memcpy(record + g * 2, &scale.scale, 2);
      if (spec.zero_point) std::memcpy(record + (groups + g) * 2, &scale.mid, 2);
    }
  }
  if (columns != nullptr) encode_with_feedback(n, spec, width, x, columns, records, add_error);
}

const RowCodec& uniform_rows() {
  static const UniformRows rows;
  return rows;
}

void feedback_columns(const float* feedback, int width, float* columns) {
  std::fill_n(columns, static_cast<ptrdiff_t>(width) * width, 0.0f);
  for (int k = 0; k < width; ++k) {
    for (int c = 0; c < k; ++c) columns[static_cast<ptrdiff_t>(c) * width + k] = *feedback++;
  }
}

}  // namespace kvmix
