#include <algorithm>

#include "base/cuda/launch.h"
#include "engine/cuda/ahead.h"

namespace kvmix::cuda {
namespace {

constexpr unsigned kPiece = 4096;  // bytes that one instruction asks for

__global__ void fetch_kernel(const char* data, size_t pieces) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < pieces;
       i += gridDim.x * static_cast<size_t>(blockDim.x)) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;\n" ::"l"(data + i * kPiece), "r"(kPiece) : "memory");
  }
#endif
}

}  // namespace

void fetch_ahead(const void* data, size_t bytes, cudaStream_t stream) {
  constexpr int kFetches = 9;  // compute capability
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) < kFetches) return;
  const size_t pieces = std::min(bytes, static_cast<size_t>(device_attribute(cudaDevAttrL2CacheSize)) / 2) / kPiece;
  if (pieces == 0) return;
  // Attention begins on the same multiprocessors, which need not part their memory anew for it then.
  check_cuda(cudaFuncSetAttribute(fetch_kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
             "fetch weights: shared memory");
  constexpr unsigned kBlocks = 64, kThreads = 32;
  fetch_kernel<<<kBlocks, kThreads, 0, stream>>>(static_cast<const char*>(data), pieces);
  check_cuda(cudaGetLastError(), "fetch weights: launch");
}

}  // namespace kvmix::cuda
