// Launches that write pages. Defined in seal.cu, or where the build has no CUDA by functions that throw kUnsupported.
#pragma once

#include "kvmix/kvmix_cuda.h"

namespace kvmix::cuda {

void check_seal(const kvmix_cuda_seal_params& params);
void check_append(const kvmix_cuda_append_params& params);
// What the ABI's parameters do not say: which sides are fitted (beside `fitted`, which means both), and without bias, and
// whether ids are [pages][kv_heads], each of its own, instead of [pages].
struct SealDetails {
  bool keys_fitted = false, values_fitted = false, keys_unbiased = false, values_unbiased = false, ids_of_heads = false;
};
void seal(const kvmix_cuda_seal_params& params, const SealDetails& details = {});
void append(const kvmix_cuda_append_params& params);

}  // namespace kvmix::cuda
