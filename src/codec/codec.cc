// The serial reference codecs, their names and their registry.
#include "kvmix/codec.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <string>

#include "codec/quantize.h"
#include "codec/tile_layout.h"
#include "kvmix/error.h"

namespace kvmix {
namespace {

const std::array<CodecInfo, 8> kCodecs = {{
    {"int1", 1, "two levels per group"},
    {"int2", 2, "four levels, four codes a byte"},
    {"int3", 3, "eight levels at 3.0 bits of codes"},
    {"int4", 4, "sixteen levels, two codes a byte"},
    {"int5", 5, "int4 codes and a bit plane"},
    {"int6", 6, "int4 codes and a plane of two bits"},
    {"int8", 8, "256 levels, a byte a code"},
    {"f16", 16, "half precision, as it came"},
}};

bool is_width(int bits) {
  return std::any_of(kCodecs.begin(), kCodecs.end(), [bits](const CodecInfo& c) { return c.bits == bits; });
}

size_t round_up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Calls visit(first token, token count, first channel, channel count, scale index) for every group of a tile.
template <typename Visit>
void for_each_group(const CodecSpec& spec, int head_dim, Visit visit) {
  if (spec.axis == Axis::kChannel) {
    for (int t = 0; t < kPageTokens; t += spec.group) {
      for (int c = 0; c < head_dim; ++c) visit(t, spec.group, c, 1, scale_index(spec, head_dim, t, c));
    }
  } else {
    for (int c = 0; c < head_dim; c += spec.group) {
      const int n = std::min(spec.group, head_dim - c);
      for (int t = 0; t < kPageTokens; ++t) visit(t, 1, c, n, scale_index(spec, head_dim, t, c));
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

// All codes of a block of 8 units, a byte each.
void unpack_block(int bits, const uint8_t* block, uint8_t* out) {
  for (int f = 0; f < kBlockUnits; ++f) {
    for (int i = 0; i < kUnitCodes; ++i) out[f * kUnitCodes + i] = static_cast<uint8_t>(get_code(bits, block, f, i));
  }
}

}  // namespace

std::string to_string(const CodecSpec& spec) {
  if (spec.is_f16()) return "f16";
  return "int" + std::to_string(spec.bits) + (spec.axis == Axis::kChannel ? ".channel" : ".token") + ".g" +
         std::to_string(spec.group) + (spec.fit == Fit::kMinMax ? ".minmax" : ".fitted") + (spec.zero_point ? ".zero" : ".sym");
}

CodecSpec parse_codec(const std::string& text) {
  if (text == "f16") return CodecSpec{};
  // The set is small: comparing with every name accepts exactly what to_string writes.
  for (const CodecSpec& spec : all_codec_specs()) {
    if (to_string(spec) == text) return spec;
  }
  throw Error(Status::kInvalidArgument,
              "codec \"" + text.substr(0, 80) +
                  "\" is unknown; expected f16 or int{1,2,3,4,5,6,8}.{channel,token}.g{32,64,128}.{minmax,fitted}.{zero,sym}");
}

void check_codec(const CodecSpec& spec, int head_dim) {
  if (head_dim < 32 || head_dim > 256 || head_dim % 16 != 0) {
    throw Error(Status::kInvalidArgument,
                "head_dim " + std::to_string(head_dim) + " is not supported; it must be a multiple of 16 from 32 to 256");
  }
  if (!is_width(spec.bits)) {
    throw Error(Status::kInvalidArgument,
                "codec width " + std::to_string(spec.bits) + " is unknown; expected 1, 2, 3, 4, 5, 6, 8 or 16");
  }
  if (!spec.is_f16() && spec.group != 32 && spec.group != 64 && spec.group != 128) {
    throw Error(Status::kInvalidArgument, "codec group " + std::to_string(spec.group) + " is unknown; expected 32, 64 or 128");
  }
}

size_t tile_scale_bytes(const CodecSpec& spec, int head_dim) {
  if (spec.is_f16()) return 0;
  const auto values = static_cast<size_t>(scale_count(spec, head_dim)) * (spec.zero_point ? 2 : 1);
  return round_up(values * sizeof(uint16_t), kVectorBytes);
}

size_t tile_bytes(const CodecSpec& spec, int head_dim) {
  const size_t codes = static_cast<size_t>(kPageTokens) * static_cast<size_t>(head_dim) * static_cast<size_t>(spec.bits) / 8;
  return tile_scale_bytes(spec, head_dim) + codes;
}

void encode_tile(const CodecSpec& spec, Side side, int head_dim, const uint16_t* x, std::byte* out) {
  const size_t bytes = tile_bytes(spec, head_dim), scale_bytes = tile_scale_bytes(spec, head_dim);
  if (spec.is_f16()) {
    std::memcpy(out, x, bytes);
    return;
  }
  std::memset(out, 0, bytes);
  auto* codes = reinterpret_cast<uint8_t*>(out + scale_bytes);
  const TileGeometry geometry = tile_geometry(side, head_dim);
  const int mids_at = scale_count(spec, head_dim);
  for_each_group(spec, head_dim, [&](int token, int tokens, int channel, int channels, int index) {
    float values[kMaxGroup] = {};
    uint8_t group_codes[kMaxGroup];
    int n = 0;
    for (int t = token; t < token + tokens; ++t) {
      for (int c = channel; c < channel + channels; ++c) values[n++] = finite(f16_to_f32(x[t * head_dim + c]));
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

void feedback_tile(const CodecSpec& spec, Side side, int head_dim, const uint16_t* x, const float* feedback, std::byte* tile) {
  const size_t scale_bytes = tile_scale_bytes(spec, head_dim);
  const int mids_at = scale_count(spec, head_dim);
  const float centre = code_centre(spec.bits), top = static_cast<float>((1 << spec.bits) - 1);
  const TileGeometry geometry = tile_geometry(side, head_dim);
  auto* codes = reinterpret_cast<uint8_t*>(tile + scale_bytes);
  std::memset(codes, 0, tile_bytes(spec, head_dim) - scale_bytes);
  for (int t = 0; t < kPageTokens; ++t) {
    float errors[256];
    const float* weights = feedback;
    for (int c = 0; c < head_dim; ++c) {
      const float exact = finite(f16_to_f32(x[t * head_dim + c]));
      float wanted = exact;
      for (int i = 0; i < c; ++i) wanted = wanted + weights[i] * errors[i];
      weights += c;
      const int index = scale_index(spec, head_dim, t, c);
      const float scale = stored_half(tile, index), mid = spec.zero_point ? stored_half(tile, mids_at + index) : 0.0f;
      const float code = quantize_code(finite(wanted), code_map(scale, mid, top), top);
      errors[c] = exact - (mid + scale * (code - centre));
      const int lane = side == Side::kKey ? t : c, reduce = side == Side::kKey ? c : t;
      put_code(spec.bits, codes, unit_index(geometry, lane, reduce), byte_in_unit(lane, reduce), static_cast<int>(code));
    }
  }
}

void decode_tile(const CodecSpec& spec, Side side, int head_dim, const std::byte* in, float* x) {
  if (spec.is_f16()) {
    for (int i = 0; i < kPageTokens * head_dim; ++i) x[i] = stored_half(in, i);
    return;
  }
  const int scales = scale_count(spec, head_dim);
  const auto* codes = reinterpret_cast<const uint8_t*>(in + tile_scale_bytes(spec, head_dim));
  const float centre = code_centre(spec.bits);
  const TileGeometry geometry = tile_geometry(side, head_dim);
  const int lane_blocks = geometry.lanes / kUnitLanes, quads = geometry.reduce / kUnitReduce;
  uint8_t block[kBlockUnits * kUnitCodes];
  int unit = 0;
  for (int first = 0; first < lane_blocks; first += kLaneGroupBlocks) {
    const int in_group = std::min(kLaneGroupBlocks, lane_blocks - first);
    for (int quad = 0; quad < quads; ++quad) {
      for (int b = 0; b < in_group; ++b, ++unit) {
        if (unit % kBlockUnits == 0) {
          unpack_block(spec.bits, codes + static_cast<ptrdiff_t>(unit / kBlockUnits) * spec.bits * kVectorBytes, block);
        }
        const uint8_t* q = block + (unit % kBlockUnits) * kUnitCodes;
        for (int i = 0; i < kUnitCodes; ++i) {
          const int lane = (first + b) * kUnitLanes + i / kUnitReduce, reduce = quad * kUnitReduce + i % kUnitReduce;
          const int token = side == Side::kKey ? lane : reduce, channel = side == Side::kKey ? reduce : lane;
          const int index = scale_index(spec, head_dim, token, channel);
          const float mid = spec.zero_point ? stored_half(in, scales + index) : 0.0f;
          x[token * head_dim + channel] = mid + stored_half(in, index) * (static_cast<float>(q[i]) - centre);
        }
      }
    }
  }
}

std::span<const CodecInfo> codecs() { return kCodecs; }

std::vector<CodecSpec> all_codec_specs() {
  std::vector<CodecSpec> specs;
  for (const CodecInfo& codec : kCodecs) {
    if (codec.bits == 16) continue;
    for (const Axis axis : {Axis::kChannel, Axis::kToken}) {
      for (const int group : {32, 64, 128}) {
        for (const Fit fit : {Fit::kMinMax, Fit::kLeastSquares}) {
          for (const bool zero : {true, false}) specs.push_back({codec.bits, axis, group, fit, zero});
        }
      }
    }
  }
  return specs;
}

}  // namespace kvmix
