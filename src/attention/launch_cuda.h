// Between the host sides of the attention kernels.
#pragma once

#include <cuda_runtime.h>

#include "kvmix/kvmix_cuda.h"

namespace kvmix::cuda {

struct AttendArguments;

// Throws kInternal with what failed.
void check_cuda(cudaError_t status, const char* what);
void launch_pages(const kvmix_cuda_attend_params& params, const AttendArguments& arguments);
int resident_page_blocks(int head_dim, int rows);  // on one multiprocessor

}  // namespace kvmix::cuda
