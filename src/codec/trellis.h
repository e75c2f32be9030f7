// The trellis family's parts that its encoders and the kernels share. A tile: scales, a byte each (trellis_code.h),
// [ceil(width / 128)][tokens]; with a zero point a byte for every channel, signed, that times the largest scale of the tile is
// the channel's offset, padded to 64 bytes; then codes in the uniform family's order (tile_layout.h).
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "codec/codec_family.h"
#include "codec/trellis_code.h"

namespace kvmix {

// Whether a spec is of this family, and the one that suits a side: keys have offsets.
bool is_trellis(const CodecSpec& spec);
CodecSpec trellis_spec(int bits, Side side);

constexpr int trellis_groups(int width) { return (width + kTrellisGroup - 1) / kTrellisGroup; }
constexpr size_t trellis_offsets_at(int width) { return static_cast<size_t>(trellis_groups(width)) * kPageTokens; }
constexpr size_t trellis_head_bytes(const CodecSpec& spec, int width) {
  const size_t offsets = spec.zero_point ? (static_cast<size_t>(width) + kVectorBytes - 1) / kVectorBytes * kVectorBytes : 0;
  return trellis_offsets_at(width) + offsets;
}
constexpr size_t trellis_bytes(const CodecSpec& spec, int width) {
  return trellis_head_bytes(spec, width) + static_cast<size_t>(kPageTokens) * static_cast<size_t>(width * spec.bits) / 8;
}

constexpr float trellis_scale(uint8_t stored) {
  return stored == 0 ? 0.0f : std::bit_cast<float>(kScaleBase + (static_cast<uint32_t>(stored) << kScaleShift));
}
// The nearest that can be stored; what is smaller than the least is 0.
constexpr uint8_t store_trellis_scale(float scale) {
  const uint32_t bits = std::bit_cast<uint32_t>(scale), half = 1u << (kScaleShift - 1);
  if (!(scale > 0.0f) || bits + half < kScaleBase + (1u << kScaleShift)) return 0;
  return static_cast<uint8_t>(std::min((bits + half - kScaleBase) >> kScaleShift, 255u));
}

// Returns f(std::integral_constant<int, bits>()) for a width of the family's codes.
template <size_t kIndex = 0, class F>
constexpr auto with_trellis_bits(int bits, const F& f) -> decltype(f(std::integral_constant<int, 2>())) {
  if constexpr (kIndex == kTrellisBits.size()) {
    unknown_code_bits(bits);
  } else {
    if (bits == kTrellisBits[kIndex]) return f(std::integral_constant<int, kTrellisBits[kIndex]>());
    return with_trellis_bits<kIndex + 1>(bits, f);
  }
}

}  // namespace kvmix
