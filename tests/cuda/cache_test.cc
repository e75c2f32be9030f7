// The cache on the device against the cache on the CPU: the same rows through both, in whatever order things can happen.
// One long file: its tests share one pair of caches and one bound on what may differ.
#include "kvmix/cache.h"

#include <cuda_runtime.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "codec/trellis.h"
#include "kvmix/error.h"
#include "rows/row_map.h"
#include "rows/scale.h"
#include "support/cache_fixture.h"
#include "support/devices.h"
#include "support/policy_fixture.h"

namespace kvmix {
namespace {

using testing::key_codec;
using testing::make_layer;
using testing::random_rows;
using testing::Rows;
using testing::value_codec;

class CudaCache : public ::testing::Test {
 protected:
  void SetUp() override { testing::has_device("cuda"); }
};

int test_threads() { return static_cast<int>(std::clamp(std::thread::hardware_concurrency(), 2u, 6u)); }

void add_random(std::vector<float>& to, size_t n, float least, float most, std::mt19937& random) {
  std::uniform_real_distribution<float> number(least, most);
  for (size_t i = 0; i < n; ++i) to.push_back(number(random));
}

// Every head_dim; fast and slow formats, fits of one side and of both, row maps of all kinds, feedback, sinks and none, windows
// fixed, none and by ratio, a sliding window, soft-capped scores, a side that stays fp16 and both, recent rows of 8 bits in all
// groups and of fp16; trellises on both sides and on each alone.
std::vector<LayerConfig> every_kind() {
  std::mt19937 random(3);
  std::vector<LayerConfig> layers;
  LayerConfig turned = make_layer(8, 2, 128, key_codec(2), value_codec(2));
  turned.key.transform.hadamard = turned.value.transform.hadamard = true;
  add_random(turned.key.transform.scales, 2 * 128, 0.5f, 2.0f, random);
  add_random(turned.key.transform.center, 2 * 128, -1.0f, 1.0f, random);
  layers.push_back(turned);
  LayerConfig fed = make_layer(4, 4, 64, key_codec(4, 64, Fit::kMinMax), value_codec(3, 128, Fit::kLeastSquares), 0, 0);
  std::vector<float> scale;
  add_random(scale, 4 * 64, 0.25f, 4.0f, random);
  set_scale(fed.key.transform, std::move(scale));
  add_random(fed.key.transform.feedback, 4 * 64 * 63 / 2, -0.05f, 0.05f, random);
  add_random(fed.value.transform.feedback, 4 * 64 * 63 / 2, -0.05f, 0.05f, random);
  layers.push_back(fed);
  LayerConfig sliding = make_layer(14, 2, 64, CodecSpec{}, value_codec(4), 4, 64);
  sliding.sliding_window = 300;
  layers.push_back(sliding);
  LayerConfig dense = make_layer(6, 1, 96, key_codec(8, 32), value_codec(8, 32), 16, 0);
  dense.window.ratio_key = dense.window.ratio_value = 0.3f;
  for (const RowMapInfo* map : row_map_registry()) {
    if (std::string(map->name) != "matrix") continue;
    map->example(row_shape(dense, Side::kKey), 5, dense.key.transform);
    map->example(row_shape(dense, Side::kValue), 6, dense.value.transform);
  }
  layers.push_back(dense);
  LayerConfig capped = make_layer(2, 1, 256, key_codec(1, 128, Fit::kMinMax), value_codec(3, 32), 128, 128);
  capped.softcap = 30.0f;
  capped.value.transform.hadamard = true;
  layers.push_back(capped);
  layers.push_back(make_layer(16, 1, 128, CodecSpec{}, CodecSpec{}, 1, 128));
  LayerConfig trellis = make_layer(8, 2, 128, trellis_spec(3, Side::kKey), trellis_spec(2, Side::kValue));
  trellis.key.transform = turned.key.transform, trellis.value.transform = turned.value.transform;
  layers.push_back(trellis);
  LayerConfig fed_trellis = make_layer(4, 4, 64, trellis_spec(2, Side::kKey), trellis_spec(4, Side::kValue), 0, 0);
  fed_trellis.key.transform = fed.key.transform, fed_trellis.value.transform = fed.value.transform;
  layers.push_back(fed_trellis);
  layers.push_back(make_layer(2, 1, 256, trellis_spec(5, Side::kKey), value_codec(3, 32), 16, 0));
  LayerConfig trellis_values = make_layer(6, 1, 96, key_codec(4, 32), trellis_spec(5, Side::kValue), 4, 64);
  trellis_values.sliding_window = 300;
  layers.push_back(trellis_values);
  const int groups[] = {64, 32, 64, 0, 128, 32, 64, 32, 0, 128};
  for (size_t l = 0; l < layers.size(); ++l) {
    if (groups[l] != 0) layers[l].recent = {8, Axis::kToken, groups[l], Fit::kMinMax, true};
  }
  return layers;
}

// Layers that keep a part of their keys' channels: every head_dim and kind of sides, few and many query heads, recent rows of
// both kinds, windows fixed, none and by ratio; and one that keeps all. Queries stand as they come, so that both devices choose
// by the same numbers.
std::vector<LayerConfig> every_thin_kind() {
  std::vector<LayerConfig> layers;
  LayerConfig turned = make_layer(8, 2, 128, key_codec(2), value_codec(2));
  turned.value.transform.hadamard = true;
  layers.push_back(turned);
  layers.push_back(make_layer(4, 4, 64, key_codec(4, 64, Fit::kMinMax), value_codec(3, 128, Fit::kLeastSquares), 0, 0));
  LayerConfig sliding = make_layer(14, 2, 64, CodecSpec{}, value_codec(4), 4, 64);
  sliding.sliding_window = 300;
  layers.push_back(sliding);
  LayerConfig dense = make_layer(6, 1, 96, key_codec(8, 32), value_codec(8, 32), 16, 0);
  dense.window.ratio_key = dense.window.ratio_value = 0.3f;
  layers.push_back(dense);
  LayerConfig capped = make_layer(2, 1, 256, key_codec(1, 128, Fit::kMinMax), value_codec(3, 32), 128, 128);
  capped.softcap = 30.0f;
  layers.push_back(capped);
  layers.push_back(make_layer(16, 1, 128, CodecSpec{}, CodecSpec{}, 1, 128));
  layers.push_back(make_layer(12, 1, 64, key_codec(3, 32), CodecSpec{}, 3, 40));
  layers.push_back(make_layer(2, 2, 128, CodecSpec{}, value_codec(4), 16, 64));
  layers.push_back(make_layer(4, 2, 128, key_codec(3), trellis_spec(4, Side::kValue), 16, 64));
  layers.push_back(make_layer(8, 1, 256, key_codec(2, 32), trellis_spec(2, Side::kValue), 0, 0));
  const int groups[] = {64, 32, 64, 0, 128, 32, 64, 0, 64, 0};
  for (size_t l = 0; l < layers.size(); ++l) {
    if (groups[l] != 0) layers[l].recent = {8, Axis::kToken, groups[l], Fit::kMinMax, true};
  }
  return layers;
}

// The largest |stored number| of each channel so far, of every KV head, and how large an error of a stored value becomes.
struct Magnitudes {
  std::vector<double> key, value;         // [kv_heads][head_dim]
  double key_scale = 0, value_scale = 0;  // the largest root mean square of a row's group, where codes are a trellis'
  double grows = 1;
};

class Bounds {
 public:
  explicit Bounds(const std::vector<LayerConfig>& layers) : layers_(layers) {
    for (const LayerConfig& layer : layers_) {
      key_maps_.emplace_back(layer.key.transform, row_shape(layer, Side::kKey), "keys");
      value_maps_.emplace_back(layer.value.transform, row_shape(layer, Side::kValue), "values");
      Magnitudes& m = magnitudes_.emplace_back();
      m.key.resize(static_cast<size_t>(layer.kv_heads * layer.head_dim));
      m.value.resize(m.key.size());
      // Frobenius norm of what turns outputs back, of the head with the largest.
      const auto dim = static_cast<size_t>(layer.head_dim);
      if (layer.value.transform.matrix_inverse.empty()) continue;
      for (size_t h = 0; h < static_cast<size_t>(layer.kv_heads); ++h) {
        double squares = 0;
        for (size_t i = 0; i < dim * dim; ++i) {
          const double x = static_cast<double>(layer.value.transform.matrix_inverse[h * dim * dim + i]);
          squares += x * x;
        }
        m.grows = std::max(m.grows, std::sqrt(squares));
      }
    }
  }

