// Single rows of tiles that are filled token by token, of whichever family (RowCodec).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "codec/codec_family.h"

namespace kvmix {

// Room for one record of any codec: 8-bit codes of the widest row with the numbers of its groups.
inline constexpr size_t kMostRowBytes = 2 * sizeof(uint16_t) * kMostWidth / kCodecGroups.front() + kMostWidth;

// False for f16, whose rows are fp16 numbers next to each other.
bool takes_rows(const CodecSpec& spec);
// What recent rows may be, for messages: f16, and the spellings that take rows.
std::string recent_codecs();

// The functions of the spec's TileEncoder and RowCodec; only for specs that take rows. No allocation.
size_t row_bytes(const CodecSpec& spec, int width);
void encode_rows(const CodecSpec& spec, int width, int n, const float* x, const float* columns, std::byte* records);
void store_row(const CodecSpec& spec, Side side, int width, const std::byte* record, int slot, std::byte* tile);
void load_row(const CodecSpec& spec, Side side, int width, const std::byte* tile, int slot, std::byte* record);
void decode_row(const CodecSpec& spec, int width, const std::byte* record, float* x);

// One head's `feedback` (TransformSpec) as encode_rows takes it, [width][width]: columns[c * width + k] is the weight with
// which the error of channel c is added to a later channel k, 0 for k <= c.
void feedback_columns(const float* feedback, int width, float* columns);

}  // namespace kvmix
