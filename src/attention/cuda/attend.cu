// Host side of attention: checks, dispatch, launch. The work list is cut in cut.cc.
#include <algorithm>
#include <cmath>
#include <string>

#include "attention/cuda/launch.h"
#include "attention/cuda/shape.h"

namespace kvmix::cuda {

namespace {

// Of a kernel whose warps hold a ring each: eight warps and all registers are fastest. Many short blocks want more warps, which
// hide each other's beginnings.
Residency decode_residency(const Stage& stage, int head_dim) {
  const int room = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - 1024;
  int all = kMaxWarps;
  while (all > kWarps && decode_shared_bytes(stage, head_dim, all) > room) --all;
  constexpr int kFewBlocks = 8;  // of a multiprocessor
  // Tables of levels, once a block, leave no room for blocks side by side; lookups want all warps that there can be.
  if (stage.table_bytes > 0) return {device_attribute(cudaDevAttrMultiProcessorCount), kFewBlocks, all, all, true};
  return {device_attribute(cudaDevAttrMultiProcessorCount), kFewBlocks, std::min(all, kFewWarps), all};
}

}  // namespace

int most_shared_bytes() {
  constexpr int kOwn = 1024;  // what the kernels declare beside it, and the system's
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess)
    return bytes - kOwn;
  static_cast<void>(cudaGetLastError());  // no device: nothing to launch
  return kMostSharedBytes;
}

void attend(const kvmix_cuda_attend_params& p, const OpenPages& open) {
  if (p.item_count == 0) return;
  const bool split = open.shared_items > 0;
  const int32_t items = split ? open.shared_items : p.item_count;
  const WorkspaceLayout space = workspace_layout(p, split);
  if (p.workspace_bytes < space.bytes(items)) {
    throw Error(Status::kInvalidArgument, "attend: workspace_bytes " + std::to_string(p.workspace_bytes) + " is below the " +
                                              std::to_string(space.bytes(items)) + " that kvmix_cuda_cut asks for");
  }
  require(p.new_keys == nullptr || !open.shape.has_codes(), "attend: new rows are stored into open pages of fp16 alone");
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
  a.partials = reinterpret_cast<float*>(base + space.ticket_bytes + space.sum_bytes * static_cast<size_t>(items));
  a.kv_heads = p.kv_heads, a.group = p.q_heads / p.kv_heads, a.q_tokens = p.q_tokens;
  a.sinks = p.sinks, a.sink_slots = open.sink_slots, a.open = open.shape, a.sliding_window = p.sliding_window,
  a.bf16 = p.bf16 != 0, a.overlapped = open.overlapped;
  a.scale = (p.scale > 0.0f ? p.scale : 1.0f / std::sqrt(static_cast<float>(p.format.head_dim))) * kLog2E;
  a.softcap = p.softcap * kLog2E;
  a.new_keys = static_cast<const uint8_t*>(p.new_keys), a.new_values = static_cast<const uint8_t*>(p.new_values);
  a.new_sequence_stride = p.new_sequence_stride, a.new_token_stride = p.new_token_stride;
  a.new_head_stride = p.new_head_stride;
  const int rows = a.group * a.q_tokens;
  const bool thin = open.key_width > 0;
  const ThinKeys keys{open.key_width, open.channels};
  if (!split && rows > kTileRows && has_prefill_kernel()) return launch_prefill(p, a);
  if (!split && uses_fp16_kernel(p)) return launch_fp16(p, a);
  if (!uses_fast_kernel(p)) return thin ? launch_thin_pages(p, a, keys) : launch_pages(p, a);
  const ThinShape shape{record_shape(p.format), open.key_width};
  const Stage stage = stage_of(shape);
  Residency device = decode_residency(stage, shape.head_dim);
  if (thin) device.all = std::min(device.all, kFewWarps), device.few = std::min(device.few, kFewWarps);
  const int row_blocks = cuda::row_blocks(p), blocks = p.item_count * row_blocks;
  const int warps = device.block_warps(blocks);
  // At least so much that a multiprocessor takes no more blocks than planned.
  const int resident = std::max(1, device.warps(blocks) / warps);
  const int shared = std::max(decode_shared_bytes(stage, shape.head_dim, warps),
                              device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / (resident + 1));
  const DecodeArguments d{a, stage, row_blocks, keys};
  const DecodeLaunch launch{blocks, 32 * warps, shared, resident * warps, thin, open.overlapped, p.stream};
  const auto go = [&](auto dim) {
    d.stage.table_bytes > 0 ? launch_trellis_decode<dim>(launch, d) : launch_decode<dim>(launch, d);
  };
  if (!HeadDims::visit(p.format.head_dim, go))
    throw Error(Status::kUnsupported, "attend: head_dim " + std::to_string(p.format.head_dim) + " has no decode kernel");
}

Residency residency(const kvmix_cuda_attend_params& p) {
  const int rows = query_rows(p);
  if (uses_fast_kernel(p)) return decode_residency(stage_of(record_shape(p.format)), p.format.head_dim);
  if (splits_chunks(p)) return {device_attribute(cudaDevAttrMultiProcessorCount), 0, 1, 1};
  const int blocks =
      std::max(1, uses_fp16_kernel(p) ? resident_fp16_blocks(p.format.head_dim) : resident_page_blocks(p.format, rows));
  return {device_attribute(cudaDevAttrMultiProcessorCount), 0, blocks, blocks};
}

}  // namespace kvmix::cuda
