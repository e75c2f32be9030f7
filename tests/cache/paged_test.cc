// Attention over an engine's blocks, against the cache's own and exact attention. Over 500 lines: all tests go through the
// engine below.
#include "kvmix/paged.h"

#include <gtest/gtest.h>

#include <functional>

#include "kvmix/error.h"
#include "support/cache_fixture.h"
#include "support/device_bytes.h"
#include "support/devices.h"

namespace kvmix {
namespace {

using testing::key_codec;
using testing::kRecents;
using testing::make_layer;
using testing::one_layer;
using testing::oracle;
using testing::random_rows;
using testing::Rows;
using testing::step;
using testing::value_codec;
using testing::with_recent;

Rows slice(const Rows& all, const LayerConfig& layer, int begin, int end) {
  Rows part;
  const auto cut = [&](const std::vector<float>& from, int heads) {
    const ptrdiff_t width = static_cast<ptrdiff_t>(heads) * layer.head_dim;
    return std::vector<float>(from.begin() + begin * width, from.begin() + end * width);
  };
  part.q = cut(all.q, layer.q_heads);
  part.k = cut(all.k, layer.kv_heads);
  part.v = cut(all.v, layer.kv_heads);
  part.out.assign(part.q.size(), -1e9f);
  return part;
}

void append(Rows& to, const Rows& more) {
  to.q.insert(to.q.end(), more.q.begin(), more.q.end());
  to.k.insert(to.k.end(), more.k.begin(), more.k.end());
  to.v.insert(to.v.end(), more.v.begin(), more.v.end());
  to.out.insert(to.out.end(), more.out.begin(), more.out.end());
}

// Relative L2 error of a from b.
double error_of(const std::vector<float>& a, const std::vector<float>& b) {
  EXPECT_EQ(a.size(), b.size());
  double error = 0, norm = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    const double d = static_cast<double>(a[i]) - static_cast<double>(b[i]);
    error += d * d;
    norm += static_cast<double>(b[i]) * static_cast<double>(b[i]);
  }
  return std::sqrt(error / norm);
}

Status status_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& e) {
    return e.status();
  }
  ADD_FAILURE() << "nothing was thrown";
  return Status::kInternal;
}

// Where a sequence stands: new rows up to `length`, in blocks of these numbers.
struct Item {
  std::vector<int32_t> blocks;
  int rows, length;
};

// An engine of layers like one, whose blocks hold rubbish before they are written.
class Engine {
 public:
  static constexpr int kBlocks = 24;

  Engine(const CacheConfig& config, int most_sequences = 4) : paged(config, most_sequences) {
    for (size_t l = 0; l < config.layers.size(); ++l) {
      stride_.push_back(static_cast<int64_t>(paged.block_bytes(static_cast<int>(l)) + (config.device == "cpu" ? 64 : 128)));
      memory_.emplace_back(config.device, static_cast<size_t>(stride_.back()) * kBlocks, std::byte{0xA5});
    }
  }

  // The step's rows stand behind each other as the items do; out is written to.
  void step(const std::vector<Item>& items, Rows& rows, int layer = 0, bool spare = true) {
    std::vector<int32_t> begin = {0}, lengths, table;
    size_t most = 0;
    for (const Item& item : items) most = std::max(most, item.blocks.size());
    for (const Item& item : items) {
      begin.push_back(begin.back() + item.rows);
      lengths.push_back(item.length);
      table.insert(table.end(), item.blocks.begin(), item.blocks.end());
      table.resize(most * lengths.size(), -1);
    }
    const LayerConfig& shape = paged.config().layers[static_cast<size_t>(layer)];
    const int64_t q_stride = static_cast<int64_t>(shape.q_heads) * shape.head_dim,
                  kv_stride = static_cast<int64_t>(shape.kv_heads) * shape.head_dim;
    paged.step(layer,
               {.sequences = static_cast<int>(items.size()),
                .row_begin = begin.data(),
                .lengths = lengths.data(),
                .blocks = table.data(),
                .blocks_stride = static_cast<int64_t>(most),
                .spare = spare},
               memory_[static_cast<size_t>(layer)].data(), stride_[static_cast<size_t>(layer)], rows.k.data(), kv_stride,
               rows.v.data(), kv_stride, rows.q.data(), q_stride, rows.out.data(), q_stride);
  }
  // Rows [begin, end) of one sequence; their output.
  std::vector<float> feed(const Rows& all, const std::vector<int32_t>& blocks, int begin, int end, bool spare = true) {
    Rows rows = slice(all, paged.config().layers[0], begin, end);
    step({{blocks, end - begin, end}}, rows, 0, spare);
    return rows.out;
  }
  std::byte* memory() { return memory_[0].data(); }
  int64_t stride() const { return stride_[0]; }

