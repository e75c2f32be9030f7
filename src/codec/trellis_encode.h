// The encoder of the trellis family, which every instruction set compiles for itself: vectors of states where there is AVX2,
// plain loops elsewhere, in one order and without contraction into fused multiply-adds, so that all write the same bytes.
// Internal linkage: included once per instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/fp16.h"
#include "codec/pack_block.h"
#include "codec/trellis.h"

namespace kvmix {
namespace {

#if defined(__AVX512F__)
inline constexpr int kVectorWidth = 16;
#else
inline constexpr int kVectorWidth = 8;
#endif
template <int kWidth>
struct VectorOf;
template <>
struct VectorOf<8> {
  typedef float Floats __attribute__((vector_size(32)));
  typedef int32_t Ints __attribute__((vector_size(32)));
};
template <>
struct VectorOf<16> {
  typedef float Floats __attribute__((vector_size(64)));
  typedef int32_t Ints __attribute__((vector_size(64)));
};

template <int kBits>
class TrellisEncoder {
  static constexpr int kStates = kLevels >> kBits, kBranches = 1 << kBits;

 public:
  static void encode(const CodecSpec& spec, const TileShape& shape, const uint16_t* x, const float* feedback, std::byte* out) {
    const int width = shape.width;
    const Side side = shape.side;
    const TrellisCode& code = trellis_code(kBits);
    alignas(64) float levels[kLevels];
    for (int w = 0; w < kLevels; ++w) levels[w] = static_cast<float>(code.level(w)) - kLevelCentre;
    auto* scales = reinterpret_cast<uint8_t*>(out);
    std::memset(out, 0, trellis_head_bytes(spec, width));
    alignas(64) float offsets[kMostWidth] = {};
    if (spec.zero_point) {
      store_offsets(code, width, x, scales, offsets);
    } else {
      store_scales(code, width, x, offsets, scales);
    }
    const TileGeometry geometry = tile_geometry(side, width);
    alignas(64) uint8_t flat[kPageTokens * kMostWidth];  // the tile's codes, one a byte, unit by unit
    alignas(64) float errors[kMostWidth][kPageTokens];
    alignas(64) float scale[kPageTokens], inverse[kPageTokens], exact[kPageTokens], wanted[kPageTokens];
    for (int c = 0; c < width; ++c) {
      if (c % kTrellisGroup == 0) {
        for (int t = 0; t < kPageTokens; ++t) {
          scale[t] = trellis_scale(scales[c / kTrellisGroup * kPageTokens + t]);
          inverse[t] = scale[t] > 0.0f ? code.gain / scale[t] : 0.0f;
        }
      }
      for (int t = 0; t < kPageTokens; ++t) exact[t] = wanted[t] = finite(x[t * width + c]) - offsets[c];
      if (feedback != nullptr) {
        const float* weights = feedback + static_cast<ptrdiff_t>(c) * (c - 1) / 2;
        for (int i = 0; i < c; ++i) {
          for (int t = 0; t < kPageTokens; ++t) wanted[t] = wanted[t] + weights[i] * errors[i][t];
        }
      }
      float targets[kChains][kChainTokens], weights[kChains][kChainTokens];
      uint8_t windows[kChains][kChainTokens];
      for (int chain = 0; chain < kChains; ++chain) {
        float largest = 0;
        for (int i = 0; i < kChainTokens; ++i) {
          const int t = chain_token(side, chain, i);
          const float level = wanted[t] * inverse[t];
          targets[chain][i] = std::fabs(level) < kFarLevel ? level : std::copysign(kFarLevel, level);
          largest = std::max(largest, scale[t]);
        }
        // A key's error counts as it is, a value's by the size of its row: rows that attention likes best are often small.
        for (int i = 0; i < kChainTokens; ++i) {
          const float part = largest > 0.0f ? scale[chain_token(side, chain, i)] / largest : 0.0f;
          weights[chain][i] = side == Side::kKey ? part * part : 1.0f;
        }
      }
      best_windows(levels, targets, weights, windows);
      for (int chain = 0; chain < kChains; ++chain) {
        for (int i = 0; i < kChainTokens; ++i) {
          const int t = chain_token(side, chain, i), window = windows[chain][i];
          const int lane = side == Side::kKey ? t : c, reduce = side == Side::kKey ? c : t;
          flat[unit_index(geometry, lane, reduce) * kUnitCodes + byte_in_unit(lane, reduce)] =
              static_cast<uint8_t>(window & (kBranches - 1));
          errors[c][t] = exact[t] - scale[t] * levels[window];
        }
      }
    }
    uint8_t* const codes = scales + trellis_head_bytes(spec, width);
    for (int b = 0; b < kPageTokens * width / (kBlockUnits * kUnitCodes); ++b)
      pack_block<kBits>(flat + b * kBlockUnits * kUnitCodes, codes + b * kBits * kVectorBytes);
  }

