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
  void (*to_f16)(const float* x, int n, uint16_t* out);  // round to nearest even; n is a multiple of 16
};

// Fastest first; the last one is the serial reference.
std::span<const TileEncoder* const> tile_encoders();
// The fastest that this machine can run.
const TileEncoder& best_tile_encoder();

}  // namespace kvmix
