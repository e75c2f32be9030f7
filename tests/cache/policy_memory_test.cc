// What a policy drops is resident memory that the system gets back.
#include <gtest/gtest.h>
#include <malloc.h>

#include "support/cache_fixture.h"
#include "support/resident.h"

namespace kvmix {
namespace {

// A prompt long enough for the pool to take huge pages.
TEST(PolicyMemory, DroppedTokensLeaveTheProcess) {
  if (testing::kSanitized) GTEST_SKIP() << "resident memory is the sanitizer's";
  CacheConfig config;
  for (int l = 0; l < 16; ++l) {
    config.layers.push_back(testing::with_recent(testing::make_layer(8, 8, 64, testing::key_codec(4), testing::value_codec(4)),
                                                 testing::kRecents.back()));
  }
  config.tokens = PolicySpec{"snapkv", {{"keep", 0.25}}};
  std::mt19937 random(1);
  constexpr int kChunk = 512, kPrompt = 4096;
  testing::Rows rows = testing::random_rows(config.layers.front(), kChunk, random);
  {
    Cache warm(config);
    testing::step(warm, {{warm.create(), kChunk}}, rows);
  }
  malloc_trim(0);
  const size_t before = testing::resident_bytes();
  Cache cache(config);
  const SequenceId id = cache.create();
  size_t most = 0;
  for (int n = 0; n < kPrompt; n += kChunk) {
    testing::step(cache, {{id, kChunk, n + kChunk < kPrompt}}, rows);
    most = std::max(most, cache.memory().total_bytes);
  }
  testing::Rows row = testing::random_rows(config.layers.front(), 1, random);
  for (int n = 0; n < 4; ++n) testing::step(cache, {{id, 1}}, row);
  malloc_trim(0);
  const auto grown = static_cast<double>(testing::resident_bytes() - before);
  const auto accounted = static_cast<double>(cache.memory().total_bytes);
  const auto predicted = static_cast<double>(predict_bytes(config, kPrompt + 4, kPrompt));
  const auto work = static_cast<double>(cache.memory().scratch_bytes);
  std::printf("at most %.1f MiB, then accounted %.2f, predicted %.2f, resident growth %.2f, work space %.2f MiB\n",
              static_cast<double>(most) / (1 << 20), accounted / (1 << 20), predicted / (1 << 20), grown / (1 << 20),
              work / (1 << 20));
  EXPECT_NEAR(accounted, predicted, 0.05 * predicted + (2 << 20));
  EXPECT_NEAR(grown, accounted, 0.05 * accounted + work + (2 << 20));
  EXPECT_LT(accounted, 0.3 * static_cast<double>(most));
}

}  // namespace
}  // namespace kvmix