  PagedAttention paged;

 private:
  std::vector<testing::DeviceBytes> memory_;
  std::vector<int64_t> stride_;
};

std::vector<int32_t> blocks_from(int first, int tokens) {
  std::vector<int32_t> blocks;
  for (int b = 0; b * kPageTokens < tokens; ++b) blocks.push_back(first + b);
  return blocks;
}

class PagedOn : public testing::OnDevice {
 protected:
  CacheConfig portable(const LayerConfig& layer) const {
    CacheConfig config = here(one_layer(layer, 2));
    if (on_cpu()) config.kernel = "portable";
    return config;
  }
  std::vector<std::string> kernels() const {
    return on_cpu() ? std::vector<std::string>{"portable", ""} : std::vector<std::string>{""};
  }
  // A device computes in fp16, and divides the work of another batch otherwise.
  void expect_same(const std::vector<float>& given, const std::vector<float>& want) const {
    if (on_cpu()) {
      EXPECT_EQ(given, want);
    } else {
      EXPECT_LT(error_of(given, want), kDeviceError);
    }
  }
  // As much as rounding may differ, of what is the same but for the order of sums.
  double rounding(double of_kernel = 1e-6) const { return on_cpu() ? of_kernel : kDeviceError; }

 private:
  static constexpr double kDeviceError = 2e-3;
};
INSTANTIATE_TEST_SUITE_P(Devices, PagedOn, ::testing::ValuesIn(testing::kDevices), testing::device_name);

// Without sinks, or with a page of them, pages of both lie at the same positions.
TEST_P(PagedOn, IsTheCacheFedTokenByToken) {
  for (const CodecSpec& recent : kRecents) {
    for (const int sinks : {0, kPageTokens}) {
      for (const int window : {0, 100}) {
        for (const std::string& kernel : kernels()) {
          std::mt19937 random(31);
          const LayerConfig layer = with_recent(make_layer(6, 2, 64, key_codec(3), value_codec(2), sinks, window), recent);
          CacheConfig config = here(one_layer(layer));
          config.kernel = kernel;
          Cache cache(config);
          Engine engine(config), whole(config);
          const int n = 390;
          const Rows all = random_rows(layer, n, random);
          const std::vector<int32_t> blocks = {7, 3, 11, 2};
          const SequenceId id = cache.create();
          std::vector<float> expected, decoded;
          for (int t = 0; t < n; ++t) {
            Rows row = slice(all, layer, t, t + 1);
            step(cache, {{id, 1}}, row);
            expected.insert(expected.end(), row.out.begin(), row.out.end());
            const std::vector<float> out = engine.feed(all, blocks, t, t + 1);
            decoded.insert(decoded.end(), out.begin(), out.end());
          }
          const std::string where = kernel + " sinks " + std::to_string(sinks) + " window " + std::to_string(window);
          EXPECT_LT(error_of(decoded, expected), rounding()) << where;
          EXPECT_LT(error_of(whole.feed(all, blocks, 0, n), expected), rounding(kernel.empty() ? 0.02 : 1e-6)) << where;
          EXPECT_EQ(engine.paged.kernel(), cache.stats().kernel);
        }
      }
    }
  }
}

