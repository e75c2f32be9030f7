// An engine author's loop over a cache on a CUDA device: the engine's stream, rows that never leave the device, prompts in
// chunks beside sequences that decode. Random rows stand in for a model's.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <random>
#include <stdexcept>
#include <vector>

#include "kvmix/cache.h"
#include "kvmix/error.h"

namespace {

void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

}  // namespace

int main() {
  try {
    cudaStream_t stream = nullptr;
    kvmix::CacheConfig config;
    config.device = "cuda";
    config.device_rows = true;
    config.layers.resize(2);
    for (kvmix::LayerConfig& layer : config.layers) {
      layer.q_heads = 32, layer.kv_heads = 8, layer.head_dim = 128;
      layer.scale = 1.0f / std::sqrt(128.0f);
      layer.key.codec = kvmix::parse_codec("int2.channel.g128.fitted.zero");
      layer.value.codec = kvmix::parse_codec("int2.token.g64.minmax.zero");
      layer.value.transform.hadamard = true;
    }
    if (const auto status = cudaStreamCreate(&stream); status == cudaSuccess) config.stream = stream;
    kvmix::Cache cache(config);  // without a device this says so

    // What a model would compute on the same stream: q, k, v and room for out, fp32.
    constexpr int kMostRows = 256, kQ = 32 * 128, kKv = 8 * 128;
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::vector<float> rows(static_cast<size_t>(kMostRows) * (kQ + 2 * kKv));
    for (float& x : rows) x = normal(random);
    float *q = nullptr, *out = nullptr;
    check(cudaMalloc(&q, rows.size() * sizeof(float)));
    check(cudaMalloc(&out, static_cast<size_t>(kMostRows) * kQ * sizeof(float)));
    check(cudaMemcpy(q, rows.data(), rows.size() * sizeof(float), cudaMemcpyHostToDevice));
    const float *k = q + static_cast<size_t>(kMostRows) * kQ, *v = k + static_cast<size_t>(kMostRows) * kKv;

    std::vector<kvmix::SequenceId> decoding;
    for (int i = 0; i < 4; ++i) {
      const kvmix::SequenceId prompt = cache.create();
      for (int chunk = 0; chunk < 8; ++chunk) {  // a chunk of the prompt and a token of each sequence that decodes
        std::vector<kvmix::StepItem> items = {{prompt, kvmix::kPageTokens}};
        for (const kvmix::SequenceId id : decoding) items.push_back({id, 1});
        cache.begin_step(items);  // throws kOutOfMemory before anything changed
        for (int layer = 0; layer < 2; ++layer) {
          cache.append(layer, k, kKv, v, kKv, 0, 1);
          cache.attend(layer, q, kQ, out, kQ, 0, 1);
        }
        cache.end_step();  // the host may go on; the device follows in the stream's order
      }
      decoding.push_back(prompt);
    }
    float first = 0;
    check(cudaMemcpyAsync(&first, out, sizeof first, cudaMemcpyDeviceToHost, stream));
    check(cudaStreamSynchronize(stream));
    const kvmix::MemoryReport memory = cache.memory();
    std::printf("kernel %s, first output %.4f; %lld tokens in %zu bytes, %zu of scratch\n", cache.stats().kernel.c_str(),
                static_cast<double>(first), static_cast<long long>(memory.tokens), memory.total_bytes, memory.scratch_bytes);
    check(cudaFree(q)), check(cudaFree(out));
    return 0;
  } catch (const kvmix::Error& e) {
    std::fprintf(stderr, "%s: %s\n", kvmix::status_name(e.status()), e.what());
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
  }
  return 1;
}