 private:
  static constexpr float kFarLevel = 1024.0f;

  static float finite(uint16_t h) {
    const float v = f16_to_f32(h);
    return std::isfinite(v) ? v : 0.0f;
  }

  // Channels' means over the tile, as multiples of its largest scale, and the scales of what is left. Where the means are so
  // far from zero that no offset reaches them, the largest scale becomes one by which they do, and the others, which then meet
  // what is left of the means, at most that.
  static void store_offsets(const TrellisCode& code, int width, const uint16_t* x, uint8_t* scales, float* offsets) {
    constexpr float kMost = 127.0f;
    float means[kMostWidth], farthest = 0;
    for (int c = 0; c < width; ++c) means[c] = 0;
    for (int t = 0; t < kPageTokens; ++t) {
      for (int c = 0; c < width; ++c) means[c] += finite(x[t * width + c]);
    }
    for (int c = 0; c < width; ++c) {
      means[c] = means[c] / static_cast<float>(kPageTokens);
      farthest = std::max(farthest, std::fabs(means[c]));
    }
    store_scales(code, width, x, means, scales);
    uint8_t* const end = scales + trellis_offsets_at(width);
    uint8_t* const largest = std::max_element(scales, end);
    const bool near = trellis_scale(*largest) * kMost >= farthest;
    while (trellis_scale(*largest) * kMost < farthest && *largest < 255) ++*largest;
    const uint8_t kept = *largest;
    const float unit = trellis_scale(kept);
    auto* stored = reinterpret_cast<int8_t*>(end);
    for (int c = 0; c < width; ++c) {
      const float wanted = unit > 0.0f ? means[c] / unit : 0.0f;
      stored[c] = static_cast<int8_t>(std::lrint(std::min(std::max(wanted, -kMost), kMost)));
      offsets[c] = static_cast<float>(stored[c]) * unit;
    }
    if (near) return;
    store_scales(code, width, x, offsets, scales);
    for (uint8_t* scale = scales; scale < end; ++scale) *scale = std::min(*scale, kept);
    *largest = kept;
  }

  // The levels' Gaussian has the row's root mean square, and the outermost level reaches the row's largest number. Codes are
  // chosen so; read they are `gain` times larger, since the nearest levels shrink a row, and with it scores and outputs.
  static void store_scales(const TrellisCode& code, int width, const uint16_t* x, const float* offsets, uint8_t* scales) {
    for (int t = 0; t < kPageTokens; ++t) {
      for (int c = 0; c < width; c += kTrellisGroup) {
        const int n = std::min(kTrellisGroup, width - c);
        float squares = 0, most = 0;
        for (int i = 0; i < n; ++i) {
          const float v = finite(x[t * width + c + i]) - offsets[c + i];
          squares += v * v;
          most = std::max(most, std::fabs(v));
        }
        scales[c / kTrellisGroup * kPageTokens + t] = store_trellis_scale(
            code.gain * std::max(std::sqrt(squares / static_cast<float>(n)) / code.unit, most / kLevelCentre));
      }
    }
  }

#if defined(__AVX2__)
  // Vectors of states, as wide as there are or as states are many.
  static constexpr int kWide = std::min(kStates, kVectorWidth);
  using Floats = typename VectorOf<kWide>::Floats;
  using Ints = typename VectorOf<kWide>::Ints;

