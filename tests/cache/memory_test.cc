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
    const SequenceId id = cache.create();
    for (int n = 0; n < 8192; n += kChunk) testing::step(cache, {{id, kChunk}}, rows);
    testing::Rows row = testing::random_rows(config.layers.front(), 1, random);
    for (int n = 0; n < 4; ++n) testing::step(cache, {{id, 1}}, row);
    const auto grown = static_cast<double>(resident_bytes() - before);
    const MemoryReport report = cache.memory();
    const auto accounted = static_cast<double>(report.total_bytes);
    constexpr double kConstant = 2 << 20;  // work space and what malloc keeps
    std::printf("accounted %.2f MiB, resident growth %.2f MiB, predicted %.2f MiB, work space %.2f MiB\n",
                accounted / (1 << 20), grown / (1 << 20), static_cast<double>(predict_bytes(config, 8196)) / (1 << 20),
                static_cast<double>(report.scratch_bytes) / (1 << 20));
    EXPECT_NEAR(grown, accounted, 0.05 * accounted + kConstant);
    EXPECT_NEAR(accounted, static_cast<double>(predict_bytes(config, 8196)), 0.05 * accounted);
  }
}

}  // namespace
}  // namespace kvmix
