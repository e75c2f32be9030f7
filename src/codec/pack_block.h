// Codes, one a byte, into the vectors of a block. Internal linkage: included once per instruction set.
#pragma once

#include <cstdint>

#include "codec/tile_layout.h"

namespace kvmix {
namespace {

// Packs the 8 units of a block, one code a byte, into `bits` vectors (tile_layout.h).
template <int kBits>
inline void pack_block(const uint8_t* c, uint8_t* out) {
  constexpr int kV = kVectorBytes;
  const auto byte = [](int v) { return static_cast<uint8_t>(v); };
  for (int i = 0; i < kV; ++i) {
    const auto at = [c, i](int f) { return static_cast<int>(c[f * kV + i]); };
    if constexpr (kBits == 1) {
      out[i] = byte(at(0) | at(1) << 1 | at(2) << 2 | at(3) << 3 | at(4) << 4 | at(5) << 5 | at(6) << 6 | at(7) << 7);
    } else if constexpr (kBits == 2) {
      out[i] = byte(at(0) | at(1) << 2 | at(2) << 4 | at(3) << 6);
      out[kV + i] = byte(at(4) | at(5) << 2 | at(6) << 4 | at(7) << 6);
    } else if constexpr (kBits == 3) {
      const int rest = at(6) | at(7) << 3;
      out[i] = byte(at(0) | at(1) << 3 | (rest & 3) << 6);
      out[kV + i] = byte(at(2) | at(3) << 3 | (rest >> 2 & 3) << 6);
      out[2 * kV + i] = byte(at(4) | at(5) << 3 | (rest >> 4) << 6);
    } else if constexpr (kBits == 4 || kBits == 5 || kBits == 6) {
      for (int v = 0; v < 4; ++v) out[v * kV + i] = byte((at(2 * v) & 15) | (at(2 * v + 1) & 15) << 4);
      if constexpr (kBits == 5) {
        int plane = 0;
        for (int f = 0; f < 8; ++f) plane |= (at(f) >> 4) << f;
        out[4 * kV + i] = byte(plane);
      }
      if constexpr (kBits == 6) {
        for (int v = 0; v < 2; ++v) {
          int plane = 0;
          for (int f = 0; f < 4; ++f) plane |= (at(4 * v + f) >> 4) << (2 * f);
          out[(4 + v) * kV + i] = byte(plane);
        }
      }
    } else {
      static_assert(kBits == 8, "no layout is written for this width");
      for (int f = 0; f < kBlockUnits; ++f) out[f * kV + i] = c[f * kV + i];
    }
  }
}

}  // namespace
}  // namespace kvmix
