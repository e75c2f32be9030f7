// Decode steps of the cache on a CUDA device, without a model: random rows on the device, many sequences at one depth.
//   kvmix_cache_bench [sequences [depth [layers]]]
// Per plan: bytes of the cache, milliseconds of a step on the device and of the host in it, the part of storing and sealing,
// and the step captured in a graph, without its sealing.
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "kvmix/cache.h"
#include "kvmix/error.h"

namespace kvmix {
namespace {

using Clock = std::chrono::steady_clock;

void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

struct Event {
  cudaEvent_t event = nullptr;
  Event() { check(cudaEventCreate(&event)); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event() { static_cast<void>(cudaEventDestroy(event)); }
};

double median(std::vector<double> v) {
  std::nth_element(v.begin(), v.begin() + static_cast<ptrdiff_t>(v.size() / 2), v.end());
  return v[v.size() / 2];
}

constexpr int kQHeads = 32, kKvHeads = 8, kDim = 128, kQ = kQHeads * kDim, kKv = kKvHeads * kDim, kChunk = 512;

LayerConfig layer_of(const char* key, const char* value, bool transforms) {
  LayerConfig layer;
  layer.q_heads = kQHeads, layer.kv_heads = kKvHeads, layer.head_dim = kDim;
  layer.scale = 1.0f / std::sqrt(static_cast<float>(kDim));
  layer.key.codec = parse_codec(key), layer.value.codec = parse_codec(value);
  if (!transforms) return layer;
  layer.key.transform.hadamard = layer.value.transform.hadamard = true;
  layer.key.transform.scales.assign(static_cast<size_t>(kKv), 1.25f);
  layer.key.transform.feedback.assign(static_cast<size_t>(kKvHeads * kDim * (kDim - 1) / 2), 0.01f);
  return layer;
}

void bench(const char* name, const std::vector<LayerConfig>& kinds, int layers, int sequences, int depth, const float* rows,
           float* out, cudaStream_t stream) {
  CacheConfig config;
  config.device = "cuda", config.device_rows = true, config.stream = stream;
  for (int l = 0; l < layers; ++l) config.layers.push_back(kinds[static_cast<size_t>(l) % kinds.size()]);
  Cache cache(config);
  const float *q = rows, *k = q + static_cast<ptrdiff_t>(kChunk) * kQ, *v = k + static_cast<ptrdiff_t>(kChunk) * kKv;
  Event begin, end;
  std::vector<double> device, host, host_begin, replayed;
  double storing = 0;
  const auto queue = [&](bool attends) {
    for (int l = 0; l < layers; ++l) {
      cache.append(l, k, kKv, v, kKv, 0, 1);
      if (attends) cache.attend(l, q, kQ, out, kQ, 0, 1);
    }
  };
  const auto elapsed = [&] {
    float ms = 0;
    check(cudaEventSynchronize(end.event));
    check(cudaEventElapsedTime(&ms, begin.event, end.event));
    return static_cast<double>(ms);
  };
  const auto step = [&](const std::vector<StepItem>& items, bool attends) {
    const auto start = Clock::now();
    cache.begin_step(items);
    const auto planned = Clock::now();
    check(cudaEventRecord(begin.event, stream));
    queue(attends);
    check(cudaEventRecord(end.event, stream));
    cache.end_step();
    const auto queued = Clock::now();
    device.push_back(elapsed());
    host.push_back(std::chrono::duration<double, std::milli>(queued - start).count());
    host_begin.push_back(std::chrono::duration<double, std::milli>(planned - start).count());
  };
  std::vector<StepItem> all;
  for (int s = 0; s < sequences; ++s) {
    const SequenceId id = cache.create();
    // Lengths differ, so that pages are sealed in different steps.
    const int length = depth - s % kPageTokens;
    for (int done = 0; done < length; done += kChunk) step({{id, std::min(kChunk, length - done)}}, false);
    all.push_back({id, 1});
  }
  for (int i = 0; i < 8; ++i) step(all, true);
  const auto clear = [&] { device.clear(), host.clear(), host_begin.clear(); };
  clear();
  for (int i = 0; i < 64; ++i) step(all, false);
  for (const double ms : device) storing += ms / 64;
  clear();
  for (int i = 0; i < 64; ++i) step(all, true);
  // The last step is launched again and again: it stores its rows where they are.
  cache.begin_step(all);
  if (cache.launch_key() == 0) throw std::runtime_error("a decode step cannot be captured");
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t launch = nullptr;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
  queue(true);
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&launch, graph, 0));
  for (int i = 0; i < 24; ++i) {
    check(cudaEventRecord(begin.event, stream));
    check(cudaGraphLaunch(launch, stream));
    check(cudaEventRecord(end.event, stream));
    if (i >= 8) replayed.push_back(elapsed());
  }
  cache.end_step();
  check(cudaGraphExecDestroy(launch)), check(cudaGraphDestroy(graph));
  const MemoryReport m = cache.memory();
  std::printf(
      "%-27s %4d x %6d, %2d layers: %8.1f MiB in use, %6.1f slack, %6.1f scratch; step %7.3f ms on the device, storing alone "
      "%.3f, captured %.3f; host %.3f, of which begin %.3f; %s\n",
      name, sequences, depth, layers, static_cast<double>(m.total_bytes - m.slack_bytes) / (1 << 20),
      static_cast<double>(m.slack_bytes) / (1 << 20), static_cast<double>(m.scratch_bytes) / (1 << 20), median(device), storing,
      median(replayed), median(host), median(host_begin), cache.stats().kernel.c_str());
}

}  // namespace
}  // namespace kvmix

