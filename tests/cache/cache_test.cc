#include "kvmix/cache.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <fstream>

#include "kvmix/error.h"
#include "support/cache_fixture.h"
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
using testing::stored;
using testing::value_codec;
using testing::with_recent;

// Largest relative L2 error of the last token's heads against exact attention over what the cache stores.
double last_token_error(const Cache& cache, SequenceId id, const Rows& rows, int n) {
  const LayerConfig& layer = cache.config().layers[0];
  const int group = layer.q_heads / layer.kv_heads, dim = layer.head_dim;
  double worst = 0;
  for (int h = 0; h < layer.q_heads; ++h) {
    const auto at = static_cast<size_t>((n - 1) * layer.q_heads + h) * static_cast<size_t>(dim);
    const auto exact = oracle(layer, &rows.q[at], stored(cache, id, h / group, Side::kKey),
                              stored(cache, id, h / group, Side::kValue), cache.length(id) - 1);
    double error = 0, norm = 0;
    for (int i = 0; i < dim; ++i) {
      const double d = static_cast<double>(rows.out[at + static_cast<size_t>(i)]) - exact[static_cast<size_t>(i)];
      error += d * d;
      norm += exact[static_cast<size_t>(i)] * exact[static_cast<size_t>(i)];
    }
    worst = std::max(worst, std::sqrt(error / norm));
  }
  return worst;
}

// What every device's cache keeps to.
class CacheOn : public testing::OnDevice {};
INSTANTIATE_TEST_SUITE_P(Devices, CacheOn, ::testing::ValuesIn(testing::kDevices), testing::device_name);

CacheConfig forced(CacheConfig config, const std::string& kernel) {
  config.kernel = kernel;
  return config;
}

TEST_P(CacheOn, DecodesWhatExactAttentionOverItsRowsGives) {
  for (const CodecSpec& recent : kRecents) {
    std::mt19937 random(1);
    const CacheConfig config = one_layer(with_recent(make_layer(9, 3, 64, key_codec(2), value_codec(2)), recent));
    // A device computes in fp16.
    Cache cache(on_cpu() ? forced(config, "portable") : here(config));
    const double allowed = on_cpu() ? 1e-5 : 0.02;
    const SequenceId id = cache.create();
    Rows rows = random_rows(cache.config().layers[0], 700, random);
    step(cache, {{id, 700}}, rows);
    EXPECT_LT(last_token_error(cache, id, rows, 700), allowed);
    for (int i = 0; i < 200; ++i) {
      rows = random_rows(cache.config().layers[0], 1, random);
      step(cache, {{id, 1}}, rows);
    }
    EXPECT_EQ(cache.length(id), 900);
    EXPECT_LT(last_token_error(cache, id, rows, 1), allowed);
    EXPECT_EQ(cache.tail(id, 0).sealed, 5 * kPageTokens);  // (899 - 16 - 128) / 128
  }
}

// More sinks than a page has slots.
TEST(Cache, ManySinksAreAttendedTo) {
  for (const CodecSpec& recent : kRecents) {
    for (const std::string kernel : {"portable", ""}) {
      std::mt19937 random(13);
      LayerConfig layer = with_recent(make_layer(6, 2, 64, key_codec(4), value_codec(4)), recent);
      layer.sinks = 300;
      Cache cache(forced(one_layer(layer), kernel));
      const SequenceId id = cache.create();
      for (const int n : {100, 150, 700, 1}) {
        Rows rows = random_rows(layer, n, random);
        step(cache, {{id, n}}, rows);
        ASSERT_LT(last_token_error(cache, id, rows, n), kernel.empty() ? 0.06 : 1e-5) << cache.length(id) << " " << kernel;
      }
      cache.remove(id);
    }
  }
}

