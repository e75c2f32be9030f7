// token/<kernel>/<plan>: all attention of one decoded token of a SmolLM2-135M-shaped model (30 layers, 9 query and 3 KV heads,
// head_dim 64) at depth 8192, through the cache, from DRAM, on 2 threads. token/llama.cpp/f16: the same by
// ggml_flash_attn_ext.
#include <benchmark/benchmark.h>

#include <cmath>
#include <string>

#include "kvmix/cache.h"
#include "support.h"
#ifdef KVMIX_BENCH_GGML
#include <ggml-cpu.h>
#include <ggml.h>
#endif

namespace kvmix::bench {
namespace {

constexpr int kLayers = 30, kHeads = 9, kKvHeads = 3, kDim = 64, kThreads = 2;
constexpr int64_t kDepth = 8192;

struct Times {
  std::vector<double> seconds;
  double median() {
    std::sort(seconds.begin(), seconds.end());
    return seconds[seconds.size() / 2];
  }
};

void token(benchmark::State& state, const std::string& kernel, int bits, bool exact) {
  Team team(kThreads);
  Eviction eviction;
  static const double bandwidth = read_bandwidth(team);
  LayerConfig layer;
  layer.q_heads = kHeads, layer.kv_heads = kKvHeads, layer.head_dim = kDim, layer.scale = 0.125f;
  if (bits != 16) {
    layer.key.codec = {bits, Axis::kChannel, 128, Fit::kMinMax, true};
    layer.value.codec = {bits, Axis::kToken, 128, Fit::kMinMax, true};
  }
  CacheConfig config;
  config.layers.assign(kLayers, layer);
  config.threads = kThreads;
  config.kernel = kernel;
  config.exact = exact;
  Cache cache(std::move(config));
  const SequenceId sequence = cache.create();
  constexpr int kChunk = 512;
  const std::vector<float> kv = gaussian(kChunk * kKvHeads * kDim), q = gaussian(kHeads * kDim);
  std::vector<float> out(q.size());
  const auto step = [&](int n, bool attend) {
    const StepItem item{sequence, n};
    cache.begin_step({&item, 1});
    double seconds = 0;
    for (int l = 0; l < kLayers; ++l) {
      team.run([&](int ith, int nth) { cache.append(l, kv.data(), kKvHeads * kDim, kv.data(), kKvHeads * kDim, ith, nth); });
    }
    if (attend) eviction.read(team);
    const double start = now();
    for (int l = 0; attend && l < kLayers; ++l) {
      team.run([&](int ith, int nth) { cache.attend(l, q.data(), kHeads * kDim, out.data(), kHeads * kDim, ith, nth); });
    }
    seconds = now() - start;
    cache.end_step();
    return seconds;
  };
  for (int64_t t = 0; t + kChunk <= kDepth; t += kChunk) step(kChunk, false);
  step(1, true);
  Times times;
  for (auto _ : state) {
    times.seconds.push_back(step(1, true));
    state.SetIterationTime(times.seconds.back());
  }
  const MemoryReport memory = cache.memory();
  const auto bytes = static_cast<double>(memory.sealed_bytes + memory.open_bytes + memory.sink_bytes);
  const double median = times.median();
  state.counters["median_ms"] = median * 1e3;
  state.counters["MB"] = bytes * 1e-6;
  state.counters["GB/s"] = bytes / median * 1e-9;
  state.counters["of_read_bandwidth"] = bytes / median / bandwidth;
}

#ifdef KVMIX_BENCH_GGML
void token_ggml(benchmark::State& state) {
  Team team(1);  // a spinning second thread would take a core from ggml's own team
  Eviction eviction;
  ggml_init_params params{size_t{600} << 20, nullptr, false};
  ggml_context* context = ggml_init(params);
  ggml_cgraph* graph = ggml_new_graph(context);
  // As llama.cpp lays its cache out: [head_dim, heads, tokens], permuted into view.
  const auto cache_tensor = [context](ggml_type type, int heads, int64_t tokens) {
    ggml_tensor* t = ggml_new_tensor_3d(context, type, kDim, heads, tokens);
    const std::vector<float> row = gaussian(kDim);
    for (int64_t i = 0; i < heads * tokens; ++i) {
      if (type == GGML_TYPE_F16) {
        ggml_fp32_to_fp16_row(row.data(), static_cast<ggml_fp16_t*>(t->data) + i * kDim, kDim);
      } else {
        std::copy(row.begin(), row.end(), static_cast<float*>(t->data) + i * kDim);
      }
    }
    return ggml_permute(context, t, 0, 2, 1, 3);
  };
  ggml_tensor* mask = ggml_new_tensor_2d(context, GGML_TYPE_F16, kDepth, 1);
  std::fill_n(static_cast<ggml_fp16_t*>(mask->data), kDepth, ggml_fp32_to_fp16(0.0f));
  for (int l = 0; l < kLayers; ++l) {
    ggml_tensor* q = cache_tensor(GGML_TYPE_F32, kHeads, 1);
    ggml_tensor* k = cache_tensor(GGML_TYPE_F16, kKvHeads, kDepth);
    ggml_tensor* v = cache_tensor(GGML_TYPE_F16, kKvHeads, kDepth);
    ggml_build_forward_expand(graph, ggml_flash_attn_ext(context, q, k, v, mask, 0.125f, 0.0f, 0.0f));
  }
  ggml_cplan plan = ggml_graph_plan(graph, kThreads, nullptr);
  std::vector<uint8_t> work(plan.work_size);
  plan.work_data = work.data();
  ggml_graph_compute(graph, &plan);
  Times times;
  for (auto _ : state) {
    eviction.read(team);
    const double start = now();
    ggml_graph_compute(graph, &plan);
    times.seconds.push_back(now() - start);
    state.SetIterationTime(times.seconds.back());
  }
  state.counters["median_ms"] = times.median() * 1e3;
  ggml_free(context);
}
#endif

const bool kRegistered = [] {
  const auto add = [](const std::string& name, const auto& run) {
    benchmark::RegisterBenchmark(("token/" + name).c_str(), run)
        ->UseManualTime()
        ->Iterations(25)
        ->Unit(benchmark::kMillisecond);
  };
  for (const AttentionKernelInfo& kernel : attention_kernels()) {
    if (!kernel.available || kernel.name == "portable") continue;
    for (const int bits : {1, 2, 3, 4, 8, 16}) {
      add(kernel.name + (bits == 16 ? "/f16" : "/int" + std::to_string(bits)),
          [=](benchmark::State& state) { token(state, kernel.name, bits, false); });
    }
    add(kernel.name + "/int2/exact", [=](benchmark::State& state) { token(state, kernel.name, 2, true); });
  }
#ifdef KVMIX_BENCH_GGML
  add("llama.cpp/f16", token_ggml);
#endif
  return true;
}();

}  // namespace
}  // namespace kvmix::bench
