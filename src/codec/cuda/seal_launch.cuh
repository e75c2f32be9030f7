// What all kernels that seal pages take, and their launches. A block seals one side of one page of one KV head: the grid is the
// pages of all layers of the launch, KV heads, keys and values.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <span>

#include "base/cuda/launch.h"
#include "codec/cuda/format.h"
#include "codec/cuda/seal.h"

namespace kvmix::cuda {

// Pages of one layer.
struct SealLayer {
  const int32_t* open_ids;
  const int32_t* record_ids;
  int64_t id_page_step, id_head_step;
  RecordShape shape, open;
  bool keys_fitted, values_fitted, keys_unbiased, values_unbiased;
  kvmix_cuda_transform key_transform, value_transform;
};
struct SealArguments {
  static constexpr int kMostLayers = 22;
  const uint8_t* open_pages;
  int64_t open_page_stride, open_head_stride;
  uint8_t* records;
  int64_t record_page_stride, record_head_stride;
  int first_page[kMostLayers + 1];  // of each layer among the launch's; pages in all behind the last one
  SealLayer layers[kMostLayers];
};
static_assert(sizeof(SealArguments) <= 4096);  // what a kernel takes

__device__ inline int layer_of_block(const SealArguments& args) {
  int layer = 0;
  while (static_cast<int>(blockIdx.x) >= args.first_page[layer + 1]) ++layer;
  return layer;
}

// The open page of a block and its record, which is null where there is no work.
struct SealPlace {
  const uint8_t* open;
  uint8_t* record;
};
__device__ inline SealPlace place_of_block(const SealArguments& args, int at_layer) {
  const SealLayer& layer = args.layers[at_layer];
  const int64_t page =
      (static_cast<int>(blockIdx.x) - args.first_page[at_layer]) * layer.id_page_step + blockIdx.y * layer.id_head_step;
  if (layer.record_ids[page] == kNoRecord) return {nullptr, nullptr};
  return {
      args.open_pages + layer.open_ids[page] * args.open_page_stride + static_cast<int64_t>(blockIdx.y) * args.open_head_stride,
      args.records + layer.record_ids[page] * args.record_page_stride +
          static_cast<int64_t>(blockIdx.y) * args.record_head_stride};
}

inline bool keys_fitted(const SealJob& job) {
  return job.params.fitted != 0 || job.details.keys_fitted || job.details.keys_unbiased;
}
inline bool values_fitted(const SealJob& job) {
  return job.params.fitted != 0 || job.details.values_fitted || job.details.values_unbiased;
}

// A kernel and its threads a block.
struct SealKernel {
  void (*kernel)(SealArguments);
  int threads;
  friend bool operator==(const SealKernel&, const SealKernel&) = default;
};

// Layers that one kernel seals together.
class SealLaunch {
 public:
  SealLaunch(const SealKernel& kernel, const kvmix_cuda_seal_params& p)
      : kernel_(kernel), kv_heads_(p.kv_heads), stream_(static_cast<cudaStream_t>(p.stream)) {
    a_.open_pages = static_cast<const uint8_t*>(p.open_pages);
    a_.open_page_stride = p.open_page_stride, a_.open_head_stride = p.open_head_stride;
    a_.records = static_cast<uint8_t*>(p.records);
    a_.record_page_stride = p.record_page_stride, a_.record_head_stride = p.record_head_stride;
  }

  void add(const SealJob& job, int shared) {
    if (layers_ == SealArguments::kMostLayers) go();
    const auto& [p, details] = job;
    a_.layers[layers_] = {p.open_ids,
                          p.record_ids,
                          details.ids_of_heads ? p.kv_heads : 1,
                          details.ids_of_heads ? 1 : 0,
                          record_shape(p.format),
                          {p.format.head_dim, details.open.key_bits, details.open.value_bits, details.open.key_group,
                           details.open.value_group, true},
                          keys_fitted(job),
                          values_fitted(job),
                          details.keys_unbiased,
                          details.values_unbiased,
                          p.key_transform,
                          p.value_transform};
    shared_ = std::max(shared_, shared);
    a_.first_page[layers_ + 1] = a_.first_page[layers_] + p.pages;
    ++layers_;
  }

  void go() {
    allow_shared(kernel_.kernel, shared_, "seal: shared memory");
    const dim3 grid(static_cast<unsigned>(a_.first_page[layers_]), static_cast<unsigned>(kv_heads_), 2);
    kernel_.kernel<<<grid, static_cast<unsigned>(kernel_.threads), static_cast<size_t>(shared_), stream_>>>(a_);
    check_cuda(cudaGetLastError(), "seal: launch");
    layers_ = 0;
  }

 private:
  SealKernel kernel_;
  int kv_heads_, layers_ = 0, shared_ = 0;
  cudaStream_t stream_;
  SealArguments a_{};
};

// In as few launches as there are kernels: kernel_of(job), null where a job has no work of this kind, with shared_of(job) bytes
// of shared memory.
template <class KernelOf, class SharedOf>
void launch_seals(std::span<const SealJob> jobs, const KernelOf& kernel_of, const SharedOf& shared_of) {
  const auto together = [&](const SealJob& a, const SealJob& b) {
    return a.params.kv_heads == b.params.kv_heads && a.params.format.head_dim == b.params.format.head_dim &&
           kernel_of(a) == kernel_of(b);
  };
  for (size_t first = 0; first < jobs.size(); ++first) {
    const SealJob& job = jobs[first];
    if (kernel_of(job).kernel == nullptr || std::any_of(jobs.begin(), jobs.begin() + static_cast<ptrdiff_t>(first),
                                                        [&](const SealJob& before) { return together(before, job); })) {
      continue;
    }
    SealLaunch launch(kernel_of(job), job.params);
    for (const SealJob& next : jobs.subspan(first)) {
      if (together(job, next)) launch.add(next, shared_of(next));
    }
    launch.go();
  }
}

// Sides of trellis codes; seal()'s part in trellis_seal.cu.
void seal_trellis(std::span<const SealJob> jobs);

}  // namespace kvmix::cuda
