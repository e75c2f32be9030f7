#include "codec/row.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/fp16.h"
#include "codec/quantize.h"
#include "codec/row_feedback.h"

namespace kvmix {
namespace {

// Where the tile keeps the codes of one token: visit(first channel, pointer, count, stride of the pointer).
template <typename Byte, typename Visit>
void for_codes(Side side, int head_dim, int slot, Byte* codes, Visit visit) {
  const TileGeometry geometry = tile_geometry(side, head_dim);
  if (side == Side::kKey) {
    for (int c = 0; c < head_dim; c += kUnitReduce) {
      visit(c, codes + unit_index(geometry, slot, c) * kUnitCodes + byte_in_unit(slot, c), kUnitReduce, 1);
    }
  } else {
    for (int c = 0; c < head_dim; c += kUnitLanes) {
      visit(c, codes + unit_index(geometry, c, slot) * kUnitCodes + byte_in_unit(c, slot), kUnitLanes, kUnitReduce);
    }
  }
}

// visit(index in the record, index in the tile) of every fp16 number of a token.
template <typename Visit>
void for_scales(const CodecSpec& spec, int head_dim, int slot, Visit visit) {
  const int groups = scale_groups(spec, head_dim), parts = spec.zero_point ? 2 : 1;
  for (int part = 0; part < parts; ++part) {
    for (int g = 0; g < groups; ++g) visit(part * groups + g, part * groups * kPageTokens + g * kPageTokens + slot);
  }
}

size_t record_codes(const CodecSpec& spec, int head_dim) { return row_bytes(spec, head_dim) - static_cast<size_t>(head_dim); }

void add_error(float* wanted, const float* column, float error, int first, int head_dim) {
  for (int k = first; k < head_dim; ++k) wanted[k] = wanted[k] + column[k] * error;
}

}  // namespace

void encode_rows(const CodecSpec& spec, int head_dim, int n, const float* x, const float* columns, std::byte* records) {
  const int groups = scale_groups(spec, head_dim);
  for (int r = 0; r < n; ++r) {
    const float* row = x + static_cast<ptrdiff_t>(r) * head_dim;
    std::byte* record = records + static_cast<size_t>(r) * row_bytes(spec, head_dim);
    auto* codes = reinterpret_cast<uint8_t*>(record) + record_codes(spec, head_dim);
    for (int g = 0; g < groups; ++g) {
      const int first = g * spec.group, width = std::min(spec.group, head_dim - first);
      float values[kMaxGroup] = {};
      for (int i = 0; i < width; ++i) values[i] = std::isfinite(row[first + i]) ? row[first + i] : 0.0f;
      const GroupScale scale = quantize_group(values, width, spec.bits, spec.fit, spec.zero_point, codes + first);
      std::memcpy(record + g * 2, &scale.scale, 2);
      if (spec.zero_point) std::memcpy(record + (groups + g) * 2, &scale.mid, 2);
    }
  }
  if (columns != nullptr) encode_with_feedback(n, spec, head_dim, x, columns, records, add_error);
}

void feedback_columns(const float* feedback, int head_dim, float* columns) {
  std::fill_n(columns, static_cast<ptrdiff_t>(head_dim) * head_dim, 0.0f);
  for (int k = 0; k < head_dim; ++k) {
    for (int c = 0; c < k; ++c) columns[static_cast<ptrdiff_t>(c) * head_dim + k] = *feedback++;
  }
}

void store_row(const CodecSpec& spec, Side side, int head_dim, const std::byte* record, int slot, std::byte* tile) {
  for_scales(spec, head_dim, slot, [&](int from, int to) { std::memcpy(tile + to * 2, record + from * 2, 2); });
  const std::byte* codes = record + record_codes(spec, head_dim);
  for_codes(side, head_dim, slot, tile + tile_scale_bytes(spec, head_dim), [&](int c, std::byte* to, int n, int stride) {
    for (int i = 0; i < n; ++i) to[i * stride] = codes[c + i];
  });
}

void load_row(const CodecSpec& spec, Side side, int head_dim, const std::byte* tile, int slot, std::byte* record) {
  for_scales(spec, head_dim, slot, [&](int to, int from) { std::memcpy(record + to * 2, tile + from * 2, 2); });
  std::byte* codes = record + record_codes(spec, head_dim);
  for_codes(side, head_dim, slot, tile + tile_scale_bytes(spec, head_dim),
            [&](int c, const std::byte* from, int n, int stride) {
              for (int i = 0; i < n; ++i) codes[c + i] = from[i * stride];
            });
}

void decode_row(const CodecSpec& spec, int head_dim, const std::byte* record, float* x) {
  const int groups = scale_groups(spec, head_dim);
  const auto half = [record](int index) {
    uint16_t h;
    std::memcpy(&h, record + index * 2, 2);
    return f16_to_f32(h);
  };
  const auto* codes = reinterpret_cast<const uint8_t*>(record) + record_codes(spec, head_dim);
  const float centre = code_centre(spec.bits);
  for (int g = 0; g < groups; ++g) {
    const int end = std::min(head_dim, (g + 1) * spec.group);
    const float scale = half(g), mid = spec.zero_point ? half(groups + g) : 0.0f;
    for (int c = g * spec.group; c < end; ++c) x[c] = mid + scale * (static_cast<float>(codes[c]) - centre);
  }
}

}  // namespace kvmix
