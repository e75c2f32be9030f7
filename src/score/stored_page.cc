#include "score/stored_page.h"

#include <algorithm>
#include <memory>

#include "codec/encoders.h"
#include "codec/row.h"

namespace kvmix {

SealedPage::SealedPage(const CodecSpec& codec, int width, Side side)
    : format_(tile_format(codec, {kPageTokens, width, side})), memory_(format_.bytes + 64) {}

void SealedPage::read(const uint16_t* rows, const float* feedback, float* out) {
  void* aligned = memory_.data();
  size_t space = memory_.size();
  auto* tile = static_cast<std::byte*>(std::align(64, format_.bytes, aligned, space));
  const Codec& codec = codec_of(format_.spec);
  codec.encode(format_.spec, format_.shape(), rows, feedback, tile);
  codec.decode(format_.spec, format_.shape(), tile, out);
}

RecentRows::RecentRows(const CodecSpec& codec, int width, const float* feedback) : codec_(codec), width_(width) {
  if (feedback == nullptr) return;
  columns_.resize(static_cast<size_t>(width) * static_cast<size_t>(width));
  feedback_columns(feedback, width, columns_.data());
}

void RecentRows::read(int64_t n, float* rows) const {
  constexpr int kTogether = 16;
  std::byte records[kTogether * kMostRowBytes];
  const size_t bytes = row_bytes(codec_, width_);
  for (int64_t t = 0; t < n; t += kTogether, rows += kTogether * width_) {
    const int some = static_cast<int>(std::min<int64_t>(kTogether, n - t));
    encode_rows(codec_, width_, some, rows, columns_.empty() ? nullptr : columns_.data(), records);
    for (int i = 0; i < some; ++i) decode_row(codec_, width_, records + static_cast<size_t>(i) * bytes, rows + i * width_);
  }
}

StoredPage::StoredPage(const SideConfig& config, const CodecSpec& recent, const RowShape& shape)
    : head_dim_(shape.width),
      maps_(config.transform, shape, shape.side == Side::kKey ? "keys" : "values"),
      sealed_(config.codec, maps_.width(), shape.side),
      row_(static_cast<size_t>(maps_.room())),
      mapped_(static_cast<size_t>(kPageTokens * maps_.width())),
      half_(mapped_.size()) {
  const CodecSpec open = open_codec(recent, config.codec);
  // As the cache does: keys are what queries meet one by one, so theirs alone are fed back.
  for (int h = 0; !open.is_f16() && h < shape.kv_heads; ++h)
    recent_.emplace_back(open, maps_.width(), shape.side == Side::kKey ? maps_.feedback(h) : nullptr);
}

void StoredPage::keep(int kv_head, int64_t n, int64_t stride, const float* rows) {
  for (int64_t t = 0; t < n; ++t) {
    std::copy_n(rows + t * stride, head_dim_, row_.data());
    maps_.store(kv_head, row_.data());
    std::copy_n(row_.data(), maps_.width(), mapped_.data() + t * maps_.width());
  }
  if (!recent_.empty()) recent_[static_cast<size_t>(kv_head)].read(n, mapped_.data());
}

void StoredPage::map_back(int kv_head, int64_t n, int64_t stride, float* out) {
  for (int64_t t = 0; t < n; ++t) {
    std::copy_n(mapped_.data() + t * maps_.width(), maps_.width(), row_.data());
    maps_.output(kv_head, row_.data());
    std::copy_n(row_.data(), head_dim_, out + t * stride);
  }
}

void StoredPage::read_recent(int kv_head, int64_t n, int64_t stride, const float* rows, float* out) {
  for (int64_t t = 0; t < n; t += kPageTokens) {
    const int64_t some = std::min<int64_t>(kPageTokens, n - t);
    keep(kv_head, some, stride, rows + t * stride);
    map_back(kv_head, some, stride, out + t * stride);
  }
}

void StoredPage::read_sealed(int kv_head, int64_t stride, const float* rows, float* out) {
  keep(kv_head, kPageTokens, stride, rows);
  to_f16(mapped_.data(), kPageTokens * maps_.width(), half_.data());
  sealed_.read(half_.data(), maps_.feedback(kv_head), mapped_.data());
  map_back(kv_head, kPageTokens, stride, out);
}

}  // namespace kvmix
