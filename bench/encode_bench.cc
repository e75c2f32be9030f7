// encode/<encoder>/<codec>/<key|value>[/feedback]: sealing one tile of head_dim 64, with error feedback.
#include <benchmark/benchmark.h>

#include <random>
#include <string>
#include <vector>

#include "base/fp16.h"
#include "codec/encoders.h"

namespace kvmix::bench {
namespace {

void encode(benchmark::State& state, const TileEncoder& encoder, const CodecSpec& spec, Side side, bool feedback) {
  constexpr int kDim = 64;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<uint16_t> x(kPageTokens * kDim);
  for (uint16_t& v : x) v = f32_to_f16(normal(random));
  std::vector<float> weights(kDim * (kDim - 1) / 2);
  for (float& w : weights) w = 0.1f * normal(random);
  std::vector<std::byte> out(tile_bytes(spec, kDim));
  for (auto _ : state) {
    encoder.encode(spec, {kPageTokens, kDim, side}, x.data(), feedback ? weights.data() : nullptr, out.data());
    benchmark::ClobberMemory();
  }
  state.counters["ns/token"] = benchmark::Counter(static_cast<double>(state.iterations()) * kPageTokens * 1e-9,
                                                  benchmark::Counter::kIsRate | benchmark::Counter::kInvert);
}

const bool kRegistered = [] {
  for (const TileEncoder* encoder : tile_encoders()) {
    if (!encoder->available()) continue;
    for (const int bits : {2, 3, 4, 8}) {
      for (const Fit fit : {Fit::kMinMax, Fit::kLeastSquares}) {
        for (const Side side : {Side::kKey, Side::kValue}) {
          const CodecSpec spec{bits, side == Side::kKey ? Axis::kChannel : Axis::kToken, 128, fit, true};
          for (const bool feedback : {false, true}) {
            if (feedback && fit == Fit::kMinMax) continue;
            const std::string name = std::string("encode/") + encoder->name + "/" + to_string(spec) +
                                     (side == Side::kKey ? "/key" : "/value") + (feedback ? "/feedback" : "");
            benchmark::RegisterBenchmark(name.c_str(),
                                         [=](benchmark::State& state) { encode(state, *encoder, spec, side, feedback); })
                ->Unit(benchmark::kMicrosecond)
                ->MinTime(0.05);
          }
        }
      }
    }
  }
  return true;
}();

}  // namespace
}  // namespace kvmix::bench
