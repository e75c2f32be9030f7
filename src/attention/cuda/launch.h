// Between the host sides of the attention kernels.
#pragma once

#include <cuda_runtime.h>

#include "kvmix/kvmix_cuda.h"

namespace kvmix::cuda {

struct AttendArguments;

// Throws kInternal with what failed.
void check_cuda(cudaError_t status, const char* what);

// Lets a kernel use `shared` bytes of dynamic shared memory; `what` names the caller in an error.
template <class Kernel>
void allow_shared(Kernel* kernel, int shared, const char* what) {
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), what);
}
// Blocks of a kernel that one multiprocessor holds.
template <class Kernel>
int blocks_on_processor(Kernel* kernel, int threads, int shared) {
  int blocks = 0;
  allow_shared(kernel, shared, "plan: shared memory");
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, static_cast<size_t>(shared)),
             "plan: occupancy");
  return blocks;
}

void launch_prefill(const kvmix_cuda_attend_params& params, const AttendArguments& arguments);
void launch_pages(const kvmix_cuda_attend_params& params, const AttendArguments& arguments);
int resident_page_blocks(int head_dim, int rows);  // on one multiprocessor

}  // namespace kvmix::cuda
