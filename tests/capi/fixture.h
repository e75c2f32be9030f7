// One layer's cache through the C ABI.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kvmix/kvmix.h"

namespace kvmix::testing {

inline constexpr int kHeads = 4, kKvHeads = 2, kDim = 64;

struct CacheDeleter {
  void operator()(kvmix_cache* cache) const { kvmix_cache_destroy(cache); }
};
using CachePointer = std::unique_ptr<kvmix_cache, CacheDeleter>;

inline kvmix_layer_config c_layer() {
  kvmix_layer_config layer = {};
  layer.struct_bytes = sizeof layer;
  EXPECT_EQ(kvmix_layer_defaults(&layer), KVMIX_OK);
  layer.q_heads = kHeads, layer.kv_heads = kKvHeads, layer.head_dim = kDim;
  return layer;
}

inline kvmix_cache_options c_options() {
  kvmix_cache_options options = {};
  options.struct_bytes = sizeof options;
  return options;
}

inline CachePointer c_cache(const kvmix_layer_config& layer) {
  kvmix_cache* cache = nullptr;
  EXPECT_EQ(kvmix_cache_create(&layer, 1, nullptr, &cache), KVMIX_OK) << kvmix_last_error();
  return CachePointer(cache);
}

inline std::vector<float> noise(size_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(n);
  for (float& v : x) v = normal(random);
  return x;
}

// The rows of one step of n tokens.
struct StepRows {
  StepRows(int n, unsigned seed)
      : q(noise(static_cast<size_t>(n * kHeads * kDim), seed)),
        k(noise(static_cast<size_t>(n * kKvHeads * kDim), seed + 1)),
        v(noise(k.size(), seed + 2)),
        out(q.size()) {}
  static constexpr int64_t kQRow = kHeads * kDim, kKvRow = kKvHeads * kDim;
  std::vector<float> q, k, v, out;
};

// One step of n tokens, the same rows in every layer; the output of the last.
inline std::vector<float> run(kvmix_cache* cache, kvmix_sequence id, int n, unsigned seed, int layers = 1) {
  StepRows rows(n, seed);
  const kvmix_step_item item = {sizeof item, id, n, 0, 0};
  EXPECT_EQ(kvmix_step_begin(cache, &item, 1), KVMIX_OK) << kvmix_last_error();
  for (int l = 0; l < layers; ++l) {
    EXPECT_EQ(kvmix_cache_append(cache, l, rows.k.data(), rows.kKvRow, rows.v.data(), rows.kKvRow, 0, 1), KVMIX_OK);
    EXPECT_EQ(kvmix_cache_attend(cache, l, rows.q.data(), rows.kQRow, rows.out.data(), rows.kQRow, 0, 1), KVMIX_OK);
  }
  EXPECT_EQ(kvmix_step_end(cache), KVMIX_OK);
  return rows.out;
}

}  // namespace kvmix::testing
