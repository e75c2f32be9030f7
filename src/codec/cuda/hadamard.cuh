// The rotation of a row that a warp holds: lane l has channels l, l + 32, ...
#pragma once

#include <cuda_runtime.h>

namespace kvmix::cuda {

// Orthonormal Hadamard over the largest power of two that divides the width, as src/rows/hadamard.cc.
template <int dim>
__device__ inline void hadamard(float (&x)[dim / 32]) {
  constexpr int kPerLane = dim / 32, kBlock = dim & -dim;
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const float other = __shfl_xor_sync(~0u, x[i], step);
      x[i] = (lane & step) != 0 ? other - x[i] : x[i] + other;
    }
  }
#pragma unroll
  for (int step = 1; step < kBlock / 32; step *= 2) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if ((i & step) != 0) continue;
      const float a = x[i], b = x[i + step];
      x[i] = a + b, x[i + step] = a - b;
    }
  }
  const float norm = 1.0f / sqrtf(static_cast<float>(kBlock));
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) x[i] *= norm;
}

}  // namespace kvmix::cuda
