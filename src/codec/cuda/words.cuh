// A lane's words of one block of codes (codec/cuda/tile_layout.h).
#pragma once

#include <cstdint>

#include "codec/cuda/tile_layout.h"

namespace kvmix::cuda {

// From shared memory or, where nothing writes them meanwhile, through `load` (__ldg).
template <int bits, class Load>
__device__ inline void load_words(const uint8_t* block, int lane, uint32_t (&w)[block_words(bits)], const Load& load) {
#pragma unroll
  for (int i = 0; i < block_words(bits) / 4; ++i) {
    const uint4 v = load(reinterpret_cast<const uint4*>(block + 512 * i) + lane);
    w[4 * i] = v.x, w[4 * i + 1] = v.y, w[4 * i + 2] = v.z, w[4 * i + 3] = v.w;
  }
  if constexpr (block_words(bits) % 4 == 2) {
    const uint2 v = load(reinterpret_cast<const uint2*>(block + 512 * (block_words(bits) / 4)) + lane);
    w[block_words(bits) - 2] = v.x, w[block_words(bits) - 1] = v.y;
  }
}
template <int bits>
__device__ inline void load_words(const uint8_t* block, int lane, uint32_t (&w)[block_words(bits)]) {
  load_words<bits>(block, lane, w, [](const auto* at) { return *at; });
}
template <int bits>
__device__ inline void load_codes(const uint8_t* block, int lane, uint32_t (&w)[block_words(bits)]) {
  load_words<bits>(block, lane, w, [](const auto* at) { return __ldg(at); });
}

}  // namespace kvmix::cuda
