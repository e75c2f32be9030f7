// The serial reference of the uniform family: fp16 and integers of 1 to 8 bits (kvmix/codec.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "codec/codec_family.h"

namespace kvmix {

// As TileEncoder's functions.
void encode_uniform(const CodecSpec& spec, const TileShape& shape, const uint16_t* x, const float* feedback, std::byte* out);
void encode_uniform_rows(const CodecSpec& spec, int width, int n, const float* x, const float* columns, std::byte* records);
// As Codec::decode.
void decode_uniform(const CodecSpec& spec, const TileShape& shape, const std::byte* tile, float* x);
// The rows of the specs that take them.
const RowCodec& uniform_rows();

}  // namespace kvmix
