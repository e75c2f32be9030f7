// Cuts the work of a call of attention into pieces of even size.
#pragma once

#include <span>
#include <vector>

#include "attention/cuda/shape.h"

namespace kvmix::cuda {

// So many pages of a KV head each, the last of a head what is left.
struct Pieces {
  int pages;
  bool evict_first;
  friend bool operator==(const Pieces&, const Pieces&) = default;
};
// The fastest for a device of `slots` resident thread blocks; 0 asks the current device. `lengths` has one entry a sequence.
// Throws kInvalidArgument for one below 0.
Pieces choose_pieces(const kvmix_cuda_attend_params& params, std::span<const int32_t> lengths, int slots);
size_t count_items(const kvmix_cuda_attend_params& params, std::span<const int32_t> lengths, const Pieces& pieces);
// Writes count_items of them.
void write_items(const kvmix_cuda_attend_params& params, std::span<const int32_t> lengths, const Pieces& pieces,
                 std::span<kvmix_cuda_item> to);
// Of a call with a list of `items`.
size_t workspace_bytes(const kvmix_cuda_attend_params& params, std::span<const int32_t> lengths, size_t items);

}  // namespace kvmix::cuda
