// An open page's rows, fp16 or codes, as a tile of fp16 in shared memory, and what a row map makes of it.
#pragma once

#include <cuda_runtime.h>

#include "base/fp16.h"
#include "codec/cuda/feedback.cuh"
#include "codec/cuda/format.h"
#include "codec/cuda/hadamard.cuh"
#include "codec/cuda/tile_layout.h"
#include "codec/quantize.h"

namespace kvmix::cuda {

// What is not finite counts as zero.
__device__ inline uint32_t finite_pair(uint32_t v) {
  if ((v & 0x7c00u) == 0x7c00u) v &= 0xffff0000u;
  if ((v & 0x7c000000u) == 0x7c000000u) v &= 0xffffu;
  return v;
}
// The page's rows to the tile.
template <int dim, int threads>
__device__ inline void load_tile(const uint4* source, bool as_is, __half* tile) {
  constexpr int kOctets = dim / 8, kLoads = kPageTokens * kOctets / threads;
  const int thread = static_cast<int>(threadIdx.x);
  const auto place = [&](int i) {
    // Whole rows a turn, where they fit: a fixed step.
    const int row = threads % kOctets == 0 ? thread / kOctets + threads / kOctets * i : (thread + threads * i) / kOctets;
    const int octet = threads % kOctets == 0 ? thread % kOctets : (thread + threads * i) % kOctets;
    return reinterpret_cast<uint4*>(tile + row * tile_row(dim) + octet * 8);
  };
  const __half2 zero = __float2half2_rn(0.0f);
  __half2 odd = zero;  // becomes NaN where a number is not finite
#pragma unroll 8
  for (int i = 0; i < kLoads; ++i) {
    const uint4 v = __ldcs(source + thread + threads * i);
    for (const uint32_t pair : {v.x, v.y, v.z, v.w}) odd = __hfma2(reinterpret_cast<const __half2&>(pair), zero, odd);
    *place(i) = v;
  }
  if (as_is || !(__hisnan(__low2half(odd)) || __hisnan(__high2half(odd)))) return;
  for (int i = 0; i < kLoads; ++i) {
    uint4& v = *place(i);
    v = {finite_pair(v.x), finite_pair(v.y), finite_pair(v.z), finite_pair(v.w)};
  }
}

// The same from a side of an open page's record: numbers as Codec::decode gives them, rounded to fp16, what is not finite as 0.
template <int dim, bool key, int threads>
__device__ inline void load_record_tile(const uint8_t* part, const SideShape& side, __half* tile) {
  const auto* const meta = reinterpret_cast<const uint16_t*>(part + side.meta());
  const auto put = [&](int block, int field, int lane, int reg, int half, auto number) {
    const int row = lane / 4 + 8 * (reg % 2), column = 2 * (lane % 4) + 8 * (reg / 2) + half;  // fragment_cell's
    const int token = 16 * field + (key ? row : column), channel = 16 * block + (key ? column : row);
    tile[token * tile_row(dim) + channel] = number(token, channel);
  };
  // 16 bytes a turn: a field of fp16 numbers, or two of codes.
  const int fields = side.bits == 16 ? 1 : 2, chunks = kFields / fields;
  for (int at = static_cast<int>(threadIdx.x); at < dim / 16 * chunks * 32; at += threads) {
    const int lane = at % 32, chunk = at / 32 % chunks, block = at / 32 / chunks;
    const uint4 v = __ldcs(reinterpret_cast<const uint4*>(part + block * block_bytes(side.bits) + 512 * chunk) + lane);
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int reg = 0; reg < 4; ++reg) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t bits = words[reg] >> (16 * half) & 0xffffu;
        if (side.bits == 16) {
          put(block, chunk, lane, reg, half, [&](int, int) { return __ushort_as_half(static_cast<unsigned short>(bits)); });
          continue;
        }
#pragma unroll
        for (int field = 0; field < 2; ++field) {
          put(block, 2 * chunk + field, lane, reg, half, [&](int token, int channel) {
            const uint16_t* const scale = meta + side.scale_at(token, channel);
            const float code = static_cast<float>(bits >> (8 * field) & 0xffu);
            const __half h = __float2half_rn(f16_to_f32(scale[kMidStep]) + f16_to_f32(scale[0]) * (code - code_centre(8)));
            return __hisinf(h) || __hisnan(h) ? __float2half_rn(0.0f) : h;
          });
        }
      }
    }
  }
}

// Either, of a side of an open page (of shape `shape`); `as_is`: rows with what is not finite in them.
template <int dim, int threads>
__device__ inline void load_page(const uint8_t* open, const RecordShape& shape, bool key, bool as_is, __half* tile) {
  if (!shape.has_codes()) {
    load_tile<dim, threads>(reinterpret_cast<const uint4*>(open) + (key ? 0 : kPageTokens * dim / 8), as_is, tile);
  } else if (key) {
    load_record_tile<dim, true, threads>(open + kHeaderBytes, shape.key(), tile);
  } else {
    load_record_tile<dim, false, threads>(open + shape.key_bytes(), shape.value(), tile);
  }
}

// Every row of the tile as RowMapChain::store (rows/row_map.h) changes it, in its order of operations. A warp a row; lane l
// holds channels l, l + 32, ...
template <int dim, int warps>
__device__ inline void transform_tile(const kvmix_cuda_transform& t, bool as_is, __half* tile) {
  constexpr int kPerLane = dim / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const float* const center = t.center == nullptr ? nullptr : t.center + static_cast<int>(blockIdx.y) * dim;
  const float* const scales = t.scales == nullptr ? nullptr : t.scales + static_cast<int>(blockIdx.y) * dim;
  for (int row = static_cast<int>(threadIdx.x) / 32; row < kPageTokens; row += warps) {
    float x[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      x[i] = __half2float(tile[row * tile_row(dim) + 32 * i + lane]);
      if (center != nullptr) x[i] -= center[32 * i + lane];
      if (scales != nullptr) x[i] *= scales[32 * i + lane];
    }
    if (t.hadamard != 0) hadamard<dim>(x);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const __half h = __float2half_rn(x[i]);
      tile[row * tile_row(dim) + 32 * i + lane] = as_is || !__hisinf(h) && !__hisnan(h) ? h : __float2half_rn(0.0f);
    }
  }
}

}  // namespace kvmix::cuda