TEST_P(CacheOn, PageAlignedChunksEqualOneByOne) {
  for (const CodecSpec& recent : kRecents) {
    std::mt19937 random(2);
    const CacheConfig config = here(one_layer(with_recent(make_layer(4, 2, 64, key_codec(3), value_codec(2)), recent)));
    Cache single(config), chunked(config);
    const SequenceId a = single.create(), b = chunked.create();
    int start = 0;
    for (const int n : {16 + 128, 128, 128, 128}) {
      Rows rows = random_rows(config.layers[0], n, random);
      step(chunked, {{b, n}}, rows);
      for (int t = 0; t < n; ++t) {
        Rows row;
        const auto cut = [&](const std::vector<float>& from) {
          const size_t width = from.size() / static_cast<size_t>(n);
          return std::vector<float>(from.begin() + static_cast<ptrdiff_t>(width * static_cast<size_t>(t)),
                                    from.begin() + static_cast<ptrdiff_t>(width * static_cast<size_t>(t + 1)));
        };
        row.q = cut(rows.q);
        row.k = cut(rows.k);
        row.v = cut(rows.v);
        row.out = row.q;
        step(single, {{a, 1}}, row);
        const std::vector<float> expected = cut(rows.out);
        for (size_t i = 0; i < expected.size(); ++i) {
          ASSERT_NEAR(row.out[i], expected[i], 2e-2f * (1 + std::abs(expected[i]))) << "token " << start + t;
        }
      }
      start += n;
      // One more token would seal; both have the same state now.
      for (const Side side : {Side::kKey, Side::kValue}) EXPECT_EQ(stored(single, a, 1, side), stored(chunked, b, 1, side));
    }
  }
}

TEST_P(CacheOn, BytesAreTheFormula) {
  for (const CodecSpec& recent : kRecents) {
    std::mt19937 random(3);
    for (const int n : {1, 16, 17, 144, 145, 400, 401, 1000}) {
      Cache cache(here(one_layer(with_recent(make_layer(6, 2, 64, key_codec(2), value_codec(4)), recent))));
      const SequenceId id = cache.create();
      for (int done = 0; done < n;) {
        const int chunk = std::min(n - done, done == 0 ? 144 : 128);
        Rows rows = random_rows(cache.config().layers[0], chunk, random);
        step(cache, {{id, chunk}}, rows);
        done += chunk;
      }
      // Sealing waits for the next token: bring the state to that of a cache fed one by one.
      const MemoryReport m = cache.memory();
      EXPECT_EQ(m.total_bytes, m.sealed_bytes + m.open_bytes + m.sink_bytes + m.table_bytes + m.slack_bytes);
      EXPECT_EQ(m.tokens, n);
      if (n % 128 == 17) {
        EXPECT_EQ(predict_bytes(cache.config(), n), m.total_bytes - m.slack_bytes) << n;
      }
      cache.remove(id);
      EXPECT_EQ(cache.memory().total_bytes, 0u);
    }
  }
}

TEST_P(CacheOn, BytesOneByOneAreTheFormulaAtEveryLength) {
  for (const CodecSpec& recent : kRecents) {
    std::mt19937 random(4);
    LayerConfig sliding = make_layer(2, 1, 64, key_codec(4), value_codec(4));
    sliding.sliding_window = 200;
    for (const LayerConfig& layer : {make_layer(2, 1, 64, key_codec(4), value_codec(4)), sliding}) {
      Cache cache(here(one_layer(with_recent(layer, recent), 1)));
      const SequenceId id = cache.create();
      for (int n = 1; n <= 800; ++n) {
        Rows rows = random_rows(layer, 1, random);
        step(cache, {{id, 1}}, rows);
        const MemoryReport m = cache.memory();
        ASSERT_EQ(predict_bytes(cache.config(), n), m.total_bytes - m.slack_bytes)
            << n << " tokens, sliding " << layer.sliding_window;
        if (!on_cpu() && n % 20 != 0) continue;
        ASSERT_LT(last_token_error(cache, id, rows, 1), 0.06) << n;
      }
    }
  }
}

TEST_P(CacheOn, ForkSharesAndDiverges) {
  for (const CodecSpec& recent : kRecents) {
    std::mt19937 random(5);
    Cache cache(here(one_layer(with_recent(make_layer(2, 1, 64, key_codec(2), value_codec(2)), recent))));
    const SequenceId a = cache.create();
    Rows rows = random_rows(cache.config().layers[0], 600, random);
    step(cache, {{a, 600}}, rows);
    rows = random_rows(cache.config().layers[0], 1, random);
    step(cache, {{a, 1}}, rows);
    const size_t before = cache.memory().sealed_bytes;
    const SequenceId b = cache.fork(a);
    EXPECT_EQ(cache.memory().sealed_bytes, before);
    const std::vector<float> keys = stored(cache, a, 0, Side::kKey);
    for (int i = 0; i < 300; ++i) {
      rows = random_rows(cache.config().layers[0], 1, random);
      step(cache, {{b, 1}}, rows);
    }
    EXPECT_LT(last_token_error(cache, b, rows, 1), 0.05);
    EXPECT_EQ(stored(cache, a, 0, Side::kKey), keys);
    cache.remove(a);
    EXPECT_EQ(cache.length(b), 901);
    cache.remove(b);
    EXPECT_EQ(cache.memory().total_bytes, 0u);
  }
}

