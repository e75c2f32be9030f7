// What pages give back of the rows that went into them, as the running cache stores them.
#pragma once

#include <cstdint>
#include <vector>

#include "codec/codec_family.h"
#include "kvmix/cache.h"
#include "rows/row_map.h"

namespace kvmix {

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
  // The row as it stands in `row_` to what recent rows give back.
  void keep(int kv_head);

  int head_dim_;
  CodecSpec recent_;
  RowMapChain maps_;
  TileFormat format_;
  std::vector<std::byte> memory_;
  std::vector<uint16_t> half_;
  std::vector<float> row_, decoded_;
  std::vector<float> columns_;  // of the feedback, [kv_heads][width][width]; empty where recent rows have none
};

}  // namespace kvmix
