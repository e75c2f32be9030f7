// Launches that write pages. Defined in seal.cu, or where the build has no CUDA by functions that throw kUnsupported.
#pragma once

#include <span>

#include "codec/cuda/tile_layout.h"
#include "kvmix/kvmix_cuda.h"

namespace kvmix::cuda {

void check_seal(const kvmix_cuda_seal_params& params);
void check_append(const kvmix_cuda_append_params& params);
// A record id that is no work, where ids are of heads.
inline constexpr int32_t kNoRecord = -1;
// What the ABI's parameters do not say: which sides are fitted (beside `fitted`, which means both), and without bias,
// whether ids are [pages][kv_heads], each of its own, instead of [pages], and the shape of open pages, fp16 rows or 8-bit ones
// (tile_layout.h).
struct SealDetails {
  bool keys_fitted = false, values_fitted = false, keys_unbiased = false, values_unbiased = false, ids_of_heads = false;
  RecordShape open{0, 16, 16, 128, 128};
};
void seal(const kvmix_cuda_seal_params& params, const SealDetails& details = {});
// Several, say of several layers, in as few launches as the kernels they take: one for each and each number of KV heads. They
// have head_dim's of their own, but the first one's memory (open pages, records, their strides) and stream.
struct SealJob {
  kvmix_cuda_seal_params params;
  SealDetails details;
};
void seal(std::span<const SealJob> jobs);
void append(const kvmix_cuda_append_params& params);

}  // namespace kvmix::cuda