TEST_P(CacheOn, TruncateCutsAnywhere) {
  for (const CodecSpec& recent : kRecents) {
    std::mt19937 random(6);
    for (const int64_t keep : {0, 5, 16, 144, 200, 272, 300, 500, 699, 700}) {
      Cache cache(here(one_layer(with_recent(make_layer(2, 1, 64, key_codec(8), value_codec(8)), recent))));
      const SequenceId id = cache.create();
      for (int i = 0; i < 7; ++i) {
        Rows rows = random_rows(cache.config().layers[0], 100, random);
        step(cache, {{id, 100}}, rows);
      }
      const auto keys = stored(cache, id, 0, Side::kKey);
      const float rounding = recent.is_f16() ? 2e-3f : 0.06f;  // of the cut page's rows
      cache.truncate(id, keep);
      EXPECT_EQ(cache.length(id), keep);
      const auto cut = stored(cache, id, 0, Side::kKey);
      for (size_t i = 0; i < cut.size(); ++i) ASSERT_NEAR(cut[i], keys[i], rounding * (1 + std::abs(keys[i])));
      Rows rows = random_rows(cache.config().layers[0], 150, random);
      step(cache, {{id, 150}}, rows);
      EXPECT_LT(last_token_error(cache, id, rows, 150), 0.05);
      cache.remove(id);
      EXPECT_EQ(cache.memory().total_bytes, 0u);
    }
  }
}

TEST_P(CacheOn, TransformsLeaveAttentionAlone) {
  std::mt19937 random(7);
  const int dim = 96, heads = 2;
  LayerConfig plain = make_layer(4, heads, dim, CodecSpec{}, CodecSpec{});
  LayerConfig hadamard = plain;
  hadamard.key.transform.hadamard = hadamard.value.transform.hadamard = true;
  for (int i = 0; i < heads * dim; ++i)
    hadamard.key.transform.scales.push_back(i % 3 == 0 ? -1.0f : 0.5f + 0.01f * static_cast<float>(i % 5));
  for (int i = 0; i < heads * dim; ++i) hadamard.key.transform.center.push_back(0.1f * static_cast<float>(i % 7));
  LayerConfig dense = plain;
  for (TransformSpec* t : {&dense.key.transform, &dense.value.transform}) {
    // A well-conditioned matrix with a known inverse: scaled rotation of channel pairs.
    t->matrix.assign(static_cast<size_t>(heads * dim * dim), 0.0f);
    t->matrix_inverse = t->matrix;
    for (int h = 0; h < heads; ++h) {
      for (int i = 0; i < dim; i += 2) {
        const float c = std::cos(0.3f + static_cast<float>(i)), s = std::sin(0.3f + static_cast<float>(i)), z = 1.5f;
        const auto at = [&](std::vector<float>& m, int r, int col) -> float& {
          return m[static_cast<size_t>((h * dim + r) * dim + col)];
        };
        at(t->matrix, i, i) = z * c, at(t->matrix, i, i + 1) = z * s, at(t->matrix, i + 1, i) = -z * s,
                         at(t->matrix, i + 1, i + 1) = z * c;
        at(t->matrix_inverse, i, i) = c / z, at(t->matrix_inverse, i, i + 1) = -s / z;
        at(t->matrix_inverse, i + 1, i) = s / z, at(t->matrix_inverse, i + 1, i + 1) = c / z;
      }
    }
  }
  Rows rows = random_rows(plain, 300, random);
  std::vector<std::vector<float>> outs;
  for (const LayerConfig& layer : {plain, hadamard, dense}) {
    Cache cache(here(one_layer(layer)));
    const SequenceId id = cache.create();
    step(cache, {{id, 300}}, rows);
    outs.push_back(rows.out);
  }
  for (size_t i = 0; i < outs[0].size(); ++i) {
    ASSERT_NEAR(outs[0][i], outs[1][i], 2e-2f);
    ASSERT_NEAR(outs[0][i], outs[2][i], 2e-2f);
  }
}

