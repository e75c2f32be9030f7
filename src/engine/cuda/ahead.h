#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace kvmix::cuda {

// Brings what a later launch reads into the L2, as much of it as half of that holds. Nothing before compute capability 9.0.
void fetch_ahead(const void* data, size_t bytes, cudaStream_t stream);

}  // namespace kvmix::cuda
