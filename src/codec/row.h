// Single rows of tiles that are filled token by token: codecs whose scales belong to a token and whose codes are whole bytes.
//
// A *row record* is a token by itself, as it is saved: fp16 scales [ceil(head_dim / group)], with a zero point as many
// midpoints, then head_dim codes, a byte each. TileEncoder::encode_rows makes them of floats.
#pragma once

#include <cstddef>
#include <cstdint>

#include "codec/tile_layout.h"
#include "kvmix/codec.h"

namespace kvmix {

constexpr bool takes_rows(const CodecSpec& spec) {
  return spec.bits == 8 && spec.axis == Axis::kToken && spec.fit == Fit::kMinMax;
}

// What recent rows may be, for messages.
inline constexpr const char* kRecentCodecs = "f16 or int8.token.g{32,64,128}.minmax.{zero,sym}";

constexpr size_t row_bytes(const CodecSpec& spec, int head_dim) {
  return static_cast<size_t>(scale_groups(spec, head_dim)) * (spec.zero_point ? 2 : 1) * sizeof(uint16_t) +
         static_cast<size_t>(head_dim);
}
inline constexpr size_t kMostRowBytes = 2 * sizeof(uint16_t) * 8 + 256;  // head_dim 256 in groups of 32

// TileEncoder::encode_rows, the serial reference: records, one after the other, of n rows x [n][head_dim], with the scales and
// codes that encode_tile would give these tokens. With error feedback, unless `columns` is null: the same scales, and the codes
// that feedback_tile gives; columns[c * head_dim + k] is the weight with which the error of channel c is added to a later
// channel k, 0 for k <= c.
void encode_rows(const CodecSpec& spec, int head_dim, int n, const float* x, const float* columns, std::byte* records);
// One head's `feedback` (TransformSpec) as such columns, [head_dim][head_dim].
void feedback_columns(const float* feedback, int head_dim, float* columns);
// Moves the record of a token's row into the tile's slot for it, 0 to kPageTokens - 1, and back. Other slots stay as they are.
void store_row(const CodecSpec& spec, Side side, int head_dim, const std::byte* record, int slot, std::byte* tile);
void load_row(const CodecSpec& spec, Side side, int head_dim, const std::byte* tile, int slot, std::byte* record);
// The numbers of a record.
void decode_row(const CodecSpec& spec, int head_dim, const std::byte* record, float* x);

}  // namespace kvmix
