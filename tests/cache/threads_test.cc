// The work split: any number of threads gives the same attention, and the same number the same bits. And what happens at the
// memory limit.
#include <gtest/gtest.h>

#include "kvmix/error.h"
#include "support/cache_fixture.h"

namespace kvmix {
namespace {

using testing::key_codec;
using testing::make_layer;
using testing::random_rows;
using testing::Rows;
using testing::step;
using testing::value_codec;

struct Outputs {
  std::vector<float> prefill, decode, stored;
};

Outputs run(const LayerConfig& layer, int threads, const std::string& kernel) {
  CacheConfig config;
  config.layers = {layer, layer};
  config.threads = threads;
  config.kernel = kernel;
  Cache cache(config);
  std::mt19937 random(5);
  const SequenceId a = cache.create(), b = cache.create();
  Outputs result;
  Rows rows = random_rows(layer, 450 + 70, random);  // two sealed pages and three that are not, and less than one
  step(cache, {{a, 450}, {b, 70}}, rows);
  result.prefill = rows.out;
  for (int i = 0; i < 3; ++i) {
    rows = random_rows(layer, 1 + 3, random);
    step(cache, {{a, 1}, {b, 3}}, rows);
  }
  result.decode = rows.out;
  result.stored.resize(static_cast<size_t>(cache.length(a) * layer.head_dim));
  cache.read(a, 1, layer.kv_heads - 1, Side::kKey, false, result.stored.data());
  return result;
}

TEST(Threads, OfTheCacheGiveTheCallersBits) {
  for (const int threads : {1, 3}) {
    const LayerConfig layer = make_layer(9, 3, 64, key_codec(2), value_codec(2));
    Cache callers(testing::one_layer(layer, threads)), own(testing::one_layer(layer, threads));
    const SequenceId a = callers.create(), b = own.create();
    std::mt19937 random(6);
    for (const int n : {300, 1, 7}) {
      Rows rows = random_rows(layer, n, random);
      step(callers, {{a, n}}, rows);
      std::vector<float> out(rows.out.size());
      const StepItem item = {b, n};
      own.begin_step({&item, 1});
      own.step_layer(0, rows.k.data(), 3 * 64, rows.v.data(), 3 * 64, rows.q.data(), 9 * 64, out.data(), 9 * 64);
      own.end_step();
      EXPECT_EQ(out, rows.out) << threads << " threads, " << n << " tokens";
    }
  }
}

TEST(Threads, AnyCountGivesTheSameWithinSummationOrder) {
  for (const bool codes : {false, true}) {
    for (const AttentionKernelInfo& kernel : attention_kernels()) {
      if (!kernel.available) continue;
      LayerConfig layer = make_layer(9, 3, 64, key_codec(2), value_codec(2));
      if (codes) {
        layer.recent = testing::kRecents.back();
        layer.key.transform.feedback.assign(3 * 64 * 63 / 2, 0.05f);
      }
      const Outputs one = run(layer, 1, kernel.name);
      for (const int threads : {2, 5}) {
        const Outputs many = run(layer, threads, kernel.name), again = run(layer, threads, kernel.name);
        EXPECT_EQ(many.decode, again.decode) << kernel.name << ", " << threads << " threads";
        EXPECT_EQ(many.prefill, again.prefill) << kernel.name << ", " << threads << " threads";
        EXPECT_EQ(many.stored, one.stored);
        for (size_t i = 0; i < one.decode.size(); ++i) ASSERT_NEAR(many.decode[i], one.decode[i], 1e-2f) << kernel.name;
        for (size_t i = 0; i < one.prefill.size(); ++i) ASSERT_NEAR(many.prefill[i], one.prefill[i], 1e-2f) << kernel.name;
      }
    }
  }
}

// At a limit that leaves no room for the fp16 form of a cut page, truncating says so and changes nothing.
TEST(Truncate, WithoutMemoryChangesNothing) {
  CacheConfig config;
  config.layers = {make_layer(1, 1, 64, key_codec(2), value_codec(2), 16, 0)};
  Cache probe(config);
  const auto fill = [&](Cache& cache) {
    std::mt19937 same(7);
    const SequenceId id = cache.create();
    for (const int n : {16 + 128, 128, 128, 128, 1}) {
      Rows rows = random_rows(config.layers[0], n, same);
      step(cache, {{id, n}}, rows);
    }
    return id;
  };
  fill(probe);
  // Shared pages stay taken when the copy is cut, so the cut needs memory of its own.
  for (size_t limit = probe.memory().total_bytes; limit < probe.memory().total_bytes + (size_t{1} << 20); limit += 16384) {
    config.max_bytes = limit;
    Cache cache(config);
    SequenceId id;
    try {
      id = fill(cache);
    } catch (const Error& e) {
      EXPECT_EQ(e.status(), Status::kOutOfMemory);
      continue;
    }
    int copies = 0;
    try {
      for (; copies < 64; ++copies) cache.truncate(cache.fork(id), 100);
      FAIL() << "64 fp16 pages fitted into " << limit << " bytes";
    } catch (const Error& e) {
      EXPECT_EQ(e.status(), Status::kOutOfMemory);
    }
    EXPECT_EQ(cache.length(cache.sequences().back()), cache.length(id));
    std::vector<float> before(static_cast<size_t>(cache.length(id) * 64)), after(before.size());
    cache.read(id, 0, 0, Side::kKey, true, before.data());
    cache.read(cache.sequences().back(), 0, 0, Side::kKey, true, after.data());
    EXPECT_EQ(before, after);
  }
}

}  // namespace
}  // namespace kvmix
