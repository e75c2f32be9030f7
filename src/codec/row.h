// Single rows of tiles that are filled token by token: codecs whose scales belong to a token and whose codes are whole bytes.
//
// A *row record* is a token by itself, as it is saved: fp16 scales [ceil(head_dim / group)], with a zero point as many
// midpoints, then head_dim codes, a byte each. TileEncoder::encode_row makes one of floats.
#pragma once

#include <cstddef>
#include <cstdint>

#include "codec/tile_layout.h"
#include "kvmix/codec.h"

namespace kvmix {

constexpr bool takes_rows(const CodecSpec& spec) {
  return spec.bits == 8 && spec.axis == Axis::kToken && spec.fit == Fit::kMinMax;
}

constexpr size_t row_bytes(const CodecSpec& spec, int head_dim) {
  return static_cast<size_t>(scale_groups(spec, head_dim)) * (spec.zero_point ? 2 : 1) * sizeof(uint16_t) +
         static_cast<size_t>(head_dim);
}
inline constexpr size_t kMostRowBytes = 2 * sizeof(uint16_t) * 8 + 256;  // head_dim 256 in groups of 32

// TileEncoder::encode_row, the serial reference: the scales and codes that encode_tile would give this token.
void encode_row(const CodecSpec& spec, int head_dim, const float* x, std::byte* record);
// Moves the record of a token's row into the tile's slot for it, 0 to kPageTokens - 1, and back. Other slots stay as they are.
void store_row(const CodecSpec& spec, Side side, int head_dim, const std::byte* record, int slot, std::byte* tile);
void load_row(const CodecSpec& spec, Side side, int head_dim, const std::byte* tile, int slot, std::byte* record);
// The numbers of a record.
void decode_row(const CodecSpec& spec, int head_dim, const std::byte* record, float* x);

}  // namespace kvmix
