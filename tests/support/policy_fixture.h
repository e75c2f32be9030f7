// Caches with token policies, prompts for them, and attention over what they keep.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <set>
#include <tuple>

#include "attention/scores.h"
#include "kvmix/error.h"
#include "policy/policy.h"
#include "support/cache_fixture.h"
#include "support/devices.h"

namespace kvmix::testing {

inline constexpr int kPrompt = 900, kPolicyDim = 64;

#if defined(__SANITIZE_THREAD__)
inline constexpr bool kThreadsWatched = true;
#else
inline constexpr bool kThreadsWatched = false;
#endif

// Specs of every registered policy, as it comes and with choices that need less or more of attention. How threads meet depends
// on what a policy needs and on its tiers, not on what it chooses: where they are watched, one policy of each kind will do.
inline std::vector<PolicySpec> running_policies(bool one_of_a_kind = kThreadsWatched, const std::string& device = "cpu") {
  std::vector<PolicySpec> specs;
  std::set<std::tuple<MassReduce, bool, bool, bool, bool>> kinds;
  for (const PolicyInfo& info : policies()) {
    for (PolicySpec spec :
         {PolicySpec{info.name, {}}, PolicySpec{info.name, {{"decode", "append"}}}, PolicySpec{info.name, {{"host", "h2o"}}}}) {
      if (info.name == "dbudgetkv") spec.values["threshold"] = 0.5;
      if (info.name == "dbudgetkv") spec.values["frozen"] = 0.0;
      if (info.name == "quantized-pruning") spec.values["keep"] = 0.1;
      if (info.name == "leankv") spec.values["low"] = 0.7;
      CacheConfig config = one_layer(make_layer(4, 2, kPolicyDim, key_codec(4), value_codec(3, 32)));
      config.tokens = spec;
      config.device = device;
      try {
        Cache cache(config);
      } catch (const Error&) {
        continue;
      }
      const std::unique_ptr<Policy> policy = make_policy(spec);
      const Needs needs = policy->needs();
      const bool first =
          kinds.emplace(needs.mass, needs.mass_from_window, needs.window_queries > 0, needs.every_step, policy->has_low_tier())
              .second;
      if (first || !one_of_a_kind) specs.push_back(spec);
    }
  }
  return specs;
}

inline CacheConfig two_layers(const PolicySpec& spec, const CodecSpec& recent = {}) {
  CacheConfig config;
  LayerConfig sliding = make_layer(4, 2, kPolicyDim, key_codec(4), value_codec(3, 32));
  sliding.sliding_window = 200;
  config.layers = {with_recent(make_layer(4, 2, kPolicyDim, key_codec(4), value_codec(3, 32), 16, 64), recent),
                   with_recent(sliding, recent),
                   with_recent(make_layer(4, 2, kPolicyDim, CodecSpec{}, CodecSpec{}, 0), recent)};
  config.threads = 2;
  config.tokens = spec;
  return config;
}

inline Rows part(const Rows& rows, const LayerConfig& layer, int first, int n) {
  const auto cut = [&](const std::vector<float>& from, int heads) {
    const ptrdiff_t width = heads * layer.head_dim;
    return std::vector<float>(from.begin() + first * width, from.begin() + (first + n) * width);
  };
  Rows out{cut(rows.q, layer.q_heads), cut(rows.k, layer.kv_heads), cut(rows.v, layer.kv_heads), {}};
  out.out.resize(out.q.size());
  return out;
}

// The same rows for every layer, in chunks of at most `chunk`.
inline Rows feed(Cache& cache, SequenceId id, const Rows& rows, int n, int chunk) {
  Rows last;
  for (int done = 0; done < n; done += chunk) {
    const int now = std::min(chunk, n - done);
    last = part(rows, cache.config().layers[0], done, now);
    step(cache, {{id, now, done + now < n}}, last);
  }
  return last;
}

inline std::vector<float> stored_rows(const Cache& cache, SequenceId id, int layer, int head, Side side) {
  std::vector<float> rows(static_cast<size_t>(cache.length(id)) * static_cast<size_t>(cache.config().layers[0].head_dim));
  cache.read(id, layer, head, side, false, rows.data());
  return rows;
}

// Everything that a sequence holds; dropped rows are 0.
inline std::vector<float> contents(const Cache& cache, SequenceId id) {
  std::vector<float> all;
  for (int l = 0; l < static_cast<int>(cache.config().layers.size()); ++l) {
    for (int h = 0; h < cache.config().layers[static_cast<size_t>(l)].kv_heads; ++h) {
      for (const Side side : {Side::kKey, Side::kValue}) {
        for (const float x : stored_rows(cache, id, l, h, side)) all.push_back(std::isnan(x) ? 0 : x);
      }
    }
  }
  return all;
}

inline size_t used_bytes(const Cache& cache) {
  const MemoryReport m = cache.memory();
  return m.total_bytes - m.slack_bytes;
}

// Largest relative error of the last row of a layer against double attention over what is kept.
inline double error_over_kept(const Cache& cache, SequenceId id, const Rows& rows, int layer) {
  const LayerConfig& config = cache.config().layers[static_cast<size_t>(layer)];
  const auto dim = static_cast<size_t>(config.head_dim);
  const int heads = config.q_heads / config.kv_heads;
  LayerConfig full = config;
  full.sliding_window = 0;
  const std::vector<std::vector<int64_t>> kept = cache.kept(id, layer);
  double worst = 0;
  for (int kv = 0; kv < config.kv_heads; ++kv) {
    const auto keys = stored_rows(cache, id, layer, kv, Side::kKey), values = stored_rows(cache, id, layer, kv, Side::kValue);
    std::vector<float> k, v;
    for (const int64_t p : kept[static_cast<size_t>(kv)]) {
      const auto at = static_cast<ptrdiff_t>(p) * static_cast<ptrdiff_t>(dim);
      k.insert(k.end(), keys.begin() + at, keys.begin() + at + static_cast<ptrdiff_t>(dim));
      v.insert(v.end(), values.begin() + at, values.begin() + at + static_cast<ptrdiff_t>(dim));
    }
    for (int h = kv * heads; h < (kv + 1) * heads; ++h) {
      const size_t at = rows.q.size() - static_cast<size_t>(config.q_heads - h) * dim;
      const auto exact = oracle(full, &rows.q[at], k, v, static_cast<int64_t>(k.size() / dim) - 1);
      double error = 0, norm = 0;
      for (size_t i = 0; i < dim; ++i) {
        error += std::pow(static_cast<double>(rows.out[at + i]) - exact[i], 2);
        norm += exact[i] * exact[i];
      }
      worst = std::max(worst, std::sqrt(error / norm));
    }
  }
  return worst;
}

inline std::vector<std::vector<int64_t>> all_positions(const Cache& cache, SequenceId id) {
  std::vector<std::vector<int64_t>> all;
  for (int l = 0; l < static_cast<int>(cache.config().layers.size()); ++l) {
    for (auto& head : cache.kept(id, l)) all.push_back(std::move(head));
  }
  return all;
}

// A device's pages of one size take chunks of memory: limits that a prompt meets are as many times larger.
inline constexpr size_t kDeviceChunks = 8;

// Suites that every policy goes through on every device that carries it out.
class PoliciesOnDevice : public OnDevice {
 protected:
  std::vector<PolicySpec> running() const { return running_policies(kThreadsWatched, GetParam()); }
  CacheConfig layers_of(const PolicySpec& spec, const CodecSpec& recent = {}) const { return here(two_layers(spec, recent)); }
};

// What fp16 holds is the same query on every device.
inline void round_queries(Rows& rows) {
  for (float& x : rows.q) x = static_cast<float>(static_cast<_Float16>(x));
}

}  // namespace kvmix::testing
