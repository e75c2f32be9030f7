// Between the host sides of the attention kernels.
#pragma once

#include "base/cuda/launch.h"
#include "kvmix/kvmix_cuda.h"

namespace kvmix::cuda {

struct AttendArguments;

void launch_prefill(const kvmix_cuda_attend_params& params, const AttendArguments& arguments);
void launch_pages(const kvmix_cuda_attend_params& params, const AttendArguments& arguments);
int resident_page_blocks(int head_dim, int rows);  // on one multiprocessor

}  // namespace kvmix::cuda
