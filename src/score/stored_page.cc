#include "score/stored_page.h"

#include <algorithm>
#include <memory>

#include "rows/transform.h"

namespace kvmix {
namespace {

constexpr int kMaxHeadDim = 256;

}  // namespace

StoredPage::StoredPage(const SideConfig& config, Side side, int head_dim)
    : config_(config),
      side_(side),
      head_dim_(head_dim),
      encoder_(best_tile_encoder()),
      memory_(tile_bytes(config.codec, head_dim) + 64),
      half_(static_cast<size_t>(kPageTokens * head_dim)),
      decoded_(half_.size()) {}

void StoredPage::read_back(int kv_head, int64_t stride, const float* rows, float* out) {
  void* aligned = memory_.data();
  size_t space = memory_.size();
  auto* tile = static_cast<std::byte*>(std::align(64, tile_bytes(config_.codec, head_dim_), aligned, space));
  float row[kMaxHeadDim];
  for (int t = 0; t < kPageTokens; ++t) {
    std::copy_n(rows + t * stride, head_dim_, row);
    transform_row(config_.transform, kv_head, head_dim_, row);
    encoder_.to_f16(row, head_dim_, half_.data() + static_cast<ptrdiff_t>(t) * head_dim_);
  }
  encoder_.encode_with(config_.codec, side_, head_dim_, half_.data(), head_feedback(config_.transform, kv_head, head_dim_),
                       tile);
  decode_tile(config_.codec, side_, head_dim_, tile, decoded_.data());
  for (int t = 0; t < kPageTokens; ++t) {
    float* to = out + t * stride;
    std::copy_n(decoded_.data() + static_cast<ptrdiff_t>(t) * head_dim_, head_dim_, to);
    inverse_row(config_.transform, kv_head, head_dim_, to);
  }
}

}  // namespace kvmix