  void see(size_t l, const Rows& rows, int n) {
    const LayerConfig& layer = layers_[l];
    const auto dim = static_cast<size_t>(layer.head_dim), heads = static_cast<size_t>(layer.kv_heads);
    std::vector<float> row(dim);
    for (size_t i = 0; i < static_cast<size_t>(n) * heads; ++i) {
      for (const bool key : {true, false}) {
        std::copy_n((key ? rows.k : rows.v).begin() + static_cast<ptrdiff_t>(i * dim), dim, row.begin());
        (key ? key_maps_ : value_maps_)[l].store(static_cast<int>(i % heads), row.data());
        std::vector<double>& most = key ? magnitudes_[l].key : magnitudes_[l].value;
        for (size_t c = 0; c < dim; ++c) {
          double& m = most[i % heads * dim + c];
          m = std::max(m, std::abs(static_cast<double>(row[c])));
        }
        if (!is_trellis((key ? layer.key : layer.value).codec)) continue;
        double& scale = key ? magnitudes_[l].key_scale : magnitudes_[l].value_scale;
        for (size_t first = 0; first < dim; first += kTrellisGroup) {
          const size_t end = std::min(dim, first + kTrellisGroup);
          double squares = 0;
          for (size_t c = first; c < end; ++c) squares += static_cast<double>(row[c]) * static_cast<double>(row[c]);
          scale = std::max(scale, std::sqrt(squares / static_cast<double>(end - first)));
        }
      }
    }
  }

