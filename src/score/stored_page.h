// What a sealed page gives back of the rows that went into it, as the running cache stores them.
#pragma once

#include <cstdint>
#include <vector>

#include "codec/codec_family.h"
#include "rows/row_map.h"

namespace kvmix {

class StoredPage {
 public:
  // The config must stay as it is. Throws kInvalidArgument for one that does not fit the shape, whose width is the head_dim.
  StoredPage(const SideConfig& config, const RowShape& shape);
  // kPageTokens rows of one KV head, `stride` floats apart in both: mapped, encoded, decoded and mapped back.
  void read_back(int kv_head, int64_t stride, const float* rows, float* out);

 private:
  int head_dim_;
  RowMapChain maps_;
  TileFormat format_;
  std::vector<std::byte> memory_;
  std::vector<uint16_t> half_;
  std::vector<float> row_, decoded_;
};

}  // namespace kvmix
