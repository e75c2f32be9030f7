#include "attention/cuda/shape.h"

#include <string>

namespace kvmix::cuda {

namespace {
constexpr int kMostRows = 16;  // two blocks an item; with more of them the page kernel reads less
}  // namespace

bool uses_fast_kernel(const kvmix_cuda_attend_params& p) {
  constexpr int kMostValueGroups = 7;  // Warp::side
  const kvmix_cuda_format& f = p.format;
  const RecordShape shape = record_shape(f);
  const auto coded = [](int width) { return CodeWidths::has(width) || TrellisWidths::has(width); };
  return query_rows(p) <= kMostRows && f.key_per_token == 0 && coded(f.key_bits) && coded(f.value_bits) &&
         shape.value_groups() <= kMostValueGroups &&
         decode_shared_bytes(stage_of(shape), shape.head_dim, kWarps) <= most_shared_bytes();
}

bool uses_fp16_kernel(const kvmix_cuda_attend_params& p) {
  return query_rows(p) <= kMostRows && p.format.key_bits == 16 && p.format.value_bits == 16;
}

bool may_use_images(const kvmix_cuda_attend_params& p) { return query_rows(p) > 2 * kPrefillRows && has_prefill_kernel(); }

// With up to two tiles a list each tile dequantises faster, and with a few more where lists are too few to fill a device.
bool uses_images(const kvmix_cuda_attend_params& p) {
  constexpr int kAlwaysFrom = 512;  // rows
  constexpr int64_t kManyTiles = 96;
  const int64_t tiles = int64_t{p.sequences} * p.kv_heads * prefill_blocks(p);
  return may_use_images(p) && (query_rows(p) >= kAlwaysFrom || tiles >= kManyTiles);
}

const char* kernel_name(const kvmix_cuda_attend_params& p) {
  const int rows = query_rows(p);
  if (uses_fast_kernel(p) && has_trellis(p.format)) return rows <= 4 ? "trellis-4" : rows <= 8 ? "trellis-8" : "trellis-16";
  if (uses_fast_kernel(p)) return rows <= 4 ? "codes-4" : rows <= 8 ? "codes-8" : "codes-16";
  if (uses_fp16_kernel(p)) return rows <= 4 ? "fp16-4" : rows <= 8 ? "fp16-8" : "fp16-16";
  if (rows <= 16) return "pages-16";
  return rows > kTileRows && has_prefill_kernel() ? "prefill-128" : "pages-64";
}

float relative_cost(const kvmix_cuda_attend_params& p) {
  const auto share = static_cast<float>(record_shape(p.format).bytes()) /
                     static_cast<float>(2 * 2 * kPageTokens * p.format.head_dim);  // of fp16's bytes
  const int rows = query_rows(p);
  // Lookups bind, of more than eight rows twice.
  if (uses_fast_kernel(p) && has_trellis(p.format))
    return std::max(rows <= 4 ? 0.46f : rows <= 8 ? 0.57f : 0.94f, 0.2f + 0.955f * share);
  // Memory, with what a launch takes beside it; the arithmetic of a page is the least.
  if (uses_fast_kernel(p)) return std::max(rows <= 4 ? 0.17f : rows <= 8 ? 0.25f : 0.36f, 0.05f + 0.955f * share);
  if (uses_fp16_kernel(p)) return 1.0f;
  return p.format.head_dim > 128 ? 2.7f : 1.1f;
}

void check_shape(const kvmix_cuda_attend_params& p) {
  check_format(p.format);
  require(p.sequences > 0, "attend: sequences " + std::to_string(p.sequences) + " must be at least 1");
  require(p.kv_heads > 0 && p.q_heads > 0 && p.q_heads % p.kv_heads == 0,
          "attend: q_heads " + std::to_string(p.q_heads) + " must be a multiple of kv_heads " + std::to_string(p.kv_heads));
  require(p.q_tokens > 0 && p.q_tokens <= 65536 && query_rows(p) <= 65535 * kTileRows,
          "attend: q_tokens " + std::to_string(p.q_tokens) + " not in 1..65536");
  require(p.sinks >= 0 && p.sinks <= kPageTokens, "attend: sinks " + std::to_string(p.sinks) + " not in 0..128");
  require(p.sliding_window >= 0 && p.softcap >= 0.0f && p.scale >= 0.0f, "attend: negative sliding_window, softcap or scale");
  require((p.new_keys == nullptr) == (p.new_values == nullptr), "attend: new_keys and new_values come together");
  require(p.new_keys == nullptr || query_rows(p) <= kTileRows,
          "attend: new rows are taken with at most 64 query rows a KV head; append them first");
}

WorkspaceLayout workspace_layout(const kvmix_cuda_attend_params& p, bool split) {
  const size_t tickets =
      static_cast<size_t>(p.sequences) * static_cast<size_t>(p.kv_heads) * static_cast<size_t>(row_blocks(p)) * sizeof(int32_t);
  // Of launches for all pages the prefill kernel takes chunks, and splits the short ones.
  const bool chunk = query_rows(p) > kTileRows && !split;
  const auto rows = static_cast<size_t>(!chunk || splits_chunks(p) ? query_rows(p) : 0);
  return {(tickets + 255) / 256 * 256, (rows * 2 * sizeof(float) + 15) / 16 * 16,
          rows * sizeof(float) * static_cast<size_t>(p.format.head_dim),
          chunk ? kMostSplitBlocks / prefill_blocks(p) : INT32_MAX};
}

#ifndef KVMIX_CUDA
namespace {
[[noreturn]] void no_cuda() {
  throw Error(Status::kUnsupported, "CUDA is not available in this build; configure with -DKVMIX_CUDA=ON");
}
}  // namespace
void attend(const kvmix_cuda_attend_params&, const OpenPages&) { no_cuda(); }
Residency residency(const kvmix_cuda_attend_params&) { no_cuda(); }
bool has_prefill_kernel() { return false; }
int most_shared_bytes() { return kMostSharedBytes; }
#endif

}  // namespace kvmix::cuda
