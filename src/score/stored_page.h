// What a sealed page gives back of the rows that went into it, as the running cache stores them.
#pragma once

#include <cstdint>
#include <vector>

#include "codec/encoders.h"
#include "kvmix/cache.h"

namespace kvmix {

class StoredPage {
 public:
  StoredPage(const SideConfig& config, Side side, int head_dim);
  // kPageTokens rows of one KV head, `stride` floats apart in both: transformed, encoded, decoded and transformed back.
  void read_back(int kv_head, int64_t stride, const float* rows, float* out);

 private:
  const SideConfig& config_;
  Side side_;
  int head_dim_;
  const TileEncoder& encoder_;
  std::vector<std::byte> memory_;
  std::vector<uint16_t> half_;
  std::vector<float> decoded_;
};

}  // namespace kvmix
