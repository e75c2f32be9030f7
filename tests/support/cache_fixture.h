// Random rows for a cache, and a double-precision oracle over what the cache stores.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <random>
#include <vector>

#include "base/team.h"
#include "kvmix/cache.h"

namespace kvmix::testing {

inline LayerConfig make_layer(int q_heads, int kv_heads, int head_dim, const CodecSpec& key, const CodecSpec& value,
                              int sinks = 16, int window = 128) {
  LayerConfig layer;
  layer.q_heads = q_heads;
  layer.kv_heads = kv_heads;
  layer.head_dim = head_dim;
  layer.scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  layer.sinks = sinks;
  layer.window.tokens = window;
  layer.key.codec = key;
  layer.value.codec = value;
  return layer;
}

inline CodecSpec key_codec(int bits, int group = 128, Fit fit = Fit::kLeastSquares) {
  return {bits, Axis::kChannel, group, fit, true};
}
inline CodecSpec value_codec(int bits, int group = 64, Fit fit = Fit::kMinMax) {
  return {bits, Axis::kToken, group, fit, true};
}

// How rows may be kept until they are sealed.
inline const std::vector<CodecSpec> kRecents = {CodecSpec{}, {8, Axis::kToken, 64, Fit::kMinMax, true}};
inline LayerConfig with_recent(LayerConfig layer, const CodecSpec& recent) {
  layer.recent = recent;
  return layer;
}

struct Rows {
  std::vector<float> q, k, v, out;
};

// Keys have a few outlier channels, as real ones do.
inline Rows random_rows(const LayerConfig& layer, int n, std::mt19937& random) {
  std::normal_distribution<float> normal;
  Rows rows;
  rows.q.resize(static_cast<size_t>(n) * static_cast<size_t>(layer.q_heads * layer.head_dim));
  rows.k.resize(static_cast<size_t>(n) * static_cast<size_t>(layer.kv_heads * layer.head_dim));
  rows.v.resize(rows.k.size());
  rows.out.resize(rows.q.size());
  for (float& x : rows.q) x = normal(random);
  for (float& x : rows.v) x = normal(random);
  for (size_t i = 0; i < rows.k.size(); ++i)
    rows.k[i] = normal(random) * (i % 16 == 3 ? 4.0f : 1.0f) + (i % 16 == 5 ? 2.0f : 0.0f);
  return rows;
}

// append and attend of one layer over `threads` real threads, with the barrier that the contract asks for. They are a team's,
// as in the engine: starting threads anew for every layer of every step takes longer than what they do.
inline void run_layer(Cache& cache, int layer, Rows& rows, int threads) {
  thread_local Team team(false);
  struct Work {
    Cache& cache;
    int layer, threads;
    Rows& rows;
    int64_t q_stride, kv_stride;
  };
  const LayerConfig& config = cache.config().layers[static_cast<size_t>(layer)];
  Work work{cache, layer, threads, rows, config.q_heads * config.head_dim, config.kv_heads * config.head_dim};
  const auto both = [](void* data) {
    const Work& w = *static_cast<Work*>(data);
    const int i = Team::member();
    if (Team::members() != w.threads) std::abort();  // the system gave no thread
    w.cache.append(w.layer, w.rows.k.data(), w.kv_stride, w.rows.v.data(), w.kv_stride, i, w.threads);
    Team::barrier();
    w.cache.attend(w.layer, w.rows.q.data(), w.q_stride, w.rows.out.data(), w.q_stride, i, w.threads);
  };
  team.run(threads, both, &work);
}

inline void step(Cache& cache, std::vector<StepItem> items, Rows& rows) {
  cache.begin_step(items);
  for (size_t l = 0; l < cache.config().layers.size(); ++l) run_layer(cache, static_cast<int>(l), rows, cache.config().threads);
  cache.end_step();
}

inline CacheConfig one_layer(const LayerConfig& layer, int threads = 2) {
  CacheConfig config;
  config.layers = {layer};
  config.threads = threads;
  return config;
}

// One head's rows of layer 0 as the cache gives them back, [length][head_dim].
inline std::vector<float> stored(const Cache& cache, SequenceId id, int head, Side side) {
  std::vector<float> rows(static_cast<size_t>(cache.length(id)) * static_cast<size_t>(cache.config().layers[0].head_dim));
  cache.read(id, 0, head, side, true, rows.data());
  return rows;
}

// Exact attention of one query row over stored rows [n][head_dim] that the query at `position` may see.
inline std::vector<double> oracle(const LayerConfig& layer, const float* q, const std::vector<float>& keys,
                                  const std::vector<float>& values, int64_t position) {
  const int dim = layer.head_dim;
  const int64_t first = layer.sliding_window > 0 ? std::max<int64_t>(0, position - layer.sliding_window + 1) : 0;
  std::vector<double> scores;
  double top = -INFINITY;
  for (int64_t t = first; t <= position; ++t) {
    double sum = 0;
    for (int i = 0; i < dim; ++i)
      sum += static_cast<double>(q[i]) * static_cast<double>(keys[static_cast<size_t>(t * dim + i)]);
    sum *= static_cast<double>(layer.scale);
    if (layer.softcap > 0) sum = static_cast<double>(layer.softcap) * std::tanh(sum / static_cast<double>(layer.softcap));
    scores.push_back(sum);
    top = std::max(top, sum);
  }
  std::vector<double> out(static_cast<size_t>(dim));
  double norm = 0;
  for (size_t i = 0; i < scores.size(); ++i) {
    const double p = std::exp(scores[i] - top);
    norm += p;
    for (int c = 0; c < dim; ++c)
      out[static_cast<size_t>(c)] +=
          p * static_cast<double>(values[(static_cast<size_t>(first) + i) * static_cast<size_t>(dim) + static_cast<size_t>(c)]);
  }
  for (double& x : out) x /= norm;
  return out;
}

}  // namespace kvmix::testing