TEST_P(PagedOn, AnyNumberOfSinksIsNearExactAttention) {
  for (const CodecSpec& recent : kRecents) {
    for (const int sinks : {0, 1, 16, 128}) {
      for (const int sliding : {0, 70}) {
        std::mt19937 random(32);
        LayerConfig layer = with_recent(make_layer(4, 2, 64, key_codec(8), value_codec(8), sinks, 50), recent);
        layer.sliding_window = sliding;
        Engine engine(portable(layer));
        const int n = 390;
        const Rows all = random_rows(layer, n, random);
        const std::vector<int32_t> blocks = {9, 0, 4, 1};
        std::vector<float> out, exact;
        for (int done = 0; done < n;) {
          const int end = std::min(n, done < 300 ? done + 150 : done + 1);
          std::vector<int32_t> shown = blocks;  // what has left a sliding window is an engine's to take away
          for (int b = 0; sliding > 0 && b < 4; ++b) {
            if ((b + 1) * kPageTokens <= done - sliding + 1) shown[static_cast<size_t>(b)] = -1;
          }
          const std::vector<float> part = engine.feed(all, shown, done, end);
          out.insert(out.end(), part.begin(), part.end());
          done = end;
        }
        for (int t = 0; t < n; ++t) {
          for (int h = 0; h < layer.q_heads; ++h) {
            std::vector<float> keys, values;
            for (int p = 0; p <= t; ++p) {
              const ptrdiff_t at = (static_cast<ptrdiff_t>(p) * layer.kv_heads + h / 2) * layer.head_dim;
              keys.insert(keys.end(), all.k.begin() + at, all.k.begin() + at + layer.head_dim);
              values.insert(values.end(), all.v.begin() + at, all.v.begin() + at + layer.head_dim);
            }
            for (const double x :
                 oracle(layer, &all.q[static_cast<size_t>((t * layer.q_heads + h) * layer.head_dim)], keys, values, t)) {
              exact.push_back(static_cast<float>(x));
            }
          }
        }
        EXPECT_LT(error_of(out, exact), 0.02) << "sinks " << sinks << " sliding window " << sliding;
      }
    }
  }
}

// Of 1 bit a number, but for the first tokens, which a query far behind them looks at alone.
TEST_P(PagedOn, SinksStayFp16) {
  std::mt19937 random(33);
  const LayerConfig layer = make_layer(1, 1, 64, key_codec(1), value_codec(1), 16, 0);
  Rows all = random_rows(layer, 400, random);
  for (size_t i = 0; i < 64; ++i) all.q[399 * 64 + i] = 40 * all.k[5 * 64 + i];
  for (const int cut : {1, 130, 399}) {
    Engine engine(portable(layer));
    const std::vector<int32_t> blocks = blocks_from(0, 400);
    engine.feed(all, blocks, 0, cut);
    std::vector<float> out = engine.feed(all, blocks, cut, 400);
    out.erase(out.begin(), out.end() - 64);
    EXPECT_LT(error_of(out, {all.v.begin() + 5 * 64, all.v.begin() + 6 * 64}), 1e-3) << cut;
  }
}

TEST_P(PagedOn, CutsAtPagesGiveTheSameBitsAndOthersTheSameSums) {
  for (const std::string& kernel : kernels()) {
    for (const int window : {0, 90}) {
      std::mt19937 random(34);
      CacheConfig config = here(one_layer(make_layer(6, 2, 64, key_codec(3), value_codec(3), 16, window)));
      config.kernel = kernel;
      const Rows all = random_rows(config.layers[0], 700, random);
      const auto fed = [&](const std::vector<int>& ends) {
        Engine engine(config);
        std::vector<float> out;
        int done = 0;
        for (const int end : ends) {
          const std::vector<float> part = engine.feed(all, blocks_from(2, 700), done, end);
          out.insert(out.end(), part.begin(), part.end());
          done = end;
        }
        return out;
      };
      const std::vector<float> whole = fed({700});
      expect_same(fed({128, 700}), whole);
      expect_same(fed({256, 384, 640, 700}), whole);
      EXPECT_LT(error_of(fed({1, 50, 127, 129, 300, 301, 699, 700}), whole), rounding(kernel.empty() ? 0.02 : 1e-6));
    }
  }
}

