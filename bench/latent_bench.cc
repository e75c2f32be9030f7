// latent/<kernel>/r<rank>/d<depth>: attention of one decoded token over a layer that stores latents in 4 bits, keys rebuilt (9
// query and 3 KV heads of 64, one group of latents for all), on 1 thread. latent/<kernel>/rows<bits>/d<depth>: over keys and
// values themselves. What latents may cost is where both take as long.
#include <benchmark/benchmark.h>
#include <time.h>

#include <cmath>
#include <string>

#include "kvmix/cache.h"
#include "support.h"

namespace kvmix::bench {
namespace {

constexpr int kHeads = 9, kKvHeads = 3, kDim = 64, kAll = kKvHeads * kDim;

// Of this thread alone: the work is single-threaded, and other programs then take nothing of it.
double thread_seconds() {
  timespec t{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

std::shared_ptr<const LatentFactors> factors_of(int rank) {
  auto factors = std::make_shared<LatentFactors>();
  for (int h = 0; h < kKvHeads; ++h) {
    factors->key.push_back({0, rank, gaussian(static_cast<size_t>(rank * kDim))});
    factors->value.push_back(factors->key.back());
  }
  for (int i = 0; i < kDim / 2; ++i) factors->angles.push_back(std::pow(1e4, -2.0 * i / kDim));
  return factors;
}

// rank 0: keys and values themselves.
void attend(benchmark::State& state, const std::string& kernel, int bits, int rank, int64_t depth) {
  LayerConfig layer;
  layer.q_heads = kHeads, layer.kv_heads = kKvHeads, layer.head_dim = kDim, layer.scale = 0.125f;
  if (bits != 16) {
    layer.key.codec = {bits, Axis::kChannel, 128, Fit::kMinMax, true};
    layer.value.codec = {bits, Axis::kToken, 64, Fit::kMinMax, true};
  }
  if (rank > 0) {
    layer.key_rank = layer.value_rank = rank;
    layer.factors = factors_of(rank);
  }
  CacheConfig config;
  config.layers = {layer};
  config.kernel = kernel;
  Cache cache(std::move(config));
  const SequenceId sequence = cache.create();
  constexpr int kChunk = 512;
  const int width = rank > 0 ? rank : kAll;
  const std::vector<float> kv = gaussian(static_cast<size_t>(kChunk * width)), q = gaussian(kHeads * kDim);
  std::vector<float> out(q.size());
  const auto step = [&](int n, bool attending) {
    const StepItem item{sequence, n};
    cache.begin_step({&item, 1});
    cache.append(0, kv.data(), width, kv.data(), width, 0, 1);
    const double start = thread_seconds();
    if (attending) cache.attend(0, q.data(), kHeads * kDim, out.data(), kHeads * kDim, 0, 1);
    const double seconds = thread_seconds() - start;
    cache.end_step();
    return seconds;
  };
  for (int64_t t = 0; t + kChunk <= depth; t += kChunk) step(kChunk, false);
  step(1, true);
  std::vector<double> seconds;
  for (auto _ : state) {
    seconds.push_back(step(1, true));
    state.SetIterationTime(seconds.back());
  }
  std::sort(seconds.begin(), seconds.end());
  const double median = seconds[seconds.size() / 2];
  state.counters["median_us"] = median * 1e6;
  state.counters["ns_a_token"] = median * 1e9 / static_cast<double>(depth);
}

const bool kRegistered = [] {
  for (const int64_t depth : {1024, 8192}) {
    for (const char* kernel : {"", "portable"}) {
      const std::string name = std::string("latent/") + (*kernel == 0 ? "best" : kernel), at = "/d" + std::to_string(depth);
      const auto add = [&](const std::string& what, int bits, int rank) {
        benchmark::RegisterBenchmark((name + what + at).c_str(),
                                     [=](benchmark::State& state) { attend(state, kernel, bits, rank, depth); })
            ->UseManualTime()
            ->Iterations(41)
            ->Unit(benchmark::kMicrosecond);
      };
      for (const int bits : {2, 4, 16}) add("/rows" + std::to_string(bits), bits, 0);
      for (const int rank : {32, 64, 96, 144, 192}) add("/r" + std::to_string(rank), 4, rank);
    }
  }
  return true;
}();

}  // namespace
}  // namespace kvmix::bench
