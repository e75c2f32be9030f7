// The serial reference of the uniform family: tiles.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/fp16.h"
#include "codec/quantize.h"
#include "codec/tile_layout.h"
#include "codec/uniform.h"
#include "codec/unpack_tile.h"

namespace kvmix {
namespace {

// Calls visit(first token, token count, first channel, channel count, scale index) for every group of a tile.
template <typename Visit>
void for_each_group(const CodecSpec& spec, int width, Visit visit) {
  if (spec.axis == Axis::kChannel) {
    for (int t = 0; t < kPageTokens; t += spec.group) {
      for (int c = 0; c < width; ++c) visit(t, spec.group, c, 1, scale_index(spec, width, t, c));
    }
  } else {
    for (int c = 0; c < width; c += spec.group) {
      const int n = std::min(spec.group, width - c);
      for (int t = 0; t < kPageTokens; ++t) visit(t, 1, c, n, scale_index(spec, width, t, c));
    }
  }
}

float finite(float v) { return std::isfinite(v) ? v : 0.0f; }

// A scale or midpoint of a tile, or a number of an fp16 one.
float stored_half(const std::byte* tile, int index) {
  uint16_t h;
  std::memcpy(&h, tile + static_cast<size_t>(index) * sizeof h, sizeof h);
  return f16_to_f32(h);
}

void encode_plain(const CodecSpec& spec, Side side, int width, const uint16_t* x, std::byte* out) {
  const size_t scale_bytes = uniform_scale_bytes(spec, width);
  std::memset(out, 0, uniform_bytes(spec, width));
  auto* codes = reinterpret_cast<uint8_t*>(out + scale_bytes);
  const TileGeometry geometry = tile_geometry(side, width);
  const int mids_at = scale_count(spec, width);
  for_each_group(spec, width, [&](int token, int tokens, int channel, int channels, int index) {
    float values[kMaxGroup] = {};
    uint8_t group_codes[kMaxGroup];
    int n = 0;
    for (int t = token; t < token + tokens; ++t) {
      for (int c = channel; c < channel + channels; ++c) values[n++] = finite(f16_to_f32(x[t * width + c]));
    }
    const GroupScale g = quantize_group(values, n, spec.bits, spec.fit, spec.zero_point, group_codes);
    std::memcpy(out + static_cast<size_t>(index) * 2, &g.scale, 2);
    if (spec.zero_point) std::memcpy(out + static_cast<size_t>(mids_at + index) * 2, &g.mid, 2);
    n = 0;
    for (int t = token; t < token + tokens; ++t) {
      for (int c = channel; c < channel + channels; ++c) {
        const int lane = side == Side::kKey ? t : c, reduce = side == Side::kKey ? c : t;
        put_code(spec.bits, codes, unit_index(geometry, lane, reduce), byte_in_unit(lane, reduce), group_codes[n++]);
      }
    }
  });
}

// Rounds the codes of a tile that encode_plain wrote anew.
void feed_back(const CodecSpec& spec, Side side, int width, const uint16_t* x, const float* feedback, std::byte* tile) {
  const size_t scale_bytes = uniform_scale_bytes(spec, width);
  const int mids_at = scale_count(spec, width);
  const float centre = code_centre(spec.bits), top = static_cast<float>((1 << spec.bits) - 1);
  const TileGeometry geometry = tile_geometry(side, width);
  auto* codes = reinterpret_cast<uint8_t*>(tile + scale_bytes);
  std::memset(codes, 0, uniform_bytes(spec, width) - scale_bytes);
  for (int t = 0; t < kPageTokens; ++t) {
    float errors[kMostWidth];
    const float* weights = feedback;
    for (int c = 0; c < width; ++c) {
      const float exact = finite(f16_to_f32(x[t * width + c]));
      float wanted = exact;
      for (int i = 0; i < c; ++i) wanted = wanted + weights[i] * errors[i];
      weights += c;
      const int index = scale_index(spec, width, t, c);
      const float scale = stored_half(tile, index), mid = spec.zero_point ? stored_half(tile, mids_at + index) : 0.0f;
      const float code = quantize_code(finite(wanted), code_map(scale, mid, top), top);
      errors[c] = exact - (mid + scale * (code - centre));
      const int lane = side == Side::kKey ? t : c, reduce = side == Side::kKey ? c : t;
      put_code(spec.bits, codes, unit_index(geometry, lane, reduce), byte_in_unit(lane, reduce), static_cast<int>(code));
    }
  }
}

}  // namespace

void encode_uniform(const CodecSpec& spec, const TileShape& shape, const uint16_t* x, const float* feedback, std::byte* out) {
  if (spec.is_f16()) {
    std::memcpy(out, x, uniform_bytes(spec, shape.width));
    return;
  }
  encode_plain(spec, shape.side, shape.width, x, out);
  if (feedback != nullptr) feed_back(spec, shape.side, shape.width, x, feedback, out);
}

void decode_uniform(const CodecSpec& spec, const TileShape& shape, const std::byte* in, float* x) {
  const Side side = shape.side;
  const int width = shape.width;
  if (spec.is_f16()) {
    for (int i = 0; i < kPageTokens * width; ++i) x[i] = stored_half(in, i);
    return;
  }
  const int scales = scale_count(spec, width);
  const auto* codes = reinterpret_cast<const uint8_t*>(in + uniform_scale_bytes(spec, width));
  const float centre = code_centre(spec.bits);
  constexpr int kMostScales = kPageTokens * kMostWidth / kCodecGroups.front();
  float mids[kMostScales] = {}, sizes[kMostScales];
  for (int i = 0; i < scales; ++i) {
    sizes[i] = stored_half(in, i);
    if (spec.zero_point) mids[i] = stored_half(in, scales + i);
  }
  uint8_t unpacked[kPageTokens * kMostWidth];
  unpack_tile(spec.bits, codes, side, width, unpacked);
  for (int t = 0; t < kPageTokens; ++t) {
    const uint8_t* code = unpacked + t * width;
    float* row = x + t * width;
    if (spec.axis == Axis::kChannel) {
      const float *mid = mids + scale_index(spec, width, t, 0), *size = sizes + scale_index(spec, width, t, 0);
      for (int c = 0; c < width; ++c) row[c] = mid[c] + size[c] * (static_cast<float>(code[c]) - centre);
    } else {
      for (int first = 0; first < width; first += spec.group) {
        const float mid = mids[scale_index(spec, width, t, first)], size = sizes[scale_index(spec, width, t, first)];
        const int end = std::min(width, first + spec.group);
        for (int c = first; c < end; ++c) row[c] = mid + size * (static_cast<float>(code[c]) - centre);
      }
    }
  }
}

}  // namespace kvmix
