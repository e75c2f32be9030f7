#include "score/stored_page.h"

#include <algorithm>
#include <memory>

#include "codec/encoders.h"

namespace kvmix {

StoredPage::StoredPage(const SideConfig& config, const RowShape& shape)
    : head_dim_(shape.width),
      maps_(config.transform, shape, shape.side == Side::kKey ? "keys" : "values"),
      format_(tile_format(config.codec, {kPageTokens, maps_.width(), shape.side})),
      memory_(format_.bytes + 64),
      half_(static_cast<size_t>(kPageTokens * format_.width)),
      row_(static_cast<size_t>(maps_.room())),
      decoded_(half_.size()) {}

void StoredPage::read_back(int kv_head, int64_t stride, const float* rows, float* out) {
  void* aligned = memory_.data();
  size_t space = memory_.size();
  auto* tile = static_cast<std::byte*>(std::align(64, format_.bytes, aligned, space));
  const int width = format_.width;
  for (int t = 0; t < kPageTokens; ++t) {
    std::copy_n(rows + t * stride, head_dim_, row_.data());
    maps_.store(kv_head, row_.data());
    to_f16(row_.data(), width, half_.data() + static_cast<ptrdiff_t>(t) * width);
  }
  const Codec& codec = codec_of(format_.spec);
  codec.encode(format_.spec, format_.shape(), half_.data(), maps_.feedback(kv_head), tile);
  codec.decode(format_.spec, format_.shape(), tile, decoded_.data());
  for (int t = 0; t < kPageTokens; ++t) {
    std::copy_n(decoded_.data() + static_cast<ptrdiff_t>(t) * width, width, row_.data());
    maps_.output(kv_head, row_.data());
    std::copy_n(row_.data(), head_dim_, out + t * stride);
  }
}

}  // namespace kvmix
