// Copies of sequences that share nothing.
#include <gtest/gtest.h>

#include "kvmix/cache.h"
#include "kvmix/error.h"
#include "support/cache_fixture.h"
#include "support/devices.h"

namespace kvmix {
namespace {

using testing::key_codec;
using testing::make_layer;
using testing::one_layer;
using testing::random_rows;
using testing::Rows;
using testing::step;
using testing::stored;
using testing::value_codec;

size_t in_use(const Cache& cache) {
  const MemoryReport m = cache.memory();
  return m.sealed_bytes + m.open_bytes + m.sink_bytes;
}

class CopyOn : public testing::OnDevice {};
INSTANTIATE_TEST_SUITE_P(Devices, CopyOn, ::testing::ValuesIn(testing::kDevices), testing::device_name);

TEST_P(CopyOn, HasPagesOfItsOwnAndGoesItsOwnWay) {
  std::mt19937 random(5);
  Cache cache(here(one_layer(make_layer(4, 2, 64, key_codec(2), value_codec(2)))));
  const SequenceId a = cache.create();
  Rows rows = random_rows(cache.config().layers[0], 600, random);
  step(cache, {{a, 600}}, rows);
  rows = random_rows(cache.config().layers[0], 1, random);
  step(cache, {{a, 1}}, rows);
  const size_t one = in_use(cache);
  // Also of a sequence that shares with another.
  const SequenceId fork = cache.fork(a), copy = cache.copy(fork);
  EXPECT_EQ(in_use(cache), 2 * one);
  EXPECT_EQ(cache.length(copy), 601);
  for (const Side side : {Side::kKey, Side::kValue}) EXPECT_EQ(stored(cache, copy, 1, side), stored(cache, a, 1, side));
  const std::vector<float> keys = stored(cache, a, 0, Side::kKey);
  cache.truncate(copy, 130);
  for (int i = 0; i < 200; ++i) {
    rows = random_rows(cache.config().layers[0], 1, random);
    step(cache, {{copy, 1}}, rows);
  }
  EXPECT_EQ(stored(cache, a, 0, Side::kKey), keys);
  cache.remove(copy);
  EXPECT_EQ(in_use(cache), one);
  cache.remove(a), cache.remove(fork);
  EXPECT_EQ(cache.memory().total_bytes, 0u);
}

TEST_P(CopyOn, WithoutRoomNothingChanges) {
  std::mt19937 random(6);
  CacheConfig config = here(one_layer(make_layer(2, 2, 64, CodecSpec{}, CodecSpec{})));
  config.max_bytes = size_t{8} << 20;
  Cache cache(config);
  const SequenceId a = cache.create();
  for (int i = 0; i < 20; ++i) {
    Rows rows = random_rows(config.layers[0], 500, random);
    step(cache, {{a, 500}}, rows);
  }
  const size_t one = in_use(cache);
  ASSERT_GT(2 * one, config.max_bytes);
  try {
    cache.copy(a);
    FAIL() << "there is no room for it";
  } catch (const Error& e) {
    EXPECT_EQ(e.status(), Status::kOutOfMemory);
  }
  EXPECT_EQ(in_use(cache), one);
  EXPECT_EQ(cache.sequences(), std::vector<SequenceId>{a});
  Rows rows = random_rows(config.layers[0], 1, random);
  step(cache, {{a, 1}}, rows);
  EXPECT_EQ(cache.length(a), 10001);
}

}  // namespace
}  // namespace kvmix