// A prefix cache hands a sequence blocks that another has filled, while that one goes on.
TEST_P(PagedOn, SharedBlocksGiveWhatOwnOnesWould) {
  std::mt19937 random(35);
  const CacheConfig config = here(one_layer(make_layer(4, 2, 64, key_codec(2), value_codec(2), 16, 0)));
  const LayerConfig& layer = config.layers[0];
  const Rows all = random_rows(layer, 500, random);
  Rows other = slice(all, layer, 0, 256);  // as `all` up to there
  append(other, random_rows(layer, 200, random));
  Engine cold(config);
  const std::vector<float> whole = cold.feed(other, blocks_from(0, 456), 0, 456);
  const std::vector<float> expected(whole.begin() + 256L * 256, whole.end());

  Engine engine(config);
  engine.feed(all, {0, 1, 2, 3}, 0, 300);
  expect_same(engine.feed(other, {0, 1, 8, 9}, 256, 456), expected);
  engine.feed(all, {0, 1, 2, 3}, 300, 500);
  expect_same(engine.feed(other, {0, 1, 10, 11}, 256, 456), expected);  // the first has ended, its blocks stand
}

TEST_P(PagedOn, ABlockTakenByAnotherSequenceIsNotRead) {
  for (const int window : {0, 128}) {
    std::mt19937 random(36);
    const CacheConfig config = portable(make_layer(4, 2, 64, key_codec(3), value_codec(3), 16, window));
    const Rows first = random_rows(config.layers[0], 400, random), second = random_rows(config.layers[0], 400, random);
    Engine fresh(config);
    const std::vector<float> expected = fresh.feed(second, {1, 0}, 0, 200), more = fresh.feed(second, {1, 0}, 200, 201);

    Engine engine(config);
    engine.feed(first, {0, 1}, 0, 180);  // ends in the middle of block 1
    expect_same(engine.feed(second, {1, 0}, 0, 200), expected);
    // The first would go on where another's rows lie now.
    EXPECT_EQ(status_of([&] { engine.feed(first, {0, 1}, 180, 181); }), Status::kInternal);
    // That refusal has changed nothing.
    expect_same(engine.feed(second, {1, 0}, 200, 201), more);
  }
}

TEST_P(PagedOn, SinksOfAFirstBlockGoWithIt) {
  std::mt19937 random(37);
  const CacheConfig config = portable(make_layer(4, 2, 64, key_codec(3), value_codec(3), 16, 0));
  const Rows first = random_rows(config.layers[0], 400, random), second = random_rows(config.layers[0], 400, random);
  Engine engine(config);
  engine.feed(first, {0, 1}, 0, 130);
  EXPECT_EQ(engine.paged.memory().sink_bytes, engine.paged.sink_bytes());
  engine.feed(second, {2, 0}, 0, 256);  // block 0 is another's second now
  EXPECT_EQ(engine.paged.memory().sink_bytes, engine.paged.sink_bytes());
  EXPECT_EQ(status_of([&] { engine.feed(first, {0, 1}, 130, 131); }), Status::kInternal);
}

TEST_P(PagedOn, BlocksThatNobodyFilledAreRefused) {
  std::mt19937 random(38);
  for (const int window : {0, 128}) {
    const CacheConfig config = portable(make_layer(4, 2, 64, key_codec(3), value_codec(3), 16, window));
    const Rows all = random_rows(config.layers[0], 400, random);
    Engine engine(config);
    EXPECT_EQ(status_of([&] { engine.feed(all, {0, 1}, 130, 140); }), Status::kInternal);
  }
}