  // Of a row's output of a query head, as tests/cuda/attend_test.cc derives it: each product's operands are rounded to fp16,
  // errors add up as independent ones do, a score that is off by e moves the output by e |v| at most. Here the query is rounded
  // before the kernel does so again, and the output before it is turned back. A quantised number may exceed those it stands for
  // by half a step of a fitted group: a tenth. One of a trellis does so by a code's error, of which three times the root mean
  // square is taken: a share of the row's own (trellis_code.h).
  double allowed(size_t l, const float* q, int q_head) const {
    const LayerConfig& layer = layers_[l];
    const auto dim = static_cast<size_t>(layer.head_dim);
    const auto head = static_cast<size_t>(q_head / (layer.q_heads / layer.kv_heads));
    std::vector<float> query(q, q + dim);
    key_maps_[l].query(static_cast<int>(head), query.data());
    const auto stored = [](const CodecSpec& codec, double most, double scale) {
      constexpr double kErrors[] = {.095, .0231, .0064, .0020};  // of 2 to 5 bits, to a variance of 1
      return is_trellis(codec) ? most + 3 * scale * std::sqrt(kErrors[codec.bits - 2]) : 1.1 * most;
    };
    const Magnitudes& m = magnitudes_[l];
    double noise = 0, most_value = 0;
    for (size_t c = 0; c < dim; ++c) {
      const double part = 2 * static_cast<double>(query[c]) * stored(layer.key.codec, m.key[head * dim + c], m.key_scale);
      noise += part * part;
      most_value = std::max(most_value, stored(layer.value.codec, m.value[head * dim + c], m.value_scale));
    }
    return (6.0 + static_cast<double>(layer.scale) * std::sqrt(2 * noise)) / 2048.0 * most_value *
           std::sqrt(static_cast<double>(dim)) * magnitudes_[l].grows;
  }

 private:
  const std::vector<LayerConfig>& layers_;
  std::vector<RowMapChain> key_maps_, value_maps_;
  std::vector<Magnitudes> magnitudes_;
};

// What a step that is refused must leave as it was.
struct PoolLook {
  explicit PoolLook(const Cache& cache) {
    const MemoryReport m = cache.memory();
    bytes = {m.sealed_bytes, m.open_bytes, m.sink_bytes, static_cast<size_t>(m.tokens)};
  }
  std::vector<size_t> bytes;
  friend bool operator==(const PoolLook&, const PoolLook&) = default;
};

// Two caches, and the same rows into both.
class Pair {
 public:
  using Channels = std::optional<PolicySpec>;
  Pair(const std::vector<LayerConfig>& layers, size_t device_limit, int threads, const Channels& channels = {})
      : cpu(cpu_config(layers, threads, channels)),
        cuda(cuda_config(layers, device_limit, channels)),
        bounds_(cpu.config().layers) {}

  static CacheConfig cpu_config(const std::vector<LayerConfig>& layers, int threads, const Channels& channels = {}) {
    CacheConfig config;
    config.layers = layers;
    config.channels = channels;
    config.threads = threads;
    config.kernel = "portable";
    return config;
  }
  static CacheConfig cuda_config(const std::vector<LayerConfig>& layers, size_t limit, const Channels& channels = {}) {
    CacheConfig config;
    config.layers = layers;
    config.channels = channels;
    config.device = "cuda";
    config.max_bytes = limit;
    return config;
  }

  // False where the device had no memory.
  bool step(const std::vector<StepItem>& items, std::mt19937& random) {
    try {
      cuda.begin_step(items);
    } catch (const Error& e) {
      if (e.status() != Status::kOutOfMemory) throw;
      return false;
    }
    cpu.begin_step(items);
    int n = 0;
    for (const StepItem& item : items) n += item.n_tokens;
    for (size_t l = 0; l < cpu.config().layers.size(); ++l) {
      const LayerConfig& layer = cpu.config().layers[l];
      Rows rows = random_rows(layer, n, random);
      if (cpu.config().channels) testing::round_queries(rows);
      bounds_.see(l, rows, n);
      testing::run_layer(cpu, static_cast<int>(l), rows, cpu.config().threads);
      const std::vector<float> expected = rows.out;
      std::fill(rows.out.begin(), rows.out.end(), NAN);
      testing::run_layer(cuda, static_cast<int>(l), rows, 1);
      if (compares) compare(l, rows, expected, n);
    }
    cuda.end_step();
    cpu.end_step();
    return true;
  }

  void compare(size_t l, const Rows& rows, const std::vector<float>& expected, int n) {
    const LayerConfig& layer = cpu.config().layers[l];
    const auto dim = static_cast<size_t>(layer.head_dim), heads = static_cast<size_t>(layer.q_heads);
    if (::testing::Test::HasFatalFailure()) return;
    for (size_t i = 0; i < static_cast<size_t>(n) * heads; ++i) {
      double error = 0, size = 0;
      for (size_t c = i * dim; c < (i + 1) * dim; ++c) {
        const double d = static_cast<double>(rows.out[c]) - static_cast<double>(expected[c]);
        error += d * d;
        size += static_cast<double>(expected[c]) * static_cast<double>(expected[c]);
      }
      const double share = std::sqrt(error) / bounds_.allowed(l, &rows.q[i * dim], static_cast<int>(i % heads));
      ASSERT_LT(share, 1.0) << "layer " << l << ", row " << i / heads << " of " << n << ", head " << i % heads;
      worst_share = std::max(worst_share, share);
      errors += error, sizes += size;
    }
  }

