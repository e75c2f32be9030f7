// What pages give back of the rows that went into them, as the running cache stores them.
#pragma once

#include <cstdint>
#include <vector>

#include "codec/codec_family.h"
#include "kvmix/cache.h"
#include "rows/row_map.h"

namespace kvmix {

// Pages of rows that are mapped already, sealed.
class SealedPage {
 public:
  // Throws kInvalidArgument for a codec that does not take rows of this width.
  SealedPage(const CodecSpec& codec, int width, Side side);
  // kPageTokens rows of fp16 numbers, encoded and decoded. `feedback` as Codec::encode takes it.
  void read(const uint16_t* rows, const float* feedback, float* out);

 private:
  TileFormat format_;
  std::vector<std::byte> memory_;
};

// Rows that are mapped already and not sealed yet, in a codec that takes rows.
class RecentRows {
 public:
  // The feedback of one KV head or, as the cache stores values, null.
  RecentRows(const CodecSpec& codec, int width, const float* feedback);
  // n rows in place.
  void read(int64_t n, float* rows) const;

 private:
  CodecSpec codec_;
  int width_;
  std::vector<float> columns_;  // of the feedback
};

class StoredPage {
 public:
  // The config must stay as it is; `recent` as in LayerConfig. Throws kInvalidArgument for one that does not fit the shape,
  // whose width is the head_dim.
  StoredPage(const SideConfig& config, const CodecSpec& recent, const RowShape& shape);
  // kPageTokens rows of one KV head, `stride` floats apart in both, once they are sealed: mapped, kept as recent rows, encoded,
  // decoded and mapped back.
  void read_sealed(int kv_head, int64_t stride, const float* rows, float* out);
  // n rows likewise that are not sealed yet.
  void read_recent(int kv_head, int64_t n, int64_t stride, const float* rows, float* out);

 private:
  // At most a page of rows to what recent rows give back, in `mapped_`, and what is there back to rows.
  void keep(int kv_head, int64_t n, int64_t stride, const float* rows);
  void map_back(int kv_head, int64_t n, int64_t stride, float* out);

  int head_dim_;
  RowMapChain maps_;
  SealedPage sealed_;
  std::vector<RecentRows> recent_;  // of each KV head; none where they are fp16, which a page is made of anyway
  std::vector<float> row_, mapped_;
  std::vector<uint16_t> half_;
};

}  // namespace kvmix
