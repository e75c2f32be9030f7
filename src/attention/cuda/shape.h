// What a call of attention asks for: checks, the kernel that takes it and its cost, the workspace's parts.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/cuda/stage.h"
#include "codec/cuda/format.h"

namespace kvmix::cuda {

inline constexpr int kTileRows = 64;      // query rows of a block of the page kernel, which does not split more along the pages
inline constexpr int kPrefillRows = 128;  // of the prefill kernel
// Blocks of a launch of the prefill kernel whose items are splits: partial results of all of their rows have room.
inline constexpr int kMostSplitBlocks = 272;

void check_shape(const kvmix_cuda_attend_params& params);

inline int heads_per_kv(const kvmix_cuda_attend_params& p) { return p.q_heads / p.kv_heads; }
inline int query_rows(const kvmix_cuda_attend_params& p) { return p.q_tokens * heads_per_kv(p); }

// Shared memory that a thread block of the page kernel takes: keys and values of a page as fp16, later all rows' sums.
constexpr int page_shared_bytes(int head_dim) {
  const int page = kPageTokens * (head_dim + 8) * 2 + head_dim * (kPageTokens + 8) * 2;
  const int merge = kTileRows * (head_dim + 8 + 2) * 4;
  return page > merge ? page : merge;
}
// What a thread block may take on the current device; without one, on compute capability 9.0.
int most_shared_bytes();
inline constexpr int kMostSharedBytes = 226 * 1024;

// Thread blocks that the decode kernels give each item.
inline int row_blocks(const kvmix_cuda_attend_params& p) { return (query_rows(p) + kRows - 1) / kRows; }

// Tickets, then per item a (maximum, sum) a query row, then per item head_dim numbers a query row; none of calls with more
// than `most_items`, which are not split.
struct WorkspaceLayout {
  size_t ticket_bytes, sum_bytes, partial_bytes;
  int32_t most_items;
  size_t bytes(int32_t items) const {
    return ticket_bytes + (items <= most_items ? (sum_bytes + partial_bytes) * static_cast<size_t>(items) : 0);
  }
};
// `split`: also where more than kTileRows query rows are split along the pages (OpenPages::shared_items).
WorkspaceLayout workspace_layout(const kvmix_cuda_attend_params& params, bool split = false);

// What a device takes at once of the kernel for a shape. `all` on each of `processors` multiprocessors are warps of the decode
// kernel of codes or thread blocks of the others; launches of up to `few_blocks` blocks a multiprocessor take `few` of them.
struct Residency {
  int processors, few_blocks, few, all;
  bool alone = false;  // a block has a multiprocessor to itself: what it reads first is the same for all of its items

  int each(int64_t blocks) const { return static_cast<int>((blocks + processors - 1) / processors); }
  int warps(int64_t blocks) const { return each(blocks) <= few_blocks ? few : all; }
  // Of a thread block of the decode kernel: a multiprocessor's warps, shared in fours by the blocks that it gets.
  int block_warps(int64_t blocks) const {
    return alone || each(blocks) <= 1 ? warps(blocks) : std::max(4, warps(blocks) / each(blocks) / 4 * 4);
  }
};

// Defined in the .cu files, or where the build has no CUDA by functions that throw kUnsupported.
// What the ABI's parameters do not say of open pages: the sinks' room for tokens, and the shape of the others, fp16 rows or a
// record of 8-bit rows (tile_layout.h).
struct OpenPages {
  int sink_slots = kPageTokens;
  RecordShape shape{0, 16, 16, 128, 128};
  // The launches that it waits for write queries, outputs, the workspace and rows of open pages alone, and all before have
  // ended when they let this one begin (base/cuda/overlap.cuh).
  bool overlapped = false;
  // Of a launch for some of the pages that its items' lists have, others for the rest: the items of all of them, which share
  // tickets and partial results, and which kernels each can then take: none that is for more than kTileRows rows alone. 0: the
  // launch is for all pages.
  int32_t shared_items = 0;
  // Of one for pages of chosen key channels (ThinKeys); 0: of all.
  int key_width = 0;
  const uint8_t* channels = nullptr;
};
void attend(const kvmix_cuda_attend_params& params, const OpenPages& open = {});
Residency residency(const kvmix_cuda_attend_params& params);  // of the kernel that takes it, on the current device

// decode.cuh takes few query rows on packed codes, fp16_pages.cuh on fp16; prefill.cuh more than kTileRows where the current
// device has it, pages.cuh the rest.
bool uses_fast_kernel(const kvmix_cuda_attend_params& params);  // decode.cuh
bool uses_fp16_kernel(const kvmix_cuda_attend_params& params);
bool has_prefill_kernel();
const char* kernel_name(const kvmix_cuda_attend_params& params);
float relative_cost(const kvmix_cuda_attend_params& params);  // kvmix_cuda_attend_cost
// Whether it takes pages that a launch before it dequantised into the workspace: those of an item from image item.partial on.
bool uses_images(const kvmix_cuda_attend_params& params);
bool may_use_images(const kvmix_cuda_attend_params& params);  // with enough sequences
// Whether the prefill kernel takes it and dequantises itself: such chunks are short, and are split along the pages.
inline bool splits_chunks(const kvmix_cuda_attend_params& p) {
  return query_rows(p) > kTileRows && has_prefill_kernel() && !uses_images(p);
}
inline int prefill_blocks(const kvmix_cuda_attend_params& p) { return (query_rows(p) + kPrefillRows - 1) / kPrefillRows; }
// A page as it stands in shared memory: keys in panels of 64 channels, values of 64 tokens, rows of 128 bytes.
constexpr int page_image_bytes(int head_dim) {
  return (head_dim + 63) / 64 * kPageTokens * 128 + kPageTokens / 64 * head_dim * 128;
}

}  // namespace kvmix::cuda
