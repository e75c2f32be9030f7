// Launches that write pages. Defined in seal.cu, or where the build has no CUDA by functions that throw kUnsupported.
#pragma once

#include "kvmix/kvmix_cuda.h"

namespace kvmix::cuda {

void check_seal(const kvmix_cuda_seal_params& params);
void check_append(const kvmix_cuda_append_params& params);
void seal(const kvmix_cuda_seal_params& params);
void append(const kvmix_cuda_append_params& params);

}  // namespace kvmix::cuda
