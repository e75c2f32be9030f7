// Host side of attention: checks, dispatch, launch. The work list is cut in cut.cc.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "attention/cuda/attend.cuh"
#include "attention/cuda/launch.h"

namespace kvmix::cuda {

namespace {

// Calls body with the fast kernel of a format, if there is one, and its shared memory.
template <int dim, int key_bits, int value_bits, int key_group, int value_group, class Body>
bool try_kernel(const kvmix_cuda_format& f, int rows, const Body& body) {
  if (f.head_dim != dim || f.key_bits != key_bits || f.value_bits != value_bits || f.key_group != key_group ||
      f.value_group != value_group)
    return false;
  using Wide = Config<dim, key_bits, value_bits, key_group, value_group, true>;
  using Narrow = Config<dim, key_bits, value_bits, key_group, value_group, false>;
  if (rows > 4) {
    body(attend_kernel<Wide>, Wide{});
  } else {
    body(attend_kernel<Narrow>, Narrow{});
  }
  return true;
}

template <class Body>
void with_kernel(const kvmix_cuda_format& f, int rows, const Body& body) {
  static_cast<void>(false
#define KVMIX_ATTEND(dim, k, v, kg, vg) || try_kernel<dim, k, v, kg, vg>(f, rows, body)
#include "attention/cuda/attend_formats.inc"
#undef KVMIX_ATTEND
  );
}

template <class C>
Residency residency_of(C) {
  const int room = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - 1024 - C::query_bytes;
  const int all = std::clamp(room / C::ring, kWarps, C::most_warps);
  return {device_attribute(cudaDevAttrMultiProcessorCount), C::few_blocks, std::min(all, kMaxWarps), all};
}

}  // namespace

void attend(const kvmix_cuda_attend_params& p) {
  if (p.item_count == 0) return;
  const WorkspaceLayout space = workspace_layout(p);
  if (p.workspace_bytes < space.bytes(p.item_count)) {
    throw Error(Status::kInvalidArgument, "attend: workspace_bytes " + std::to_string(p.workspace_bytes) + " is below the " +
                                              std::to_string(space.bytes(p.item_count)) + " that kvmix_cuda_cut asks for");
  }
  constexpr float kLog2E = 1.44269504088896f;
  auto* const base = static_cast<uint8_t*>(p.workspace);
  AttendArguments a{};
  a.q = p.q, a.out = p.out, a.lse = p.lse;
  a.records = static_cast<const uint8_t*>(p.records);
  a.record_page_stride = p.record_page_stride, a.record_head_stride = p.record_head_stride;
  a.open_pages = static_cast<uint8_t*>(p.open_pages);
  a.open_page_stride = p.open_page_stride, a.open_head_stride = p.open_head_stride;
  a.page_table = p.page_table, a.page_table_stride = p.page_table_stride;
  a.items = p.items;
  a.tickets = reinterpret_cast<int32_t*>(base);
  a.partial_sums = reinterpret_cast<float*>(base + space.ticket_bytes);
  a.partials = reinterpret_cast<float*>(base + space.ticket_bytes + space.sum_bytes * static_cast<size_t>(p.item_count));
  a.kv_heads = p.kv_heads, a.group = p.q_heads / p.kv_heads, a.q_tokens = p.q_tokens;
  a.sinks = p.sinks, a.sliding_window = p.sliding_window, a.bf16 = p.bf16 != 0;
  a.scale = (p.scale > 0.0f ? p.scale : 1.0f / std::sqrt(static_cast<float>(p.format.head_dim))) * kLog2E;
  a.softcap = p.softcap * kLog2E;
  a.new_keys = static_cast<const uint8_t*>(p.new_keys), a.new_values = static_cast<const uint8_t*>(p.new_values);
  a.new_sequence_stride = p.new_sequence_stride, a.new_token_stride = p.new_token_stride;
  a.new_head_stride = p.new_head_stride;
  const int rows = a.group * a.q_tokens;
  if (rows > kTileRows && has_prefill_kernel()) return launch_prefill(p, a);
  if (!uses_fast_kernel(p)) return launch_pages(p, a);
  with_kernel(p.format, rows, [&](auto* kernel, auto config) {
    const Residency device = residency_of(config);
    const int warps = device.block_warps(p.item_count);
    // At least so much that a multiprocessor takes no more blocks than planned.
    const int blocks = std::max(1, device.warps(p.item_count) / warps);
    const int shared =
        std::max(config.shared_bytes(warps), device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / (blocks + 1));
    allow_shared(kernel, shared, "attend: shared memory");
    kernel<<<p.item_count, 32 * warps, static_cast<size_t>(shared), static_cast<cudaStream_t>(p.stream)>>>(a);
    check_cuda(cudaGetLastError(), "attend: launch");
  });
}

Residency residency(const kvmix_cuda_attend_params& p) {
  const int rows = p.q_heads / p.kv_heads * p.q_tokens;
  Residency device{};
  if (uses_fast_kernel(p)) {
    with_kernel(p.format, rows, [&](auto*, auto config) { device = residency_of(config); });
  } else {
    const int blocks = std::max(1, resident_page_blocks(p.format.head_dim, rows));
    device = {device_attribute(cudaDevAttrMultiProcessorCount), 0, blocks, blocks};
  }
  return device;
}

}  // namespace kvmix::cuda
