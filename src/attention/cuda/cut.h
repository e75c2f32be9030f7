// Cuts the work of a call of attention into pieces of even size.
#pragma once

#include <span>
#include <vector>

#include "attention/cuda/shape.h"

namespace kvmix::cuda {

struct Cut {
  std::vector<kvmix_cuda_item> items;
  size_t workspace_bytes;
};
// For a device of `slots` resident thread blocks; 0 asks the current device. `lengths` has one entry a sequence.
Cut cut_work(const kvmix_cuda_attend_params& params, std::span<const int32_t> lengths, int slots);

}  // namespace kvmix::cuda
