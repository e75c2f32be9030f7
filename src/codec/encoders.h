// Implementations of encode_tile. All write the same bytes; the tests run through this registry.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kvmix/codec.h"

namespace kvmix {

struct TileEncoder {
  const char* name;
  bool (*available)();
  void (*encode)(const CodecSpec& spec, Side side, int head_dim, const uint16_t* x, std::byte* out);  // as encode_tile
  // The same scales; then codes, channel after channel, every channel after the errors of those before it were added with the
  // weights of `feedback` (TransformSpec), [head_dim (head_dim - 1) / 2]. As encode_tile and feedback_tile. Not for fp16.
  void (*encode_feedback)(const CodecSpec& spec, Side side, int head_dim, const uint16_t* x, const float* feedback,
                          std::byte* tile);
  void (*to_f16)(const float* x, int n, uint16_t* out);  // round to nearest even; n is a multiple of 16
  // As the function of row.h, for codecs that take rows.
  void (*encode_rows)(const CodecSpec& spec, int head_dim, int n, const float* x, const float* columns, std::byte* records);

  // A tile with error feedback, unless that is null.
  void encode_with(const CodecSpec& spec, Side side, int head_dim, const uint16_t* x, const float* weights,
                   std::byte* out) const {
    if (weights != nullptr && !spec.is_f16()) {
      encode_feedback(spec, side, head_dim, x, weights, out);
    } else {
      encode(spec, side, head_dim, x, out);
    }
  }
};

// Fastest first; the last one is the serial reference.
std::span<const TileEncoder* const> tile_encoders();
// The fastest that this machine can run.
const TileEncoder& best_tile_encoder();

}  // namespace kvmix