// Sequences that come and go without a word keep no more beside the blocks than those that live.
TEST_P(PagedOn, WhatEndedSequencesLeftIsUsedAgain) {
  std::mt19937 random(39);
  const CacheConfig config = portable(make_layer(4, 2, 64, key_codec(3), value_codec(3), 0, 100));
  const Rows all = random_rows(config.layers[0], 400, random);
  Engine engine(config, 2);
  const Rows lasting = random_rows(config.layers[0], 400, random);
  Engine alone(config, 2);
  const auto step_of_both = [&](int t, const std::vector<int32_t>& blocks) {
    Rows rows = slice(lasting, config.layers[0], t, t + 1);
    append(rows, slice(all, config.layers[0], 0, 60));
    engine.step({{{0, 1}, 1, t + 1}, {blocks, 60, 60}}, rows);
    return std::vector<float>(rows.out.begin(), rows.out.begin() + 256);
  };
  for (int t = 0; t < 200; ++t) {
    ASSERT_LT(error_of(step_of_both(t, {2 + t % 20}), alone.feed(lasting, {0, 1}, t, t + 1)), rounding()) << t;
    ASSERT_LE(engine.paged.memory().open_bytes, engine.paged.beside_bytes()) << t;
  }
  // A step that left sequences out for want of room says nothing of them.
  Engine held(config, 2);
  for (int s = 0; s < 12; ++s) held.feed(all, {s}, 0, 60, false);
  for (int s = 0; s < 12; ++s) held.feed(all, {s}, 60, 61, false);
}

TEST_P(PagedOn, LayersHaveBlocksOfTheirOwnSize) {
  std::mt19937 random(40);
  CacheConfig config = portable(make_layer(4, 2, 64, key_codec(2), value_codec(2), 16, 0));
  config.layers.push_back(make_layer(4, 2, 64, key_codec(4), value_codec(8), 16, 0));
  config.layers.push_back(make_layer(4, 2, 64, CodecSpec{}, CodecSpec{}, 16, 0));
  Engine engine(config);
  EXPECT_LT(engine.paged.block_bytes(0), engine.paged.block_bytes(1));
  EXPECT_LT(engine.paged.block_bytes(1), engine.paged.block_bytes(2));
  EXPECT_LE(engine.paged.block_bytes(2), 2U * 2 * 64 * kPageTokens * 2 + 64);
  const Rows all = random_rows(config.layers[0], 300, random);
  for (int l = 0; l < 3; ++l) {
    Engine one(portable(config.layers[static_cast<size_t>(l)]));
    Rows rows = slice(all, config.layers[0], 0, 300);
    engine.step({{{5, 6, 7}, 300, 300}}, rows, l);
    expect_same(rows.out, one.feed(all, {5, 6, 7}, 0, 300));
  }
}

// One decodes, one begins, one goes on, in one step of either layer.
TEST_P(PagedOn, SequencesOfAStepAreAsAlone) {
  std::mt19937 random(43);
  CacheConfig config = portable(make_layer(4, 2, 64, key_codec(3), value_codec(2), 16, 60));
  config.layers.push_back(make_layer(4, 2, 64, key_codec(4), value_codec(4), 0, 0));
  const std::vector<std::vector<int32_t>> blocks = {{0, 1, 2}, {3, 4}, {5, 6, 7}};
  const int before[] = {300, 0, 130}, after[] = {301, 200, 290};
  for (int l = 0; l < 2; ++l) {
    Engine together(config);
    std::vector<std::vector<float>> alone;
    std::vector<Item> items;
    Rows rows;
    for (size_t s = 0; s < blocks.size(); ++s) {
      const Rows all = random_rows(config.layers[0], after[s], random);
      Engine own(portable(config.layers[static_cast<size_t>(l)]));
      if (before[s] > 0) {
        own.feed(all, blocks[s], 0, before[s]);
        Rows prompt = slice(all, config.layers[0], 0, before[s]);
        together.step({{blocks[s], before[s], before[s]}}, prompt, l, false);
      }
      alone.push_back(own.feed(all, blocks[s], before[s], after[s]));
      append(rows, slice(all, config.layers[0], before[s], after[s]));
      items.push_back({blocks[s], after[s] - before[s], after[s]});
    }
    together.step(items, rows, l);
    auto at = rows.out.begin();
    for (const std::vector<float>& want : alone) {
      const auto end = at + static_cast<ptrdiff_t>(want.size());
      EXPECT_LT(error_of({at, end}, want), rounding()) << l;
      at = end;
    }
  }
}