TEST_P(CacheOn, RaggedSequencesEqualSingleOnes) {
  for (const CodecSpec& recent : kRecents) {
    std::mt19937 random(8);
    const LayerConfig layer = with_recent(make_layer(6, 2, 64, key_codec(4), value_codec(3)), recent);
    CacheConfig config = here(one_layer(layer, 3));
    Cache together(config), alone(config);
    std::vector<SequenceId> ids, single;
    const std::vector<int> lengths = {1, 15, 16, 17, 300, 129, 128, 1000};
    for (const int n : lengths) {
      ids.push_back(together.create());
      single.push_back(alone.create());
      Rows rows = random_rows(layer, n, random);
      step(together, {{ids.back(), n}}, rows);
      step(alone, {{single.back(), n}}, rows);
    }
    std::vector<StepItem> items;
    for (const SequenceId id : ids) items.push_back({id, 1});
    Rows rows = random_rows(layer, static_cast<int>(ids.size()), random);
    step(together, items, rows);
    for (size_t s = 0; s < ids.size(); ++s) {
      Rows row;
      const auto cut = [&](const std::vector<float>& from) {
        const size_t width = from.size() / ids.size();
        return std::vector<float>(from.begin() + static_cast<ptrdiff_t>(width * s),
                                  from.begin() + static_cast<ptrdiff_t>(width * (s + 1)));
      };
      row.q = cut(rows.q), row.k = cut(rows.k), row.v = cut(rows.v), row.out = row.q;
      step(alone, {{single[s], 1}}, row);
      const std::vector<float> expected = cut(rows.out);
      for (size_t i = 0; i < expected.size(); ++i) ASSERT_NEAR(row.out[i], expected[i], 2e-2f) << "sequence " << s;
    }
  }
}

TEST_P(CacheOn, RatioWindowSettlesAtLessThanTwoPages) {
  std::mt19937 random(9);
  LayerConfig layer = make_layer(2, 1, 64, key_codec(2, 32, Fit::kMinMax), value_codec(2), 0);
  layer.window.ratio_key = layer.window.ratio_value = 0.2f;
  Cache cache(here(one_layer(layer, 1)));
  const SequenceId id = cache.create();
  Rows rows = random_rows(layer, 2000, random);
  step(cache, {{id, 2000}}, rows);
  std::vector<int64_t> windows;
  for (int i = 0; i < 200; ++i) {
    rows = random_rows(layer, 1, random);
    step(cache, {{id, 1}}, rows);
    windows.push_back(cache.tail(id, 0).window);
  }
  EXPECT_GE(windows.front(), 400);  // about a fifth of the prompt
  EXPECT_LT(windows.back(), 161);
  EXPECT_EQ(predict_bytes(cache.config(), cache.length(id)), cache.memory().total_bytes - cache.memory().slack_bytes);
}

TEST_P(CacheOn, SaveAndLoadContinueAlike) {
  for (const CodecSpec& recent : kRecents) {
    std::mt19937 random(10);
    const std::string path = ::testing::TempDir() + "/kvmix_saved_cache_" + std::to_string(getpid());
    const CacheConfig config = here(one_layer(with_recent(make_layer(4, 2, 64, key_codec(3), value_codec(2)), recent)));
    Cache cache(config), other(config);
    const SequenceId a = cache.create();
    Rows rows = random_rows(config.layers[0], 500, random);
    step(cache, {{a, 500}}, rows);
    cache.save(a, path, "model+plan");
    EXPECT_EQ(inspect_saved_cache(path).tokens, 500);
    const SequenceId b = other.load(path, "model+plan");
    rows = random_rows(config.layers[0], 1, random);
    step(cache, {{a, 1}}, rows);
    const auto expected = rows.out;
    step(other, {{b, 1}}, rows);
    if (on_cpu() || recent.is_f16()) {
      EXPECT_EQ(rows.out, expected);
    } else {  // rows that the device keeps in fp16, whatever the plan says, were rounded on their way through the file
      EXPECT_LT(last_token_error(other, b, rows, 1), 0.02);
    }
    try {
      other.load(path, "another");
      FAIL() << "a foreign fingerprint was accepted";
    } catch (const Error& e) {
      EXPECT_EQ(e.status(), Status::kMismatch);
    }
    std::filesystem::remove(path);
  }
}