int main(int argc, char** argv) {
  using namespace kvmix;
  try {
    const int sequences = argc > 1 ? std::atoi(argv[1]) : 48, depth = argc > 2 ? std::atoi(argv[2]) : 8192;
    const int layers = argc > 3 ? std::atoi(argv[3]) : 32;
    if (sequences < 1 || sequences > kChunk || depth < 256 || layers < 1) {
      std::fprintf(stderr, "kvmix_cache_bench: up to %d sequences, a depth of at least 256, layers\n", kChunk);
      return 2;
    }
    cudaStream_t stream = nullptr;
    check(cudaStreamCreate(&stream));
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::vector<float> numbers(static_cast<size_t>(kChunk) * (kQ + 2 * kKv));
    for (float& x : numbers) x = normal(random);
    float *rows = nullptr, *out = nullptr;
    check(cudaMalloc(&rows, numbers.size() * sizeof(float)));
    check(cudaMalloc(&out, static_cast<size_t>(kChunk) * kQ * sizeof(float)));
    check(cudaMemcpy(rows, numbers.data(), numbers.size() * sizeof(float), cudaMemcpyHostToDevice));
    const auto kind = [](const char* key, const char* value, bool transforms) { return layer_of(key, value, transforms); };
    const char* const k2 = "int2.channel.g128.fitted.zero";
    const char* const k3 = "int3.channel.g128.fitted.zero";
    const char* const k4 = "int4.channel.g64.fitted.zero";
    const char* const v2 = "int2.token.g64.minmax.zero";
    const char* const v3 = "int3.token.g64.minmax.zero";
    const char* const v1 = "int1.token.g64.fitted.zero";
    bench("f16", {kind("f16", "f16", false)}, layers, sequences, depth, rows, out, stream);
    for (const char* const recent : {"f16", "int8.token.g64.minmax.zero"}) {
      const auto bench_rows = [&](const char* name, std::vector<LayerConfig> kinds) {
        for (LayerConfig& layer : kinds) layer.recent = parse_codec(recent);
        const std::string whole = std::string(name) + (kinds.front().recent.is_f16() ? ", f16 rows" : ", 8-bit rows");
        bench(whole.c_str(), kinds, layers, sequences, depth, rows, out, stream);
      };
      bench_rows("2/2", {kind(k2, v2, false)});
      bench_rows("2/2 transformed", {kind(k2, v2, true)});
      bench_rows("mix", {kind(k2, v2, true), kind(k3, v2, true), kind(k2, v1, true), kind(k4, v3, true)});
    }
    check(cudaFree(rows)), check(cudaFree(out));
    check(cudaStreamDestroy(stream));
    return 0;
  } catch (const Error& e) {
    std::fprintf(stderr, "%s: %s\n", status_name(e.status()), e.what());
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
  }
  return 1;
}
