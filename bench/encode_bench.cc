// encode/<encoder>/<codec>/<key|value>: sealing one tile of head_dim 64.
#include <benchmark/benchmark.h>

#include <random>
#include <string>
#include <vector>

#include "base/fp16.h"
#include "codec/encoders.h"

namespace kvmix::bench {
namespace {

void encode(benchmark::State& state, const TileEncoder& encoder, const CodecSpec& spec, Side side) {
  constexpr int kDim = 64;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<uint16_t> x(kPageTokens * kDim);
  for (uint16_t& v : x) v = f32_to_f16(normal(random));
  std::vector<std::byte> out(tile_bytes(spec, kDim));
  for (auto _ : state) {
    encoder.encode(spec, side, kDim, x.data(), out.data());
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
          const std::string name =
              std::string("encode/") + encoder->name + "/" + to_string(spec) + (side == Side::kKey ? "/key" : "/value");
          benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) { encode(state, *encoder, spec, side); })
              ->Unit(benchmark::kMicrosecond)
              ->MinTime(0.05);
        }
      }
    }
  }
  return true;
}();

}  // namespace
}  // namespace kvmix::bench