TEST_P(CacheOn, DamagedSavedCachesAreRefused) {
  std::mt19937 random(11);
  const std::string path = ::testing::TempDir() + "/kvmix_damaged_cache_" + std::to_string(getpid());
  const CacheConfig config = here(one_layer(make_layer(1, 1, 64, key_codec(2), value_codec(2))));
  Cache cache(config);
  const SequenceId id = cache.create();
  Rows rows = random_rows(config.layers[0], 400, random);
  step(cache, {{id, 400}}, rows);
  cache.save(id, path, "f");
  std::string good;
  {
    std::ifstream file(path, std::ios::binary);
    good.assign(std::istreambuf_iterator<char>(file), {});
  }
  const auto refused = [&](const std::string& content) {
    std::ofstream(path, std::ios::binary | std::ios::trunc) << content;
    const size_t sequences = cache.sequences().size();
    try {
      cache.load(path, "f");
      return false;
    } catch (const Error& e) {
      EXPECT_EQ(cache.sequences().size(), sequences);
      return e.status() == Status::kCorrupt || e.status() == Status::kUnsupported;
    }
  };
  for (size_t n = 0; n < good.size(); n += 1 + n / 7) EXPECT_TRUE(refused(good.substr(0, n))) << "cut at " << n;
  for (int i = 0; i < 300; ++i) {
    std::string bad = good;
    const size_t at = random() % (i < 200 ? 120 : bad.size());
    bad[at] = static_cast<char>(bad[at] ^ (1 << (random() % 8)));
    EXPECT_TRUE(refused(bad)) << "bit flip at " << at;
  }
  std::filesystem::remove(path);
}

TEST_P(CacheOn, OutOfMemoryLeavesEverythingAsItWas) {
  std::mt19937 random(12);
  CacheConfig config = here(one_layer(make_layer(2, 2, 64, key_codec(4), value_codec(4)), 1));
  config.max_bytes = 8 << 20;
  Cache cache(config);
  const SequenceId id = cache.create();
  Rows rows = random_rows(config.layers[0], 300, random);
  step(cache, {{id, 300}}, rows);
  const auto keys = stored(cache, id, 0, Side::kKey);
  const size_t sealed = cache.memory().sealed_bytes;
  const std::vector<StepItem> big = {{id, 100000}};
  try {
    cache.begin_step(big);
    FAIL() << "100,000 tokens fitted into 8 MiB";
  } catch (const Error& e) {
    EXPECT_EQ(e.status(), Status::kOutOfMemory);
  }
  EXPECT_EQ(cache.length(id), 300);
  EXPECT_EQ(cache.memory().sealed_bytes, sealed);
  EXPECT_EQ(stored(cache, id, 0, Side::kKey), keys);
  rows = random_rows(config.layers[0], 1, random);
  step(cache, {{id, 1}}, rows);
  EXPECT_LT(last_token_error(cache, id, rows, 1), 0.05);
}

TEST_P(CacheOn, AbortedStepsLeaveNoTrace) {
  std::mt19937 random(13);
  Cache cache(here(one_layer(make_layer(2, 1, 64, key_codec(2), value_codec(2)), 1)));
  const SequenceId id = cache.create();
  Rows rows = random_rows(cache.config().layers[0], 400, random);
  step(cache, {{id, 400}}, rows);
  const auto keys = stored(cache, id, 0, Side::kKey);
  const std::vector<StepItem> items = {{id, 500}};
  cache.begin_step(items);
  cache.abort_step();
  EXPECT_EQ(cache.length(id), 400);
  EXPECT_EQ(stored(cache, id, 0, Side::kKey), keys);
  rows = random_rows(cache.config().layers[0], 1, random);
  step(cache, {{id, 1}}, rows);
  EXPECT_LT(last_token_error(cache, id, rows, 1), 0.05);
}

