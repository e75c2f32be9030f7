#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace kvmix::cuda {

// Sets *flag to `mark`, if it is 0, where one of the n numbers is NaN or infinite.
void mark_not_finite(const float* numbers, size_t n, int mark, int* flag, cudaStream_t stream);

}  // namespace kvmix::cuda
