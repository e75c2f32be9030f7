#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "base/cuda/launch.h"
#include "engine/cuda/products.h"

namespace kvmix::cuda {
namespace {

template <class Pair, class Round>
__global__ void round_kernel(const float2* from, Pair* to, size_t pairs, Round round) {
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < pairs;
       i += gridDim.x * static_cast<size_t>(blockDim.x)) {
    to[i] = round(from[i]);
  }
}

struct ToHalf {
  __device__ __half2 operator()(float2 x) const { return __float22half2_rn(x); }
};
struct ToBfloat {
  __device__ __nv_bfloat162 operator()(float2 x) const { return __float22bfloat162_rn(x); }
};

}  // namespace

void round_numbers(const float* from, void* to, size_t n, bool bf16, cudaStream_t stream) {
  constexpr unsigned kThreads = 256, kMostBlocks = 2048;
  const size_t pairs = n / 2;  // rows have a multiple of 32 numbers
  const auto blocks = static_cast<unsigned>(std::clamp<size_t>((pairs + kThreads - 1) / kThreads, 1, kMostBlocks));
  const auto* source = reinterpret_cast<const float2*>(from);
  if (bf16) {
    round_kernel<<<blocks, kThreads, 0, stream>>>(source, static_cast<__nv_bfloat162*>(to), pairs, ToBfloat{});
  } else {
    round_kernel<<<blocks, kThreads, 0, stream>>>(source, static_cast<__half2*>(to), pairs, ToHalf{});
  }
  check_cuda(cudaGetLastError(), "rounding of rows");
}

}  // namespace kvmix::cuda
