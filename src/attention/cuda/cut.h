// Cuts the work of a call of attention into pieces of even size.
#pragma once

#include <span>
#include <utility>
#include <vector>

#include "attention/cuda/shape.h"

namespace kvmix::cuda {

// So many pages of a KV head each, the last of a head what is left.
struct Pieces {
  int pages;
  bool evict_first;
  friend bool operator==(const Pieces&, const Pieces&) = default;
};
// What a cut depends on of the sequences' lengths: how many pages they have. Calls that see as much of as many sinks and as
// long a past share it, whatever their formats are.
struct PageRuns {
  std::vector<std::pair<int64_t, int64_t>> counts;  // pages of a KV head, and how many sequences have as many
  int64_t pages = 0;                                // of a KV head of all sequences
  int longest = 1;
};
// `lengths` has one entry a sequence. Throws kInvalidArgument for one below 0.
PageRuns page_runs(const kvmix_cuda_attend_params& params, std::span<const int32_t> lengths);
// The fastest for a device of `slots` resident thread blocks; 0 asks the current device.
Pieces choose_pieces(const kvmix_cuda_attend_params& params, const PageRuns& runs, int slots);
// Into how many a head's pages can be cut: what kernels hold the sums of.
int most_splits(const kvmix_cuda_attend_params& params);
size_t count_items(const kvmix_cuda_attend_params& params, const PageRuns& runs, const Pieces& pieces);
// Writes count_items of them.
void write_items(const kvmix_cuda_attend_params& params, std::span<const int32_t> lengths, const Pieces& pieces,
                 std::span<kvmix_cuda_item> to);
// Of a call with a list of `items`.
size_t workspace_bytes(const kvmix_cuda_attend_params& params, const PageRuns& runs, size_t items);

}  // namespace kvmix::cuda
