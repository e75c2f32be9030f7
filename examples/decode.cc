// A layer's cache from C++: prefill, decode, fork, and what it costs. Random rows stand in for a model's.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "kvmix/cache.h"
#include "kvmix/error.h"

int main() {
  try {
    kvmix::LayerConfig layer;
    layer.q_heads = 9;
    layer.kv_heads = 3;
    layer.head_dim = 64;
    layer.scale = 1.0f / std::sqrt(64.0f);
    layer.key.codec = kvmix::parse_codec("int2.channel.g128.fitted.zero");
    layer.value.codec = kvmix::parse_codec("int2.token.g64.minmax.zero");
    layer.value.transform.hadamard = true;
    kvmix::CacheConfig config;
    config.layers = {layer};
    kvmix::Cache cache(config);

    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    const auto step = [&](kvmix::SequenceId sequence, int n_tokens) {
      const int q_row = layer.q_heads * layer.head_dim, kv_row = layer.kv_heads * layer.head_dim;
      std::vector<float> q(static_cast<size_t>(n_tokens * q_row)), k(static_cast<size_t>(n_tokens * kv_row)), v(k.size()),
          out(q.size());
      for (auto* rows : {&q, &k, &v}) {
        for (float& x : *rows) x = normal(random);
      }
      const std::vector<kvmix::StepItem> items = {{sequence, n_tokens}};
      cache.begin_step(items);
      cache.append(0, k.data(), kv_row, v.data(), kv_row, 0, 1);
      cache.attend(0, q.data(), q_row, out.data(), q_row, 0, 1);
      cache.end_step();
      return out;
    };

    const kvmix::SequenceId first = cache.create();
    for (int chunk = 0; chunk < 32; ++chunk) step(first, kvmix::kPageTokens);
    const kvmix::SequenceId second = cache.fork(first);  // shares all full pages
    const auto out = step(second, 1);
    const kvmix::MemoryReport memory = cache.memory();
    std::printf("kernel %s, first output %.4f\n", cache.stats().kernel.c_str(), static_cast<double>(out[0]));
    std::printf("two sequences of %lld tokens together: %zu bytes (one alone: %zu by formula, %.2f bits per element)\n",
                static_cast<long long>(cache.length(first)), memory.total_bytes, kvmix::predict_bytes(config, 4096),
                kvmix::predict_bits_per_element(config, 4096));
    return 0;
  } catch (const kvmix::Error& e) {
    std::fprintf(stderr, "%s: %s\n", kvmix::status_name(e.status()), e.what());
    return 1;
  }
}
