#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <random>
#include <string>
#include <vector>

#include "kvmix/cache.h"
#include "kvmix/error.h"
#include "kvmix/kvmix.h"

namespace {

constexpr int kHeads = 4, kKvHeads = 2, kDim = 64;

kvmix_layer_config layer() {
  kvmix_layer_config l;
  kvmix_layer_defaults(&l);
  l.q_heads = kHeads, l.kv_heads = kKvHeads, l.head_dim = kDim;
  return l;
}

kvmix_cache_config config(const kvmix_layer_config& l) { return {&l, 1, 1, 0, nullptr, 0}; }

std::vector<float> noise(size_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(n);
  for (float& v : x) v = normal(random);
  return x;
}

// One step of n tokens.
std::vector<float> run(kvmix_cache* cache, kvmix_sequence id, int n, unsigned seed) {
  const auto q = noise(static_cast<size_t>(n * kHeads * kDim), seed),
             k = noise(static_cast<size_t>(n * kKvHeads * kDim), seed + 1), v = noise(k.size(), seed + 2);
  std::vector<float> out(q.size());
  const kvmix_step_item item = {id, n};
  EXPECT_EQ(kvmix_step_begin(cache, &item, 1), KVMIX_OK) << kvmix_last_error();
  EXPECT_EQ(kvmix_cache_append(cache, 0, k.data(), kKvHeads * kDim, v.data(), kKvHeads * kDim, 0, 1), KVMIX_OK);
  EXPECT_EQ(kvmix_cache_attend(cache, 0, q.data(), kHeads * kDim, out.data(), kHeads * kDim, 0, 1), KVMIX_OK);
  EXPECT_EQ(kvmix_step_end(cache), KVMIX_OK);
  return out;
}

TEST(CApi, DoesWhatTheClassDoes) {
  for (const char* recent : {"f16", "int8.token.g64.minmax.zero"}) {
    kvmix_layer_config l = layer();
    l.recent_codec = recent;
    const kvmix_cache_config c = config(l);
    kvmix_cache* cache = nullptr;
    ASSERT_EQ(kvmix_cache_create(&c, &cache), KVMIX_OK) << kvmix_last_error();
    kvmix_sequence a = -1, b = -1, loaded = -1;
    ASSERT_EQ(kvmix_sequence_create(cache, &a), KVMIX_OK);
    run(cache, a, 500, 1);
    ASSERT_EQ(kvmix_sequence_fork(cache, a, &b), KVMIX_OK);
    const std::string path = ::testing::TempDir() + "/kvmix_c_api";
    ASSERT_EQ(kvmix_sequence_save(cache, a, path.c_str(), "f"), KVMIX_OK) << kvmix_last_error();
    ASSERT_EQ(kvmix_sequence_load(cache, path.c_str(), "f", &loaded), KVMIX_OK) << kvmix_last_error();
    EXPECT_EQ(kvmix_sequence_load(cache, path.c_str(), "g", &loaded), KVMIX_MISMATCH);
    std::filesystem::remove(path);
    const auto from_a = run(cache, a, 1, 9);
    EXPECT_EQ(run(cache, b, 1, 9), from_a);
    EXPECT_EQ(run(cache, loaded, 1, 9), from_a);
    for (const float x : from_a) EXPECT_TRUE(std::isfinite(x));

    int64_t n = 0;
    ASSERT_EQ(kvmix_sequence_truncate(cache, b, 100), KVMIX_OK);
    ASSERT_EQ(kvmix_sequence_length(cache, b, &n), KVMIX_OK);
    EXPECT_EQ(n, 100);
    kvmix_memory m;
    ASSERT_EQ(kvmix_cache_memory(cache, &m), KVMIX_OK);
    EXPECT_EQ(m.total_bytes, m.sealed_bytes + m.open_bytes + m.sink_bytes + m.table_bytes + m.slack_bytes);
    EXPECT_EQ(m.tokens, 501 + 100 + 501);
    const char* kernel = nullptr;
    ASSERT_EQ(kvmix_cache_kernel(cache, &kernel), KVMIX_OK);
    EXPECT_STRNE(kernel, "");
    for (const kvmix_sequence id : {a, b, loaded}) EXPECT_EQ(kvmix_sequence_remove(cache, id), KVMIX_OK);
    kvmix_cache_destroy(cache);
  }
}

TEST(CApi, FailuresAreStatusesWithOneLine) {
  kvmix_layer_config l = layer();
  kvmix_cache_config c = config(l);
  kvmix_cache* cache = nullptr;
  EXPECT_EQ(kvmix_cache_create(nullptr, &cache), KVMIX_INVALID_ARGUMENT);
  EXPECT_EQ(kvmix_cache_create(&c, nullptr), KVMIX_INVALID_ARGUMENT);
  l.key_codec = "int9";
  EXPECT_EQ(kvmix_cache_create(&c, &cache), KVMIX_INVALID_ARGUMENT);
  EXPECT_NE(std::string(kvmix_last_error()).find("int9"), std::string::npos);
  l.key_codec = nullptr;
  EXPECT_EQ(kvmix_cache_create(&c, &cache), KVMIX_INVALID_ARGUMENT);
  l = layer();
  l.recent_codec = "int8.channel.g64.minmax.zero";
  EXPECT_EQ(kvmix_cache_create(&c, &cache), KVMIX_INVALID_ARGUMENT);
  EXPECT_NE(std::string(kvmix_last_error()).find("recent"), std::string::npos);
  EXPECT_EQ(cache, nullptr);
  kvmix_cache_destroy(nullptr);

  l = layer();
  c.max_bytes = 1 << 20;
  ASSERT_EQ(kvmix_cache_create(&c, &cache), KVMIX_OK);
  kvmix_sequence id = -1;
  ASSERT_EQ(kvmix_sequence_create(cache, &id), KVMIX_OK);
  const float x[4 * kDim] = {};
  float out[4 * kDim];
  EXPECT_EQ(kvmix_cache_attend(cache, 0, x, kHeads * kDim, out, kHeads * kDim, 0, 1), KVMIX_INVALID_ARGUMENT);  // no step
  kvmix_step_item item = {id, 1000000};
  EXPECT_EQ(kvmix_step_begin(cache, &item, 1), KVMIX_OUT_OF_MEMORY);
  EXPECT_EQ(kvmix_step_end(cache), KVMIX_INVALID_ARGUMENT);
  item.n_tokens = 1;
  ASSERT_EQ(kvmix_step_begin(cache, &item, 1), KVMIX_OK);
  EXPECT_EQ(kvmix_cache_append(cache, 1, x, kDim, x, kDim, 0, 1), KVMIX_INVALID_ARGUMENT);
  EXPECT_EQ(kvmix_cache_append(cache, 0, x, kDim, x, kDim, 0, 2), KVMIX_INVALID_ARGUMENT);
  EXPECT_EQ(kvmix_cache_append(cache, 0, nullptr, kDim, x, kDim, 0, 1), KVMIX_INVALID_ARGUMENT);
  EXPECT_EQ(kvmix_step_abort(cache), KVMIX_OK);
  EXPECT_EQ(kvmix_sequence_remove(cache, 77), KVMIX_NOT_FOUND);
  EXPECT_EQ(kvmix_sequence_load(cache, "/nonexistent/file", "f", &id), KVMIX_NOT_FOUND);
  kvmix_cache_destroy(cache);
}

TEST(CApi, StatusesAreThoseOfTheLibrary) {
  for (int s = KVMIX_OK; s <= KVMIX_INTERNAL; ++s) {
    EXPECT_STREQ(kvmix_status_name(static_cast<kvmix_status>(s)), kvmix::status_name(static_cast<kvmix::Status>(s)));
  }
  EXPECT_EQ(static_cast<int>(kvmix::Status::kInternal), KVMIX_INTERNAL);
  EXPECT_STRNE(kvmix_version(), "");
}

}  // namespace
