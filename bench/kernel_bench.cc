// attend/<kernel>/<codes>/d<head_dim>/g<query heads per KV head>/<cold|warm>: one thread, one query token over 4096 tokens of
// some heads. Cold reads come from DRAM.
#include <benchmark/benchmark.h>

#include <cmath>
#include <random>
#include <string>

#include "attention/cpu/kernel.h"
#include "base/fp16.h"
#include "codec/encoders.h"
#include "support.h"

namespace kvmix::bench {
namespace {

constexpr int kPages = 32;

struct Problem {
  AttendJob job{};
  std::vector<std::byte> records;
  std::vector<PageRef> pages;
  std::vector<float> q, m, l, acc;
  std::vector<int64_t> positions;
  int heads;
  size_t bytes;

  Problem(int bits, int head_dim, int group) {
    const auto format = [head_dim, bits](Side side) {
      const CodecSpec spec = bits == 16 ? CodecSpec{} : CodecSpec{bits, side == Side::kKey ? Axis::kChannel : Axis::kToken};
      return tile_format(spec, {kPageTokens, head_dim, side});
    };
    job.key = format(Side::kKey);
    job.value = format(Side::kValue);
    const size_t record = job.key.bytes + job.value.bytes;
    heads = static_cast<int>((size_t{8} << 20) / (record * kPages) + 1);
    bytes = record * kPages * static_cast<size_t>(heads);
    records.resize(bytes + 64);
    std::byte* base = records.data() + (64 - reinterpret_cast<uintptr_t>(records.data()) % 64) % 64;
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::vector<uint16_t> rows(static_cast<size_t>(kPageTokens * head_dim));
    for (uint16_t& x : rows) x = f32_to_f16(normal(random));
    for (int i = 0; i < kPages * heads; ++i) {
      std::byte* at = base + record * static_cast<size_t>(i);
      codec_of(job.key.spec).encode(job.key.spec, job.key.shape(), rows.data(), nullptr, at);
      codec_of(job.value.spec).encode(job.value.spec, job.value.shape(), rows.data(), nullptr, at + job.key.bytes);
      pages.push_back({at, at + job.key.bytes, int64_t{i % kPages} * kPageTokens, kPageTokens, bits != 16});
    }
    const auto n = static_cast<size_t>(group);
    q.resize(n * static_cast<size_t>(head_dim));
    for (float& x : q) x = normal(random);
    m.resize(n), l.resize(n), acc.resize(q.size());
    positions.assign(n, kPages * kPageTokens - 1);
    job.scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
    job.rows = group;
    job.q = q.data();
    job.position = positions.data();
    job.m = m.data(), job.l = l.data(), job.acc = acc.data();
  }
};

Team& one() {
  static Team team(1);
  return team;
}

void attend(benchmark::State& state, const AttentionKernel& kernel, int bits, int head_dim, int group, bool cold) {
  static const double bandwidth = read_bandwidth(one());
  static Eviction eviction;
  Problem p(bits, head_dim, group);
  std::vector<std::byte> scratch(kernel.scratch_bytes(head_dim, group) + 64);
  std::byte* aligned = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) % 64;
  double total = 0;
  for (auto _ : state) {
    if (cold) eviction.read(one());
    const double start = now();
    for (int head = 0; head < p.heads; ++head) {
      p.job.pages = {p.pages.data() + (cold ? head * kPages : 0), kPages};
      kernel.attend(p.job, aligned);
    }
    benchmark::DoNotOptimize(p.acc.data());
    const double seconds = now() - start;
    total += seconds;
    state.SetIterationTime(seconds);
  }
  const double rate = static_cast<double>(p.bytes) * static_cast<double>(state.iterations()) / total;
  state.counters["GB/s"] = rate * 1e-9;
  state.counters["of_read_bandwidth"] = rate / bandwidth;
  state.counters["us/4096_tokens"] = total * 1e6 / (static_cast<double>(state.iterations()) * p.heads);
}

const bool kRegistered = [] {
  for (const AttentionKernel* kernel : attention_kernel_registry()) {
    if (!kernel->available()) continue;
    for (const int bits : kCodecBits) {
      for (const int head_dim : {64, 80, 96, 128, 256}) {
        for (const int group : {1, 3, 4, 8}) {
          for (const bool cold : {true, false}) {
            const std::string name = std::string("attend/") + kernel->name +
                                     (bits == 16 ? "/f16" : "/int" + std::to_string(bits)) + "/d" + std::to_string(head_dim) +
                                     "/g" + std::to_string(group) + (cold ? "/cold" : "/warm");
            benchmark::RegisterBenchmark(name.c_str(),
                                         [=](benchmark::State& state) { attend(state, *kernel, bits, head_dim, group, cold); })
                ->UseManualTime()
                ->Iterations(8)
                ->Unit(benchmark::kMicrosecond);
          }
        }
      }
    }
  }
  return true;
}();

}  // namespace
}  // namespace kvmix::bench

BENCHMARK_MAIN();
