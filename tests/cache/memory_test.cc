// What the cache says it takes is what the system gave it.
#include <gtest/gtest.h>
#include <malloc.h>

#include "support/cache_fixture.h"
#include "support/resident.h"

namespace kvmix {
namespace {

using testing::kSanitized;
using testing::resident_bytes;

// Eight thousand tokens of a prompt and some decoded ones in sixteen layers: resident memory grows by the reported bytes, and
// they are the predicted ones.
TEST(Memory, ResidentGrowthIsWhatIsAccounted) {
  if (kSanitized) GTEST_SKIP() << "resident memory is the sanitizer's";
  for (const CodecSpec& recent : testing::kRecents) {
    CacheConfig config;
    for (int l = 0; l < 16; ++l)
      config.layers.push_back(
          testing::with_recent(testing::make_layer(8, 8, 64, testing::key_codec(3), testing::value_codec(2)), recent));
    std::mt19937 random(1);
    constexpr int kChunk = 512;
    testing::Rows rows = testing::random_rows(config.layers.front(), kChunk, random);
    {  // allocator arenas, thread stacks and work space that stays
      Cache warm(config);
      testing::step(warm, {{warm.create(), kChunk}}, rows);
    }
    malloc_trim(0);
    const size_t before = resident_bytes();
    Cache cache(config);
    constexpr int kSequences = 4, kPrompt = 2048, kDecoded = 4;
    testing::Rows row = testing::random_rows(config.layers.front(), 1, random);
    for (int s = 0; s < kSequences; ++s) {
      const SequenceId id = cache.create();
      for (int n = 0; n < kPrompt; n += kChunk) testing::step(cache, {{id, kChunk}}, rows);
      for (int n = 0; n < kDecoded; ++n) testing::step(cache, {{id, 1}}, row);
    }
    const auto grown = static_cast<double>(resident_bytes() - before);
    const MemoryReport report = cache.memory();
    const auto accounted = static_cast<double>(report.total_bytes);
    const auto predicted = static_cast<double>(kSequences * predict_bytes(config, kPrompt + kDecoded));
    constexpr double kConstant = 2 << 20;  // work space and what malloc keeps
    std::printf("accounted %.2f MiB, resident growth %.2f MiB, predicted %.2f MiB, work space %.2f MiB\n",
                accounted / (1 << 20), grown / (1 << 20), predicted / (1 << 20),
                static_cast<double>(report.scratch_bytes) / (1 << 20));
    EXPECT_NEAR(grown, accounted, 0.05 * accounted + kConstant);
    EXPECT_NEAR(accounted, predicted, 0.05 * accounted);
  }
}

// Layers of many codecs have many sizes of records, each of which takes whole system pages: what a plan for so many bytes
// promises is kept at every length, and after a prompt that came in chunks as well.
TEST(Memory, NeverMoreThanPredictedWithSlack) {
  CacheConfig config;
  for (const CodecSpec& recent : testing::kRecents) {
    for (const int bits : {1, 2, 3, 4, 5, 6, 8}) {
      config.layers.push_back(testing::with_recent(
          testing::make_layer(3, 3, 64, testing::key_codec(bits), testing::value_codec(9 - bits > 6 ? 8 : 3)), recent));
    }
    config.layers.push_back(
        testing::with_recent(testing::make_layer(2, 1, 96, testing::key_codec(2, 32), testing::value_codec(2)), recent));
    config.layers.back().sliding_window = 300;
  }
  // All layers are given rows of the first: those of the last are narrower together.
  std::mt19937 random(2);
  const testing::Rows rows = testing::random_rows(config.layers.front(), 512, random);
  const auto most = [&](int64_t n) { return predict_bytes(config, n) + predict_slack_bytes(config, n); };
  const auto feed = [&](Cache& cache, SequenceId id, int n) {
    const StepItem item{id, n};
    cache.begin_step({&item, 1});
    for (int l = 0; l < static_cast<int>(config.layers.size()); ++l) {
      cache.append(l, rows.k.data(), 192, rows.v.data(), 192, 0, 1);
    }
    cache.end_step();
  };
  Cache single(config), chunked(config);
  const SequenceId a = single.create(), b = chunked.create();
  size_t largest_slack = 0;
  for (int64_t n = 1; n <= 1500; ++n) {
    feed(single, a, 1);
    const MemoryReport m = single.memory();
    ASSERT_LE(m.total_bytes, most(n)) << n;
    largest_slack = std::max(largest_slack, m.slack_bytes);
  }
  for (const int n : {512, 512, 475, 1}) feed(chunked, b, n);
  EXPECT_LE(chunked.memory().total_bytes, most(1500));
  std::printf("1500 tokens: %zu bytes, predicted %zu and at most %zu more; largest slack %zu\n", single.memory().total_bytes,
              predict_bytes(config, 1500), predict_slack_bytes(config, 1500), largest_slack);
}

}  // namespace
}  // namespace kvmix