  // Rows as stored are equal to the bit: the same arithmetic on the same rows.
  void compare_stored(SequenceId id) const {
    for (size_t l = 0; l < cpu.config().layers.size(); ++l) {
      const LayerConfig& layer = cpu.config().layers[l];
      ASSERT_EQ(cuda.channels(id, static_cast<int>(l)), cpu.channels(id, static_cast<int>(l))) << "layer " << l;
      std::vector<float> a(static_cast<size_t>(cpu.length(id) * layer.head_dim)), b(a.size());
      for (int h = 0; h < layer.kv_heads; ++h) {
        for (const Side side : {Side::kKey, Side::kValue}) {
          cpu.read(id, static_cast<int>(l), h, side, false, a.data());
          cuda.read(id, static_cast<int>(l), h, side, false, b.data());
          for (size_t i = 0; i < a.size(); ++i) {
            ASSERT_TRUE(a[i] == b[i] || (std::isnan(a[i]) && std::isnan(b[i])))
                << "layer " << l << ", head " << h << (side == Side::kKey ? " key " : " value ") << i / a.size()
                << ", position " << i / static_cast<size_t>(layer.head_dim) << ": " << a[i] << " and " << b[i];
          }
        }
      }
    }
  }

  // What of a sequence differs: choices, lists, and stored numbers of every side.
  void print_differences(SequenceId id) const {
    std::printf("  sequence %lld of %lld tokens\n", static_cast<long long>(id), static_cast<long long>(cpu.length(id)));
    for (size_t l = 0; l < cpu.config().layers.size(); ++l) {
      const LayerConfig& layer = cpu.config().layers[l];
      const int at = static_cast<int>(l);
      const auto dim = static_cast<size_t>(layer.head_dim);
      const Cache::TailReport a = cpu.tail(id, at), b = cuda.tail(id, at);
      std::printf("    layer %d: sinks %lld, sealed %lld (cuda %lld), recent %lld (cuda %lld)%s", at,
                  static_cast<long long>(a.sinks), static_cast<long long>(a.sealed), static_cast<long long>(b.sealed),
                  static_cast<long long>(a.window), static_cast<long long>(b.window),
                  cpu.channels(id, at) == cuda.channels(id, at) ? "" : ", CHOICES DIFFER");
      std::vector<float> x(static_cast<size_t>(cpu.length(id)) * dim), y(x.size());
      for (int h = 0; h < layer.kv_heads; ++h) {
        for (const Side side : {Side::kKey, Side::kValue}) {
          cpu.read(id, at, h, side, false, x.data());
          cuda.read(id, at, h, side, false, y.data());
          size_t differ = 0, first = 0;
          float most = 0;
          for (size_t i = x.size(); i-- > 0;) {
            if (x[i] == y[i] || (std::isnan(x[i]) && std::isnan(y[i]))) continue;
            ++differ, first = i, most = std::max(most, std::abs(x[i] - y[i]));
          }
          if (differ == 0) continue;
          std::printf("; head %d %s: %zu differ, by %g at most, first at position %zu channel %zu: %g, cuda %g", h,
                      side == Side::kKey ? "keys" : "values", differ, static_cast<double>(most), first / dim, first % dim,
                      static_cast<double>(x[first]), static_cast<double>(y[first]));
        }
      }
      std::printf("\n");
    }
  }

  Cache cpu, cuda;
  bool compares = true;
  double worst_share = 0, errors = 0, sizes = 0;

