#include "score/stored_page.h"

#include <algorithm>
#include <memory>

#include "codec/encoders.h"
#include "codec/row.h"

namespace kvmix {

StoredPage::StoredPage(const SideConfig& config, const CodecSpec& recent, const RowShape& shape)
    : head_dim_(shape.width),
      recent_(open_codec(recent, config.codec)),
      maps_(config.transform, shape, shape.side == Side::kKey ? "keys" : "values"),
      format_(tile_format(config.codec, {kPageTokens, maps_.width(), shape.side})),
      memory_(format_.bytes + 64),
      half_(static_cast<size_t>(kPageTokens * format_.width)),
      row_(static_cast<size_t>(maps_.room())),
      decoded_(half_.size()) {
  // As the cache does: keys are what queries meet one by one, so theirs alone are fed back.
  if (recent_.is_f16() || shape.side != Side::kKey || maps_.feedback(0) == nullptr) return;
  const auto square = static_cast<ptrdiff_t>(format_.width) * format_.width;
  columns_.resize(static_cast<size_t>(shape.kv_heads * square));
  for (int h = 0; h < shape.kv_heads; ++h) feedback_columns(maps_.feedback(h), format_.width, columns_.data() + h * square);
}

void StoredPage::keep(int kv_head) {
  if (recent_.is_f16()) return;
  const auto square = static_cast<ptrdiff_t>(format_.width) * format_.width;
  std::byte record[kMostRowBytes];
  encode_rows(recent_, format_.width, 1, row_.data(), columns_.empty() ? nullptr : columns_.data() + kv_head * square, record);
  decode_row(recent_, format_.width, record, row_.data());
}

void StoredPage::read_recent(int kv_head, int64_t n, int64_t stride, const float* rows, float* out) {
  for (int64_t t = 0; t < n; ++t) {
    std::copy_n(rows + t * stride, head_dim_, row_.data());
    maps_.store(kv_head, row_.data());
    keep(kv_head);
    maps_.output(kv_head, row_.data());
    std::copy_n(row_.data(), head_dim_, out + t * stride);
  }
}

void StoredPage::read_sealed(int kv_head, int64_t stride, const float* rows, float* out) {
  void* aligned = memory_.data();
  size_t space = memory_.size();
  auto* tile = static_cast<std::byte*>(std::align(64, format_.bytes, aligned, space));
  const int width = format_.width;
  for (int t = 0; t < kPageTokens; ++t) {
    std::copy_n(rows + t * stride, head_dim_, row_.data());
    maps_.store(kv_head, row_.data());
    keep(kv_head);
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
