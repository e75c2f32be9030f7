// Host side of the decode kernel: checks, dispatch, launch. The work list is cut in cuda_plan.cc.
#include <cuda_runtime.h>

#include <cmath>
#include <string>

#include "attention/attend_cuda.cuh"
#include "attention/cuda_support.h"

namespace kvmix::cuda {
namespace {

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw Error(Status::kInternal, std::string(what) + ": " + cudaGetErrorString(status) + " (cudaError " +
                                       std::to_string(static_cast<int>(status)) + ")");
  }
}

template <class C>
void launch(const kvmix_cuda_attend_params& p, const AttendArguments& arguments) {
  check(cudaFuncSetAttribute(attend_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::shared_bytes),
        "attend: shared memory");
  attend_kernel<C><<<p.item_count, kThreads, C::shared_bytes, static_cast<cudaStream_t>(p.stream)>>>(arguments);
  check(cudaGetLastError(), "attend: launch");
}

template <int key_bits, int value_bits, int key_group, int value_group>
bool try_launch(const kvmix_cuda_attend_params& p, const AttendArguments& arguments) {
  const kvmix_cuda_format& f = p.format;
  if (f.key_bits != key_bits || f.value_bits != value_bits || f.key_group != key_group || f.value_group != value_group)
    return false;
  if (arguments.group * arguments.q_tokens > 4) {
    launch<Config<key_bits, value_bits, key_group, value_group, true>>(p, arguments);
  } else {
    launch<Config<key_bits, value_bits, key_group, value_group, false>>(p, arguments);
  }
  return true;
}

}  // namespace

void attend(const kvmix_cuda_attend_params& p) {
  check_shape(p);
  if (p.item_count == 0) return;
  const WorkspaceLayout space = workspace_layout(p);
  if (p.workspace_bytes < space.bytes(p.item_count)) {
    throw Error(Status::kInvalidArgument, "attend: workspace_bytes " + std::to_string(p.workspace_bytes) + " is below the " +
                                              std::to_string(space.bytes(p.item_count)) + " that kvmix_cuda_plan asks for");
  }
  constexpr float kLog2E = 1.44269504088896f;
  auto* const base = static_cast<uint8_t*>(p.workspace);
  AttendArguments a{};
  a.q = static_cast<const __half*>(p.q);
  a.out = static_cast<__half*>(p.out);
  a.lse = p.lse;
  a.records = static_cast<const uint8_t*>(p.records);
  a.record_page_stride = p.record_page_stride, a.record_head_stride = p.record_head_stride;
  a.open_pages = static_cast<const uint8_t*>(p.open_pages);
  a.open_page_stride = p.open_page_stride, a.open_head_stride = p.open_head_stride;
  a.page_table = p.page_table, a.page_table_stride = p.page_table_stride;
  a.items = p.items;
  a.tickets = reinterpret_cast<int32_t*>(base);
  a.partial_sums = reinterpret_cast<float*>(base + space.ticket_bytes);
  a.partials = reinterpret_cast<float*>(base + space.ticket_bytes + space.sum_bytes * static_cast<size_t>(p.item_count));
  a.kv_heads = p.kv_heads, a.group = p.q_heads / p.kv_heads, a.q_tokens = p.q_tokens;
  a.sinks = p.sinks, a.sliding_window = p.sliding_window;
  a.scale = (p.scale > 0.0f ? p.scale : 1.0f / std::sqrt(static_cast<float>(p.format.head_dim))) * kLog2E;
  a.softcap = p.softcap * kLog2E;
  const bool launched = false
#define KVMIX_ATTEND(k, v, kg, vg) || try_launch<k, v, kg, vg>(p, a)
#include "attention/attend_cuda_formats.inc"
#undef KVMIX_ATTEND
      ;
  if (!launched)
    throw Error(Status::kUnsupported, "attend: no kernel for " + format_name(p.format) + "; there are " + supported_formats());
}

int resident_blocks(const RecordShape& shape) {
  int device = 0, processors = 0, shared = 0;
  check(cudaGetDevice(&device), "plan: device");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "plan: device");
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device), "plan: device");
  // Two buffers a warp, the query fragments, 1.1 KB of static variables and 1 KB that the driver keeps.
  const int block = kWarps * shape.bytes() + kFields * 32 * 8 + 2200;
  const int most = shared / block < kBlocksPerProcessor ? shared / block : kBlocksPerProcessor;
  return processors * (most > 0 ? most : 1);
}

}  // namespace kvmix::cuda
