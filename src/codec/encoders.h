// The implementations of the uniform family, and of rounding rows to fp16. All write the same bytes; the tests run through
// them.
#pragma once

#include <cstdint>
#include <span>

#include "codec/codec_family.h"

namespace kvmix {

// Fastest first; the last one is the serial reference.
std::span<const TileEncoder* const> tile_encoders();

// Rounds floats to the nearest fp16, ties to even; n is a multiple of 16.
struct HalfEncoder {
  const char* name;
  bool (*available)();
  void (*to_f16)(const float* x, int n, uint16_t* out);
};
// Fastest first; the last one is the serial reference.
std::span<const HalfEncoder* const> half_encoders();
// With the fastest that this machine can run.
void to_f16(const float* x, int n, uint16_t* out);

}  // namespace kvmix
