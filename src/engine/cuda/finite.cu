#include <algorithm>

#include "base/cuda/launch.h"
#include "engine/cuda/finite.h"

namespace kvmix::cuda {
namespace {

__global__ void finite_kernel(const float* numbers, size_t n, int mark, int* flag) {
  float sum = 0.0f;  // x - x is 0 for finite numbers alone
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < n;
       i += gridDim.x * static_cast<size_t>(blockDim.x)) {
    const float x = numbers[i];
    sum += x - x;
  }
  if (!(sum == 0.0f)) atomicCAS(flag, 0, mark);
}

}  // namespace

void mark_not_finite(const float* numbers, size_t n, int mark, int* flag, cudaStream_t stream) {
  if (n == 0) return;
  constexpr unsigned kThreads = 256, kMostBlocks = 1024;
  const auto blocks = static_cast<unsigned>(std::min<size_t>((n + kThreads - 1) / kThreads, kMostBlocks));
  finite_kernel<<<blocks, kThreads, 0, stream>>>(numbers, n, mark, flag);
  check_cuda(cudaGetLastError(), "check of numbers");
}

}  // namespace kvmix::cuda
