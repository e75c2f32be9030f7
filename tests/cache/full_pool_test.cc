// Many sequences that share a prefix in a pool that is full all the time: each attends to its own tokens and to nothing else's,
// however often pages are freed, taken again, shared and cut. Layers differ in width and so in the size of their pages.
#include <gtest/gtest.h>

#include <map>

#include "kvmix/error.h"
#include "support/cache_fixture.h"

namespace kvmix {
namespace {

using testing::make_layer;
using testing::random_rows;
using testing::Rows;
using testing::step;

constexpr int kPrefix = 300;

CacheConfig two_widths(const CodecSpec& key, const CodecSpec& value, const CodecSpec& recent) {
  CacheConfig config;
  LayerConfig wide = make_layer(2, 1, 128, key, value, 16, 64);
  wide.sliding_window = 200;
  config.layers = {make_layer(4, 2, 64, key, value, 16, 64), wide};
  for (LayerConfig& layer : config.layers) layer.recent = recent;
  config.threads = 2;
  return config;
}

// A cache under a limit beside one without, where every sequence has its prefix for itself.
class FullPool {
 public:
  FullPool(const CacheConfig& config, size_t limit)
      : own_(config), limit_(limit), full_([&] {
          CacheConfig limited = config;
          limited.max_bytes = limit;
          return limited;
        }()) {
    random_.seed(11);
    prefix_rows_ = random_rows(config.layers[0], kPrefix, random_);
    prefix_ = full_.create();
    Rows rows = prefix_rows_;
    step(full_, {{prefix_, kPrefix}}, rows);
  }

  void act() {
    const unsigned what = random_() % 8;
    if (what == 0 || both_.empty()) {
      const SequenceId own = own_.create();
      Rows rows = prefix_rows_;
      step(own_, {{own, kPrefix}}, rows);
      both_[full_.fork(prefix_)] = own;
    } else if (what == 1) {
      const auto [id, own] = any();
      const auto n = static_cast<int64_t>(random_() % static_cast<unsigned>(full_.length(id) + 1));
      if (attempt(id, [&, id = id] { full_.truncate(id, n); })) {
        own_.truncate(own, n);
        ASSERT_EQ(full_.length(id), own_.length(own));
      }
    } else {
      const auto [id, own] = any();
      const int n = what == 2 ? static_cast<int>(1 + random_() % 150) : 1;
      Rows rows = random_rows(own_.config().layers[0], n, random_), same = rows;
      if (attempt(id, [&, id = id] { step(full_, {{id, n}}, rows); })) {
        step(own_, {{own, n}}, same);
        ASSERT_EQ(rows.out, same.out) << "sequence " << id << " at " << full_.length(id);
      }
    }
    const MemoryReport memory = full_.memory();
    ASSERT_LE(memory.total_bytes - memory.table_bytes, limit_);
  }

  void compare_contents() {
    for (const auto& [id, own] : both_) {
      for (const Side side : {Side::kKey, Side::kValue}) {
        for (int h = 0; h < 2; ++h) ASSERT_EQ(testing::stored(full_, id, h, side), testing::stored(own_, own, h, side));
      }
    }
    EXPECT_EQ(full_.length(prefix_), kPrefix);
  }

  int refused = 0;

 private:
  std::pair<SequenceId, SequenceId> any() {
    return *std::next(both_.begin(), static_cast<ptrdiff_t>(random_() % both_.size()));
  }
  void remove(SequenceId id) {
    full_.remove(id);
    own_.remove(both_.at(id));
    both_.erase(id);
  }
  // Does something to sequence `id`. Where memory is short others go until it suffices, `id` last. Whether it was done, which a
  // truncation to what a sliding window has left behind is not.
  template <class F>
  bool attempt(SequenceId id, const F& change) {
    for (;;) {
      try {
        change();
        return true;
      } catch (const Error& e) {
        if (e.status() == Status::kUnsupported) return false;
        EXPECT_EQ(e.status(), Status::kOutOfMemory) << e.what();
        ++refused;
      }
      SequenceId other = any().first;
      while (other == id && both_.size() > 1) other = any().first;
      remove(other);
      if (other == id) return false;
    }
  }

  Cache own_;
  size_t limit_;
  Cache full_;
  std::mt19937 random_;
  Rows prefix_rows_;
  SequenceId prefix_{};
  std::map<SequenceId, SequenceId> both_;  // of the full cache, of the other
};

TEST(FullPool, SequencesThatShareAPrefixDoNotMeetEachOther) {
  const CodecSpec per_token{8, Axis::kToken, 64, Fit::kMinMax, true};
  for (const CodecSpec& recent : testing::kRecents) {
    for (const auto& [key, value] : {std::pair{per_token, per_token}, {testing::key_codec(4), testing::value_codec(2)}}) {
      const CacheConfig config = two_widths(key, value, recent);
      Cache probe(config);
      std::mt19937 random(1);
      Rows rows = random_rows(config.layers[0], 600, random);
      step(probe, {{probe.create(), 600}}, rows);
      FullPool pool(config, 3 * probe.memory().total_bytes);
      for (int i = 0; i < 600; ++i) ASSERT_NO_FATAL_FAILURE(pool.act()) << "action " << i;
      ASSERT_NO_FATAL_FAILURE(pool.compare_contents());
      EXPECT_GT(pool.refused, 10);
    }
  }
}

}  // namespace
}  // namespace kvmix