 private:
  Bounds bounds_;
};

void anything_in_any_order(const std::vector<LayerConfig>& layers, int steps, const Pair::Channels& channels = {}) {
  constexpr size_t kLimit = size_t{48} << 20;
  Pair both(layers, kLimit, test_threads(), channels);
  std::mt19937 random(11);
  const auto chance = [&](unsigned of) { return random() % of == 0; };
  int refused = 0, forks = 0, cuts = 0, removed = 0, aborted = 0;
  int64_t tokens = 0;
  for (int i = 0; i < steps; ++i) {
    std::vector<SequenceId> ids = both.cpu.sequences();
    ASSERT_EQ(ids, both.cuda.sequences());
    const auto any = [&] { return ids[random() % ids.size()]; };
    const auto remove = [&](SequenceId id) {
      both.cpu.remove(id), both.cuda.remove(id);
      ids = both.cpu.sequences();
      ++removed;
    };
    if (ids.empty() || (ids.size() < 6 && chance(12))) {
      both.cpu.create(), both.cuda.create();
    } else if (ids.size() < 8 && chance(20)) {
      const SequenceId from = any();
      ASSERT_EQ(both.cpu.fork(from), both.cuda.fork(from));
      ++forks;
    } else if (ids.size() > 4 && chance(25)) {
      remove(any());
    } else if (chance(20)) {
      const SequenceId id = any();
      const int64_t keep = both.cpu.length(id) - static_cast<int64_t>(random() % 200);
      try {
        both.cpu.truncate(id, std::max<int64_t>(keep, 0));
        try {
          both.cuda.truncate(id, std::max<int64_t>(keep, 0));
          ++cuts;
          both.compare_stored(id);
          if (::testing::Test::HasFatalFailure()) {
            both.print_differences(id);
            FAIL() << "cut in step " << i;
          }
        } catch (const Error& e) {  // the sequences differ now
          ASSERT_EQ(e.status(), Status::kOutOfMemory) << e.what();
          ++refused;
          remove(id);
        }
      } catch (const Error& e) {  // behind a sliding window
        ASSERT_EQ(e.status(), Status::kUnsupported) << e.what();
        EXPECT_THROW(both.cuda.truncate(id, std::max<int64_t>(keep, 0)), Error);
      }
    }
    ids = both.cpu.sequences();
    if (ids.empty()) continue;
    std::vector<StepItem> items;
    for (const SequenceId id : ids) {
      if (chance(3)) continue;
      int n = 1;
      if (both.cpu.length(id) == 0 || chance(16)) n = 1 + static_cast<int>(random() % (chance(4) ? 400 : 60));
      items.push_back({id, n});
    }
    if (items.empty()) continue;
    std::shuffle(items.begin(), items.end(), random);
    if (chance(40)) items.back().n_tokens = 20000;  // for which no device has the memory
    if (chance(20)) {
      try {
        both.cuda.begin_step(items);
        both.cuda.abort_step();
        ++aborted;
      } catch (const Error& e) {
        ASSERT_EQ(e.status(), Status::kOutOfMemory) << e.what();
      }
    }
    const PoolLook before(both.cuda);
    if (!both.step(items, random)) {
      ++refused;
      EXPECT_EQ(PoolLook(both.cuda), before);
      remove(any());
      continue;
    }
    if (::testing::Test::HasFatalFailure()) {
      for (const StepItem& item : items) std::printf("  %d tokens:\n", item.n_tokens), both.print_differences(item.sequence);
      FAIL() << "in step " << i;
    }
    for (const StepItem& item : items) {
      tokens += item.n_tokens;
      ASSERT_EQ(both.cuda.length(item.sequence), both.cpu.length(item.sequence));
    }
    if (i % 40 == 0) both.compare_stored(items.front().sequence);
    if (::testing::Test::HasFatalFailure()) FAIL() << "in step " << i;
    const MemoryReport m = both.cuda.memory();
    ASSERT_LE(m.sealed_bytes + m.open_bytes + m.sink_bytes, kLimit);
  }
  for (const SequenceId id : both.cpu.sequences()) both.compare_stored(id);
  std::printf("  %d steps, %lld tokens, %d forks, %d cuts, %d removed, %d aborted, %d without memory\n", steps,
              static_cast<long long>(tokens), forks, cuts, removed, aborted, refused);
  std::printf("  largest error %.3g of the bound, relative error of all outputs %.3g\n", both.worst_share,
              std::sqrt(both.errors / both.sizes));
  EXPECT_LT(std::sqrt(both.errors / both.sizes), 1e-3);  // two roundings to fp16
  if (steps >= 2000) {
    EXPECT_GT(refused, 0);
    EXPECT_GT(std::min({forks, cuts, removed, aborted}), 10);
  }
  for (const SequenceId id : both.cuda.sequences()) both.cuda.remove(id);
  EXPECT_EQ(both.cuda.memory().total_bytes, 0u) << "a page leaks";
}

int steps_asked(int otherwise) {
  const char* const asked = std::getenv("KVMIX_TEST_STEPS");
  return asked == nullptr ? otherwise : std::atoi(asked);
}
TEST_F(CudaCache, AnythingInAnyOrderIsWhatTheCpuGives) { anything_in_any_order(every_kind(), steps_asked(2000)); }
// Multiples of 16 channels, from half of them to seven eighths.
TEST_F(CudaCache, AnythingInAnyOrderWithChosenChannels) {
  for (const double keep : {0.5, 0.6, 0.8}) {
    anything_in_any_order(every_thin_kind(), steps_asked(500), PolicySpec{"think", {{"keep", keep}}});
    if (HasFatalFailure()) FAIL() << "keeping " << keep;
  }
}

std::string bytes_of(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

// Files of both devices are the same to the bit, and each takes the other's.
TEST_F(CudaCache, FilesAreTheCpus) {
  for (const bool from_cuda : {false, true}) {
    for (const CodecSpec& recent : testing::kRecents) {
      std::vector<LayerConfig> layers = every_kind();
      for (LayerConfig& layer : layers) layer.recent = recent;
      Pair both(layers, 0, 4);
      std::mt19937 random(5);
      const SequenceId id = both.cpu.create();
      ASSERT_EQ(both.cuda.create(), id);
      for (const int n : {300, 250, 1}) ASSERT_TRUE(both.step({{id, n}}, random));
      Cache &from = from_cuda ? both.cuda : both.cpu, &to = from_cuda ? both.cpu : both.cuda;
      const std::string path = ::testing::TempDir() + "/kvmix_both_" + std::to_string(getpid());
      to.save(id, path, "f");
      const std::string saved = bytes_of(path);
      from.save(id, path, "f");
      EXPECT_TRUE(bytes_of(path) == saved) << to_string(recent);
      const SequenceId loaded = to.load(path, "f");
      for (size_t l = 0; l < layers.size(); ++l) {
        std::vector<float> a(static_cast<size_t>(from.length(id) * layers[l].head_dim)), b(a.size());
        from.read(id, static_cast<int>(l), 0, Side::kValue, false, a.data());
        to.read(loaded, static_cast<int>(l), 0, Side::kValue, false, b.data());
        for (size_t i = 0; i < a.size(); ++i) {
          ASSERT_TRUE(a[i] == b[i] || (std::isnan(a[i]) && std::isnan(b[i]))) << "layer " << l << " number " << i;
        }
      }
      to.save(loaded, path, "f");
      EXPECT_TRUE(bytes_of(path) == saved) << to_string(recent);
      std::filesystem::remove(path);
    }
  }
}

// Keys of 8 bits that are rounded with feedback as they come, a few rows at a time and many, and once more where a sealed page
// is opened again. Weights of head_dim 96 are such that what is wanted of channels is not finite.
TEST_F(CudaCache, RowsWithFeedbackAreTheCpus) {
  constexpr int kHeads = 8, kGroups[] = {32, 64, 128, 64};
  std::mt19937 random(9);
  std::vector<LayerConfig> layers;
  for (const int dim : {64, 96, 128, 256}) {
    LayerConfig layer = make_layer(kHeads, kHeads, dim, key_codec(4), value_codec(2), 4, 0);
    const float most = dim == 96 ? 1e38f : 0.1f;
    add_random(layer.key.transform.feedback, static_cast<size_t>(kHeads * dim * (dim - 1) / 2), -most, most, random);
    layer.recent = {8, Axis::kToken, kGroups[layers.size()], Fit::kMinMax, true};
    layers.push_back(layer);
  }
  Pair both(layers, 0, 4);
  const SequenceId id = both.cpu.create();
  ASSERT_EQ(both.cuda.create(), id);
  for (const int n : {1, 6, 128, 37, 1}) {
    ASSERT_TRUE(both.step({{id, n}}, random));
    both.compare_stored(id);
    if (HasFatalFailure()) FAIL() << "after " << n << " rows";
  }
  both.cpu.truncate(id, 100), both.cuda.truncate(id, 100);
  both.compare_stored(id);
  ASSERT_TRUE(both.step({{id, 3}}, random));
  both.compare_stored(id);
}

TEST_F(CudaCache, PromptsLongEnoughForEveryKernelEqualTheCpu) {
  Pair both(every_kind(), 0, test_threads());
  std::mt19937 random(6);
  const SequenceId a = both.cpu.create(), b = both.cpu.create(), c = both.cpu.create();
  for (int i = 0; i < 3; ++i) both.cuda.create();
  ASSERT_TRUE(both.step({{a, 700}, {b, 33}, {c, 1}}, random));
  ASSERT_TRUE(both.step({{a, 1}, {c, 520}, {b, 520}}, random));
  for (int i = 0; i < 4; ++i) ASSERT_TRUE(both.step({{b, 1}, {a, 1}, {c, 4}}, random));
  for (const SequenceId id : {a, b, c}) both.compare_stored(id);
  std::printf("  largest error %.3g of the bound, relative error of all outputs %.3g\n", both.worst_share,
              std::sqrt(both.errors / both.sizes));
}

// What a policy leaves of pages of trellises is scored by and gathered out of the same numbers: the same tokens stay, as the
// same rows.
TEST_F(CudaCache, TokensOfTrellisesAreGatheredAsOnTheCpu) {
  for (const CodecSpec& recent : testing::kRecents) {
    for (const PolicySpec& spec : {PolicySpec{"streaming", {}}, PolicySpec{"snapkv", {{"keep", 0.4}}}}) {
      CacheConfig config;
      const std::pair<CodecSpec, CodecSpec> sides[] = {{trellis_spec(4, Side::kKey), trellis_spec(3, Side::kValue)},
                                                       {trellis_spec(2, Side::kKey), value_codec(4)},
                                                       {key_codec(3), trellis_spec(5, Side::kValue)}};
      for (const auto& [key, value] : sides)
        config.layers.push_back(testing::with_recent(make_layer(4, 2, testing::kPolicyDim, key, value, 16, 64), recent));
      config.tokens = spec, config.threads = 2;
      CacheConfig on_cuda = config;
      on_cuda.device = "cuda", config.kernel = "portable";
      Cache cpu(config), cuda(on_cuda);
      const SequenceId id = cpu.create();
      ASSERT_EQ(cuda.create(), id);
      std::mt19937 random(21);
      Rows rows = random_rows(config.layers[0], testing::kPrompt, random);
      testing::round_queries(rows);
      testing::feed(cpu, id, rows, testing::kPrompt, 300), testing::feed(cuda, id, rows, testing::kPrompt, 300);
      for (int i = 0; i < 150; ++i) {  // pages that hold gathered rows are sealed
        Rows one = random_rows(config.layers[0], 1, random), same;
        testing::round_queries(one);
        same = one;
        testing::step(cpu, {{id, 1}}, one), testing::step(cuda, {{id, 1}}, same);
      }
      EXPECT_LT(cuda.kept(id, 0)[0].size(), static_cast<size_t>(testing::kPrompt)) << to_string(spec);
      EXPECT_EQ(testing::all_positions(cuda, id), testing::all_positions(cpu, id)) << to_string(spec);
      EXPECT_TRUE(testing::contents(cuda, id) == testing::contents(cpu, id)) << to_string(spec) << ", " << to_string(recent);
    }
  }
}

// Chunks of every length over lists whose old pages hold chosen channels: few query rows, up to 64, and more, whose kernels are
// others where no list has such pages.
TEST_F(CudaCache, ChosenChannelsMeetEveryKernel) {
  for (const double keep : {0.5, 0.75}) {
    Pair both(every_thin_kind(), 0, test_threads(), PolicySpec{"think", {{"keep", keep}}});
    std::mt19937 random(7);
    const SequenceId a = both.cpu.create(), b = both.cpu.create();
    for (int i = 0; i < 2; ++i) both.cuda.create();
    ASSERT_TRUE(both.step({{a, 900}, {b, 33}}, random));
    ASSERT_TRUE(both.step({{a, 1}, {b, 1}}, random));
    for (const int n : {2, 4, 7, 16, 33, 130, 600}) {
      ASSERT_TRUE(both.step({{b, n}, {a, n}}, random));
      if (HasFatalFailure()) FAIL() << n << " tokens";
    }
    ASSERT_TRUE(both.step({{b, 1}, {a, 1}}, random));
    for (const SequenceId id : {a, b}) both.compare_stored(id);
    std::printf("  largest error %.3g of the bound, relative error of all outputs %.3g\n", both.worst_share,
                std::sqrt(both.errors / both.sizes));
    EXPECT_LT(std::sqrt(both.errors / both.sizes), 1e-3);
  }
}

// A cut opens a page of chosen channels again: its rows are the CPU's, and what attends to them gives the same.
TEST_F(CudaCache, PagesOfChosenChannelsAreOpenedAgain) {
  std::vector<LayerConfig> layers = every_thin_kind();
  for (LayerConfig& layer : layers)
    layer.sliding_window = layer.sliding_window > 0 ? 4096 : 0;  // frees nothing that a cut needs
  for (const double keep : {0.5, 0.75}) {
    Pair both(layers, 0, test_threads(), PolicySpec{"think", {{"keep", keep}}});
    std::mt19937 random(12);
    const SequenceId id = both.cpu.create();
    ASSERT_EQ(both.cuda.create(), id);
    ASSERT_TRUE(both.step({{id, 500}}, random));
    for (int i = 0; i < 3; ++i) ASSERT_TRUE(both.step({{id, 1}}, random));
    for (const int64_t length : {340, 216, 150}) {
      both.cpu.truncate(id, length), both.cuda.truncate(id, length);
      both.compare_stored(id);
      for (const int n : {1, 1, 1, 40}) {
        ASSERT_TRUE(both.step({{id, n}}, random));
        if (HasFatalFailure()) {
          both.print_differences(id);
          FAIL() << "keeping " << keep << ", cut to " << length;
        }
      }
      std::printf("  largest error %.3g of the bound\n", both.worst_share);
    }
  }
}

// Lists of 200 pages, which few blocks would take long for: their pieces are many, up to what 64 query rows leave room for.
TEST_F(CudaCache, LongListsOfChosenChannels) {
  CacheConfig config = testing::one_layer(make_layer(4, 1, 64, key_codec(4), value_codec(4)));
  config.layers.push_back(make_layer(4, 1, 64, CodecSpec{}, CodecSpec{}));
  config.channels = PolicySpec{"think", {}};
  config.device = "cuda";
  Cache cache(config);
  std::mt19937 random(10);
  const SequenceId id = cache.create();
  testing::feed(cache, id, random_rows(config.layers[0], 25600, random), 25600, 5000);
  for (const int n : {1, 3, 16, 1, 100}) {
    Rows rows = random_rows(config.layers[0], n, random);
    testing::step(cache, {{id, n}}, rows);
    EXPECT_LT(testing::error_over_kept(cache, id, rows, 1), 0.02) << n << " tokens";
  }
}

// Rows in device memory, and a decode step captured once, its rows stored beside the stream: replayed in later steps that begin
// no page and seal none, it gives what queueing anew gives.
void replay(const std::vector<LayerConfig>& layers, const Pair::Channels& channels = {}) {
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreate(&stream), cudaSuccess);
  CacheConfig config = Pair::cuda_config(layers, 0, channels);
  config.device_rows = true, config.stream = stream;
  std::mt19937 random(8);
  constexpr int kSequences = 3, kPrompt = 500;
  struct DeviceRows {
    float *q = nullptr, *k = nullptr, *v = nullptr, *out = nullptr;
    std::vector<float> read;
  };
  std::vector<DeviceRows> rows(layers.size());
  const auto allocate = [](float*& to, const std::vector<float>& from) {
    ASSERT_EQ(cudaMalloc(&to, from.size() * sizeof(float)), cudaSuccess);
    ASSERT_EQ(cudaMemcpy(to, from.data(), from.size() * sizeof(float), cudaMemcpyHostToDevice), cudaSuccess);
  };
  for (size_t l = 0; l < layers.size(); ++l) {
    const Rows made = random_rows(layers[l], kPrompt, random);
    allocate(rows[l].q, made.q), allocate(rows[l].k, made.k), allocate(rows[l].v, made.v), allocate(rows[l].out, made.out);
    rows[l].read.resize(static_cast<size_t>(kSequences * layers[l].q_heads * layers[l].head_dim));
  }
  {
    Cache eager(config);
    config.append_beside = true;
    Cache replayed(config);
    std::vector<StepItem> items;
    const auto queue = [&](Cache& cache) {
      for (size_t l = 0; l < layers.size(); ++l) {
        const int q_row = layers[l].q_heads * layers[l].head_dim, kv_row = layers[l].kv_heads * layers[l].head_dim;
        cache.append(static_cast<int>(l), rows[l].k, kv_row, rows[l].v, kv_row, 0, 1);
        cache.attend(static_cast<int>(l), rows[l].q, q_row, rows[l].out, q_row, 0, 1);
      }
    };
    const auto outputs = [&] {
      std::vector<float> all;
      for (DeviceRows& r : rows) {
        EXPECT_EQ(cudaMemcpyAsync(r.read.data(), r.out, r.read.size() * sizeof(float), cudaMemcpyDeviceToHost, stream),
                  cudaSuccess);
        EXPECT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
        EXPECT_EQ(cudaMemsetAsync(r.out, 0xff, r.read.size() * sizeof(float), stream), cudaSuccess);
        all.insert(all.end(), r.read.begin(), r.read.end());
      }
      return all;
    };
    for (Cache* cache : {&eager, &replayed}) {
      items.clear();
      for (int s = 0; s < kSequences; ++s) {
        const SequenceId id = cache->create();
        const std::vector<StepItem> prompt = {{id, kPrompt - 7 * s}};
        cache->begin_step(prompt);
        queue(*cache);
        cache->end_step();
        items.push_back({id, 1});
      }
      // Past what the prompts leave to be sealed.
      for (int i = 0; i < 4; ++i) {
        cache->begin_step(items);
        queue(*cache);
        cache->end_step();
      }
    }
    cudaGraphExec_t graph = nullptr;
    for (int i = 0; i < 6; ++i) {
      for (const StepItem& item : items) ASSERT_GT(replayed.next_seal(item.sequence), replayed.length(item.sequence));
      eager.begin_step(items);
      queue(eager);
      eager.end_step();
      const std::vector<float> expected = outputs();
      replayed.begin_step(items);
      if (graph == nullptr) {
        cudaGraph_t captured = nullptr;
        ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed), cudaSuccess);
        queue(replayed);
        ASSERT_EQ(cudaStreamEndCapture(stream, &captured), cudaSuccess);
        ASSERT_EQ(cudaGraphInstantiate(&graph, captured, 0), cudaSuccess);
        ASSERT_EQ(cudaGraphDestroy(captured), cudaSuccess);
      }
      ASSERT_EQ(cudaGraphLaunch(graph, stream), cudaSuccess);
      replayed.end_step();
      ASSERT_EQ(outputs(), expected) << "step " << i;
      for (const float x : expected) ASSERT_TRUE(std::isfinite(x));
    }
    ASSERT_EQ(cudaGraphExecDestroy(graph), cudaSuccess);
  }
  for (const DeviceRows& r : rows) {
    for (float* p : {r.q, r.k, r.v, r.out}) EXPECT_EQ(cudaFree(p), cudaSuccess);
  }
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
}
TEST_F(CudaCache, ACapturedStepIsReplayed) { replay(every_kind()); }
TEST_F(CudaCache, ACapturedStepIsReplayedWithChosenChannels) { replay(every_thin_kind(), PolicySpec{"think", {}}); }