  // One token: the costs of all states, and the windows by which they were reached.
  static void step(const float* levels, float target, float weight, float* cost, int32_t* from) {
    constexpr int kVectors = kStates / kWide;
    Floats old[kVectors], best[kVectors];
    Ints through[kVectors];
    std::memcpy(old, cost, sizeof old);
#pragma GCC unroll 64
    for (int b = 0; b < kBranches; ++b) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const int w = b * kStates + v * kWide;
        Ints state;
        for (int i = 0; i < kWide; ++i) state[i] = ((w + i) >> kBits) % kWide;
        Floats level;
        std::memcpy(&level, levels + w, sizeof level);
        const Floats e = target - level;
        const Floats reached = __builtin_shuffle(old[(w >> kBits) / kWide], state) + e * e * weight;
        if (b == 0) {
          best[v] = reached, through[v] = Ints{};
        } else {
          const Ints better = reached < best[v];
          best[v] = better ? reached : best[v];
          through[v] = better ? Ints{} + b * kStates : through[v];
        }
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      for (int i = 0; i < kWide; ++i) through[v][i] += v * kWide + i;
    }
    std::memcpy(cost, best, sizeof best);
    std::memcpy(from, through, sizeof through);
  }
#else
  static void step(const float* levels, float target, float weight, float* cost, int32_t* from) {
    float reached[kLevels];
    for (int s = 0; s < kStates; ++s) {
      for (int b = 0; b < kBranches; ++b) {
        const int w = s * kBranches + b;
        const float e = target - levels[w];
        reached[w] = cost[s] + e * e * weight;
      }
    }
    for (int s = 0; s < kStates; ++s) cost[s] = reached[s], from[s] = s;
    for (int w = kStates; w < kLevels; ++w) {
      const int s = w % kStates;
      const bool better = reached[w] < cost[s];
      cost[s] = better ? reached[w] : cost[s];
      from[s] = better ? w : from[s];
    }
  }
#endif

  // The windows whose levels come nearest to the targets of a channel's chains, errors weighed: from state 0 over all states
  // (Viterbi). Of equal paths the one through the smaller window. The chains go side by side: none waits for its own steps.
  static void best_windows(const float* levels, const float (*targets)[kChainTokens], const float (*weights)[kChainTokens],
                           uint8_t (*windows)[kChainTokens]) {
    alignas(64) float cost[kChains][kStates];
    alignas(64) int32_t from[kChains][kChainTokens][kStates];
    for (float(&costs)[kStates] : cost) {
      std::fill_n(costs, kStates, std::numeric_limits<float>::max());
      costs[0] = 0.0f;
    }
    for (int i = 0; i < kChainTokens; ++i) {
      for (int c = 0; c < kChains; ++c) step(levels, targets[c][i], weights[c][i], cost[c], from[c][i]);
    }
    for (int c = 0; c < kChains; ++c) {
      auto state = static_cast<int>(std::min_element(cost[c], cost[c] + kStates) - cost[c]);
      for (int i = kChainTokens; i-- > 0;) {
        windows[c][i] = static_cast<uint8_t>(from[c][i][state]);
        state = windows[c][i] >> kBits;
      }
    }
  }
};

// TileEncoder::encode.
inline void encode_trellis(const CodecSpec& spec, const TileShape& shape, const uint16_t* x, const float* feedback,
                           std::byte* out) {
  with_trellis_bits(spec.bits, [&](auto bits) { TrellisEncoder<bits()>::encode(spec, shape, x, feedback, out); });
}

}  // namespace
}  // namespace kvmix