TEST(Cache, BadArgumentsAreNamed) {
  EXPECT_THROW(Cache(CacheConfig{}), Error);
  EXPECT_THROW(Cache(one_layer(make_layer(3, 2, 64, key_codec(2), value_codec(2)))), Error);
  EXPECT_THROW(Cache(one_layer(make_layer(2, 2, 63, key_codec(2), value_codec(2)))), Error);
  EXPECT_THROW(Cache(forced(one_layer(make_layer(2, 2, 64, key_codec(2), value_codec(2))), "abacus")), Error);
  Cache cache(one_layer(make_layer(2, 2, 64, key_codec(2), value_codec(2))));
  EXPECT_THROW(cache.remove(7), Error);
  const SequenceId id = cache.create();
  EXPECT_THROW(cache.truncate(id, 1), Error);
  const std::vector<StepItem> twice = {{id, 1}, {id, 1}}, none = {{id, 0}};
  EXPECT_THROW(cache.begin_step(twice), Error);
  EXPECT_THROW(cache.begin_step(none), Error);
  EXPECT_THROW(cache.end_step(), Error);
}

// In every build: what a device would hold has a size by formula, and what none could is named before one is looked for.
TEST(Cache, WhatADeviceCannotDoIsNamed) {
  const auto refused = [](const CacheConfig& config, Status status) {
    try {
      Cache cache(config);
    } catch (const Error& e) {
      EXPECT_EQ(e.status(), status) << e.what();
      return std::string(e.what());
    }
    return std::string("nothing was said");
  };
  const auto on = [](LayerConfig layer, const char* device) {
    CacheConfig config = one_layer(std::move(layer));
    config.device = device;
    return config;
  };
  const LayerConfig layer = make_layer(2, 1, 64, key_codec(2), value_codec(2));
  EXPECT_NE(refused(on(layer, "abacus"), Status::kInvalidArgument).find("\"cpu\" or \"cuda\""), std::string::npos);
  CacheConfig dropping = on(layer, "cuda");
  dropping.tokens = PolicySpec{"h2o", {}};
  EXPECT_NE(refused(dropping, Status::kUnsupported).find("h2o"), std::string::npos);
  CacheConfig kernel = forced(on(layer, "cuda"), "portable");
  EXPECT_NE(refused(kernel, Status::kInvalidArgument).find("portable"), std::string::npos);
  CacheConfig host = on(layer, "cpu");
  host.device_rows = true;
  EXPECT_NE(refused(host, Status::kInvalidArgument).find("device memory"), std::string::npos);
  const std::pair<LayerConfig, const char*> layers[] = {
      {make_layer(2, 1, 80, key_codec(2), value_codec(2)), "head_dim 80"},
      {make_layer(2, 1, 64, key_codec(5), value_codec(2)), "int5"},
      {make_layer(2, 1, 64, key_codec(2), key_codec(2)), "per token"},
      {make_layer(2, 1, 64, {2, Axis::kChannel, 128, Fit::kMinMax, false}, value_codec(2)), "zero point"},
      {make_layer(2, 1, 64, key_codec(2), value_codec(2), 300), "300 sinks"},
      {with_recent(layer, {8, Axis::kToken, 64, Fit::kMinMax, false}), "recent rows"}};
  for (const auto& [unfit, word] : layers) {
    EXPECT_NE(refused(on(unfit, "cuda"), Status::kUnsupported).find(word), std::string::npos) << word;
    EXPECT_THROW(predict_bytes(on(unfit, "cuda"), 1000), Error) << word;
  }
  // 16 sinks, six sealed pages and 216 tokens in two open ones.
  const auto whole = [](size_t bytes) { return (bytes + 127) / 128 * 128; };
  for (const CodecSpec& recent : kRecents) {
    const CacheConfig config = on(with_recent(layer, recent), "cuda");
    const size_t tables = predict_bytes(config, 0) + 16 * 16;
    const size_t codes = 128 * 64 * 2 / 8, record = 16 + 2 * codes + 64 * 4 + 128 * 4;
    const size_t open = recent.is_f16() ? 2 * 128 * 64 * 2 : 16 + 2 * (128 * 64 + 128 * 4);
    EXPECT_EQ(predict_bytes(config, 1000) - tables, 2 * 16 * 64 * 2 + 6 * whole(record) + 2 * whole(open));
  }
}

}  // namespace
}  // namespace kvmix