TEST_P(PagedOn, PartsOfHeadsTogetherAreTheWhole) {
  std::mt19937 random(41);
  std::normal_distribution<float> normal;
  LayerConfig layer = make_layer(8, 4, 64, key_codec(3), value_codec(3), 16, 0);
  layer.key.transform.hadamard = true;
  for (int i = 0; i < 4 * 64; ++i) {
    layer.key.transform.scales.push_back(1 + 0.2f * normal(random));
    layer.key.transform.center.push_back(normal(random));
  }
  const CacheConfig config = portable(layer);
  const Rows all = random_rows(layer, 300, random);
  Engine engine(config);
  const std::vector<float> whole = engine.feed(all, {0, 1, 2}, 0, 300);
  for (const int parts : {2, 4, 8}) {  // with 8, two have the same KV head
    for (int part = 0; part < parts; ++part) {
      const CacheConfig own = part_of_heads(config, part, parts);
      ASSERT_EQ(own.layers[0].q_heads, 8 / parts);
      ASSERT_EQ(own.layers[0].kv_heads, std::max(1, 4 / parts));
      Rows rows;
      std::vector<float> expected;
      const auto take = [](const std::vector<float>& from, int heads, int first, int n, std::vector<float>& to) {
        for (int t = 0; t < 300; ++t) {
          const ptrdiff_t at = (static_cast<ptrdiff_t>(t) * heads + first) * 64;
          to.insert(to.end(), from.begin() + at, from.begin() + at + n * 64L);
        }
      };
      const int kv = part * 4 / parts;
      take(all.q, 8, part * 8 / parts, own.layers[0].q_heads, rows.q);
      take(all.k, 4, kv, own.layers[0].kv_heads, rows.k);
      take(all.v, 4, kv, own.layers[0].kv_heads, rows.v);
      take(whole, 8, part * 8 / parts, own.layers[0].q_heads, expected);
      rows.out.resize(rows.q.size());
      Engine one(own);
      one.step({{{0, 1, 2}, 300, 300}}, rows);
      EXPECT_LT(error_of(rows.out, expected), rounding()) << part << " of " << parts;
    }
  }
  EXPECT_EQ(status_of([&] { part_of_heads(config, 0, 0); }), Status::kInvalidArgument);
  EXPECT_EQ(status_of([&] { part_of_heads(config, 2, 2); }), Status::kInvalidArgument);
  EXPECT_EQ(status_of([&] { part_of_heads(config, 0, 3); }), Status::kUnsupported);
  CacheConfig mixed = config;
  mixed.layers[0].key.transform.more = {{"a_map", {1.0f}}};
  EXPECT_EQ(status_of([&] { part_of_heads(mixed, 0, 2); }), Status::kUnsupported);
  EXPECT_EQ(part_of_heads(mixed, 0, 1).layers[0].kv_heads, 4);
}