TEST_F(CudaCache, WhatTheDeviceLacksIsNamed) {
  const auto refused = [](const LayerConfig& layer, const Pair::Channels& channels = {}) {
    CacheConfig config;
    config.layers = {layer};
    config.channels = channels;
    config.device = "cuda";
    try {
      Cache cache(config);
    } catch (const Error& e) {
      EXPECT_EQ(e.status(), Status::kUnsupported);
      return std::string(e.what());
    }
    return std::string();
  };
  EXPECT_NE(refused(make_layer(2, 1, 80, key_codec(2), value_codec(2))).find("head_dim 80"), std::string::npos);
  EXPECT_NE(refused(make_layer(2, 1, 64, key_codec(5), value_codec(2))).find("int5"), std::string::npos);
  EXPECT_NE(refused(make_layer(2, 1, 64, key_codec(2), key_codec(2))).find("per token"), std::string::npos);
  EXPECT_NE(refused(make_layer(2, 1, 64, key_codec(2), value_codec(2), 300)).find("300 sinks"), std::string::npos);
  const LayerConfig other_kind = make_layer(2, 1, 64, trellis_spec(2, Side::kValue), value_codec(2));  // without offsets
  EXPECT_NE(refused(other_kind).find("take trellis2.zero"), std::string::npos);
  const LayerConfig trellis_keys = make_layer(2, 1, 64, trellis_spec(2, Side::kKey), value_codec(2));
  EXPECT_EQ(refused(trellis_keys), "");
  EXPECT_NE(refused(trellis_keys, PolicySpec{"think", {}}).find("trellis2"), std::string::npos);
}

}  // namespace
}  // namespace kvmix