TEST_P(PagedOn, PlansThatBlocksCannotHoldAreRefused) {
  const CacheConfig good = portable(make_layer(4, 2, 64, key_codec(3), value_codec(3), 16, 0));
  const auto refused = [&](const std::function<void(CacheConfig&)>& change, int most = 4) {
    CacheConfig config = good;
    change(config);
    return status_of([&] { PagedAttention(config, most); });
  };
  EXPECT_EQ(refused([](CacheConfig& c) { c.layers[0].sinks = kPageTokens + 1; }), Status::kUnsupported);
  EXPECT_EQ(refused([](CacheConfig& c) { c.layers[0].window.ratio_key = 0.1f; }), Status::kUnsupported);
  EXPECT_EQ(refused([](CacheConfig& c) { c.tokens = PolicySpec{.name = "streaming", .values = {}}; }), Status::kUnsupported);
  EXPECT_EQ(refused([](CacheConfig& c) { c.layers.clear(); }), Status::kInvalidArgument);
  // What a cache takes.
  const auto latents = [](CacheConfig& c) {
    auto factors = std::make_shared<LatentFactors>();
    factors->key.assign(2, {0, 32, std::vector<float>(size_t{32} * 64, 0.1f)});
    factors->value = factors->key;
    c.layers[0].key_rank = c.layers[0].value_rank = 32;
    c.layers[0].factors = factors;
  };
  EXPECT_EQ(refused(latents), Status::kUnsupported);
  CacheConfig low = good;
  latents(low);
  low.kernel.clear();
  if (on_cpu()) {
    EXPECT_NO_THROW(Cache{low});
  }
  EXPECT_EQ(status_of([&] { part_of_heads(low, 0, 2); }), Status::kUnsupported);
  EXPECT_EQ(refused([](CacheConfig&) {}, 0), Status::kInvalidArgument);
}

TEST_P(PagedOn, StepsThatCannotBeAreRefusedAndChangeNothing) {
  std::mt19937 random(42);
  const CacheConfig config = portable(make_layer(4, 2, 64, key_codec(3), value_codec(3), 16, 0));
  const Rows all = random_rows(config.layers[0], 300, random);
  Engine engine(config), other(config);
  engine.feed(all, {0, 1}, 0, 200);
  const std::vector<float> before = other.feed(all, {0, 1}, 0, 200);
  Rows rows = slice(all, config.layers[0], 200, 201);
  const auto refused = [&](const std::vector<Item>& items, int layer = 0) {
    return status_of([&] { engine.step(items, rows, layer); });
  };
  EXPECT_EQ(refused({{{0, 1}, -1, 201}}), Status::kInvalidArgument);
  EXPECT_EQ(refused({{{0, 1}, 1, 0}}), Status::kInvalidArgument);    // fewer tokens than new ones
  EXPECT_EQ(refused({{{0, 1}, 1, 257}}), Status::kInvalidArgument);  // and more than its blocks hold
  const int32_t begin[] = {0, 1}, length = 201, blocks[] = {0, 1};
  const auto raw = [&](int layer, std::byte* at, int64_t stride) {
    return status_of([&] {
      const PagedStep step{.sequences = 1, .row_begin = begin, .lengths = &length, .blocks = blocks, .blocks_stride = 2};
      engine.paged.step(layer, step, at, stride, rows.k.data(), 128, rows.v.data(), 128, rows.q.data(), 256, rows.out.data(),
                        256);
    });
  };
  EXPECT_EQ(raw(1, engine.memory(), engine.stride()), Status::kInvalidArgument);
  EXPECT_EQ(raw(-1, engine.memory(), engine.stride()), Status::kInvalidArgument);
  EXPECT_EQ(raw(0, engine.memory() + 32, engine.stride()), Status::kInvalidArgument);
  EXPECT_EQ(raw(0, engine.memory(), engine.stride() + 32), Status::kInvalidArgument);
  EXPECT_EQ(raw(0, engine.memory(), static_cast<int64_t>(engine.paged.block_bytes(0)) - 64), Status::kInvalidArgument);
  expect_same(engine.feed(all, {0, 1, 2}, 200, 300), other.feed(all, {0, 1, 2}, 200, 300));
}

}  // namespace
}  // namespace kvmix
