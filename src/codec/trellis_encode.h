// The encoder of the trellis family, which every instruction set compiles for itself: vectors of windows where there is AVX2,
// plain loops elsewhere, in one order and without contraction into fused multiply-adds, so that all write the same bytes.
// Internal linkage: included once per instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/fp16.h"
#if defined(__AVX512F__)
#include "base/simd_avx512.h"
#elif defined(__AVX2__)
#include "base/simd_avx2.h"
#endif
#include "codec/pack_block.h"
#include "codec/trellis.h"

namespace kvmix {
namespace {

#if defined(__AVX2__)
#if defined(__AVX512F__)
using Simd = Avx512;
#else
using Simd = Avx2;
#endif
inline constexpr int kWide = Simd::kWidth;
template <int kWidth>
struct VectorOf {
  typedef float Floats __attribute__((vector_size(4 * kWidth)));
  typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
};
// Bit i: lane i is the same.
inline unsigned equal(__m128 a, __m128 b) { return static_cast<unsigned>(_mm_movemask_ps(_mm_cmpeq_ps(a, b))); }
inline unsigned equal(__m256 a, __m256 b) { return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ))); }
#if defined(__AVX512F__)
inline unsigned equal(__m512 a, __m512 b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
#endif
#endif

template <int kBits, Side kSide>
class TrellisEncoder {
  static constexpr int kStates = kLevels >> kBits, kBranches = 1 << kBits;

 public:
  static void encode(const CodecSpec& spec, const TileShape& shape, const uint16_t* x, const float* feedback, std::byte* out) {
    const int width = shape.width;
    const TrellisCode& code = trellis_code(kBits);
    alignas(64) float levels[kLevels], turned[kLevels];  // by window, and by state and branch
    for (int w = 0; w < kLevels; ++w) {
      levels[w] = static_cast<float>(code.level(w)) - kLevelCentre;
      turned[w % kStates * kBranches + w / kStates] = levels[w];
    }
    alignas(64) float columns[kMostWidth][kPageTokens];
    read_columns(x, width, columns);
    auto* scales = reinterpret_cast<uint8_t*>(out);
    std::memset(out, 0, trellis_head_bytes(spec, width));
    alignas(64) float offsets[kMostWidth] = {};
    if (spec.zero_point) {
      store_offsets(code, width, columns, scales, offsets);
    } else {
      store_scales(code, width, columns, offsets, scales);
    }
    const TileGeometry geometry = tile_geometry(kSide, width);
    alignas(64) uint8_t flat[kPageTokens * kMostWidth];  // the tile's codes, one a byte, unit by unit
    alignas(64) float errors[kMostWidth][kPageTokens];
    alignas(64) float scale[kPageTokens], inverse[kPageTokens], exact[kPageTokens], wanted[kPageTokens], level[kPageTokens];
    float targets[kChains][kChainTokens], weights[kChains][kChainTokens] = {};
    for (int c = 0; c < width; ++c) {
      if (c % kTrellisGroup == 0) {
        for (int t = 0; t < kPageTokens; ++t) {
          scale[t] = trellis_scale(scales[c / kTrellisGroup * kPageTokens + t]);
          inverse[t] = scale[t] > 0.0f ? code.gain / scale[t] : 0.0f;
        }
        if constexpr (kSide == Side::kKey) weigh(scale, weights);
      }
      for (int t = 0; t < kPageTokens; ++t) exact[t] = wanted[t] = columns[c][t] - offsets[c];
      // Within an "if", GCC 12 splits this loop, wrongly.
      for (int i = 0; feedback != nullptr && i < c; ++i) {
        const float weight = feedback[static_cast<ptrdiff_t>(c) * (c - 1) / 2 + i];
        for (int t = 0; t < kPageTokens; ++t) wanted[t] = wanted[t] + weight * errors[i][t];
      }
      for (int t = 0; t < kPageTokens; ++t) {
        const float exactly = wanted[t] * inverse[t];
        level[t] = std::fabs(exactly) < kFarLevel ? exactly : std::copysign(kFarLevel, exactly);
      }
      for (int chain = 0; chain < kChains; ++chain) {
        for (int i = 0; i < kChainTokens; ++i) targets[chain][i] = level[chain_token(kSide, chain, i)];
      }
      uint8_t windows[kChains][kChainTokens], codes[kPageTokens];
      best_windows(levels, turned, targets, weights, windows);
      for (int chain = 0; chain < kChains; ++chain) {
        for (int i = 0; i < kChainTokens; ++i) {
          const int t = chain_token(kSide, chain, i), window = windows[chain][i];
          codes[t] = static_cast<uint8_t>(window & (kBranches - 1));
          level[t] = levels[window];
        }
      }
      for (int t = 0; t < kPageTokens; ++t) errors[c][t] = exact[t] - scale[t] * level[t];
      if constexpr (kSide == Side::kKey) {
        for (int t = 0; t < kPageTokens; t += kUnitLanes) {
          uint8_t* to = flat + unit_index(geometry, t, c) * kUnitCodes + byte_in_unit(t, c);
          for (int i = 0; i < kUnitLanes; ++i) to[i * kUnitReduce] = codes[t + i];
        }
      } else {
        for (int t = 0; t < kPageTokens; t += kUnitReduce)
          std::memcpy(flat + unit_index(geometry, c, t) * kUnitCodes + byte_in_unit(c, t), codes + t, kUnitReduce);
      }
    }
    uint8_t* const packed = scales + trellis_head_bytes(spec, width);
    for (int b = 0; b < kPageTokens * width / (kBlockUnits * kUnitCodes); ++b)
      pack_block<kBits>(flat + b * kBlockUnits * kUnitCodes, packed + b * kBits * kVectorBytes);
  }

 private:
  static constexpr float kFarLevel = 1024.0f;

  // Channel by channel; numbers that are not finite count as 0.
  static void read_columns(const uint16_t* x, int width, float (*columns)[kPageTokens]) {
#if defined(__AVX2__)
    for (int t = 0; t < kPageTokens; t += kWide) {
      for (int c = 0; c < width; c += kWide) {
        Simd::V rows[kWide], turned[kWide];
        for (int k = 0; k < kWide; ++k) {
          const Simd::V v = Simd::load_f16(x + (t + k) * width + c);
          rows[k] = Simd::select(Simd::less(Simd::abs(v), Simd::set1(INFINITY)), v, Simd::zero());
        }
        Simd::transpose(rows, turned);
        for (int k = 0; k < kWide; ++k) Simd::store(columns[c + k] + t, turned[k]);
      }
    }
#else
    for (int t = 0; t < kPageTokens; ++t) {
      for (int c = 0; c < width; ++c) {
        const float v = f16_to_f32(x[t * width + c]);
        columns[c][t] = std::isfinite(v) ? v : 0.0f;
      }
    }
#endif
  }

  // Channels' means over the tile, as multiples of its largest scale, and the scales of what is left. Where the means are so
  // far from zero that no offset reaches them, the largest scale becomes one by which they do, and the others, which then meet
  // what is left of the means, at most that.
  static void store_offsets(const TrellisCode& code, int width, const float (*columns)[kPageTokens], uint8_t* scales,
                            float* offsets) {
    constexpr float kMost = 127.0f;
    float means[kMostWidth], farthest = 0;
    for (int c = 0; c < width; ++c) {
      means[c] = 0;
      for (const float v : columns[c]) means[c] += v;
      means[c] = means[c] / static_cast<float>(kPageTokens);
      farthest = std::max(farthest, std::fabs(means[c]));
    }
    store_scales(code, width, columns, means, scales);
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
    store_scales(code, width, columns, offsets, scales);
    for (uint8_t* scale = scales; scale < end; ++scale) *scale = std::min(*scale, kept);
    *largest = kept;
  }

  // The levels' Gaussian has the row's root mean square, and the outermost level reaches the row's largest number. Codes are
  // chosen so; read they are `gain` times larger, since the nearest levels shrink a row, and with it scores and outputs.
  static void store_scales(const TrellisCode& code, int width, const float (*columns)[kPageTokens], const float* offsets,
                           uint8_t* scales) {
    for (int first = 0; first < width; first += kTrellisGroup, scales += kPageTokens) {
      const int end = std::min(first + kTrellisGroup, width);
      alignas(64) float squares[kPageTokens] = {}, most[kPageTokens] = {};
      for (int c = first; c < end; ++c) {
        for (int t = 0; t < kPageTokens; ++t) {
          const float v = columns[c][t] - offsets[c];
          squares[t] += v * v;
          most[t] = std::max(most[t], std::fabs(v));
        }
      }
      for (int t = 0; t < kPageTokens; ++t) {
        const float size = std::sqrt(squares[t] / static_cast<float>(end - first));
        scales[t] = store_trellis_scale(code.gain * std::max(size / code.unit, most[t] / kLevelCentre));
      }
    }
  }

  // A key's error counts as it is, a value's by the size of its row: rows that attention likes best are often small.
  static void weigh(const float* scale, float (*weights)[kChainTokens]) {
    for (int chain = 0; chain < kChains; ++chain) {
      float largest = 0;
      for (int i = 0; i < kChainTokens; ++i) largest = std::max(largest, scale[chain_token(kSide, chain, i)]);
      for (int i = 0; i < kChainTokens; ++i) {
        const float part = largest > 0.0f ? scale[chain_token(kSide, chain, i)] / largest : 0.0f;
        weights[chain][i] = part * part;
      }
    }
  }

  // What a token's number costs that comes `e` away from its target. A value's weight is 1.
  template <class Float>
  static Float error(Float e, float weight) {
    return kSide == Side::kKey ? e * e * weight : e * e;
  }

#if defined(__AVX2__)
  // One token: the costs of all states from those before it, vectors of windows at a time.
  static void step(const float* levels, float target, float weight, const float* before, float* cost) {
    using Floats = typename VectorOf<kWide>::Floats;
    using Ints = typename VectorOf<kWide>::Ints;
    constexpr int kVectors = std::max(1, kStates / kWide);
    Floats best[kVectors];
#pragma GCC unroll 64
    for (int w = 0; w < kLevels; w += kWide) {
      Floats level, reached;
      std::memcpy(&level, levels + w, sizeof level);
      if constexpr (kBranches >= kWide) {
        reached = before[w >> kBits] + error(target - level, weight);
      } else {
        std::memcpy(&reached, before + (w >> kBits) / kWide * kWide, sizeof reached);
        Ints state;
        for (int i = 0; i < kWide; ++i) state[i] = ((w + i) >> kBits) % kWide;
        reached = __builtin_shuffle(reached, state) + error(target - level, weight);
      }
      Floats& least = best[w / kWide % kVectors];
      least = w < kVectors * kWide || reached < least ? reached : least;
    }
    if constexpr (kStates < kWide) {  // two branches side by side
      Ints other;
      for (int i = 0; i < kWide; ++i) other[i] = (i + kStates) % kWide;
      const Floats half = __builtin_shuffle(best[0], other);
      best[0] = half < best[0] ? half : best[0];
    }
    std::memcpy(cost, best, kStates * sizeof(float));
  }

  // The first of the windows by which a state is reached at its cost.
  static int window_to(int state, const float* turned, float target, float weight, const float* before, float cost) {
    constexpr int kLanes = std::min({kBranches, kStates, kWide});
    using Floats = typename VectorOf<kLanes>::Floats;
    unsigned found = 0;
#pragma GCC unroll 4
    for (int b = 0; b < kBranches; b += kLanes) {
      Floats level, old;
      std::memcpy(&level, turned + state * kBranches + b, sizeof level);
      if constexpr (kStates <= kBranches) {
        const int first = b * kStates >> kBits;
        typename VectorOf<kLanes>::Ints from;
        for (int i = 0; i < kLanes; ++i) from[i] = ((b + i) * kStates >> kBits) % kLanes;
        std::memcpy(&old, before + first / kLanes * kLanes, sizeof old);
        old = __builtin_shuffle(old, from);
      } else {
        for (int i = 0; i < kLanes; ++i) old[i] = before[((b + i) * kStates >> kBits) + (state >> kBits)];
      }
      found |= equal(old + error(target - level, weight), Floats{} + cost) << b;
    }
    return std::countr_zero(found) * kStates + state;
  }

  // The first state of the least cost.
  static int cheapest(const float* cost) {
    constexpr int kLanes = std::min(kStates, kWide);
    using Floats = typename VectorOf<kLanes>::Floats;
    Floats least;
    std::memcpy(&least, cost, sizeof least);
    const auto take = [&](Floats other) { least = other < least ? other : least; };
    for (int s = kLanes; s < kStates; s += kLanes) {
      Floats more;
      std::memcpy(&more, cost + s, sizeof more);
      take(more);
    }
#pragma GCC unroll 4
    for (int apart = kLanes / 2; apart > 0; apart /= 2) {
      typename VectorOf<kLanes>::Ints partner;
      for (int i = 0; i < kLanes; ++i) partner[i] = i ^ apart;
      take(__builtin_shuffle(least, partner));
    }
    for (int first = 0; first < kStates; first += kLanes) {
      Floats some;
      std::memcpy(&some, cost + first, sizeof some);
      if (const unsigned found = equal(some, least); found != 0) return first + std::countr_zero(found);
    }
    return 0;  // of costs that are no numbers
  }
#else
  static void step(const float* levels, float target, float weight, const float* before, float* cost) {
    std::fill_n(cost, kStates, std::numeric_limits<float>::infinity());
    for (int b = 0; b < kBranches; ++b) {
      for (int s = 0; s < kStates; ++s) {
        const int w = b * kStates + s;
        cost[s] = std::min(cost[s], before[w >> kBits] + error(target - levels[w], weight));
      }
    }
  }

  static int window_to(int state, const float* turned, float target, float weight, const float* before, float cost) {
    int first = 0;
    for (int b = kBranches; b-- > 0;) {
      const float reached = before[(b * kStates + state) >> kBits] + error(target - turned[state * kBranches + b], weight);
      first = reached == cost ? b : first;
    }
    return first * kStates + state;
  }

  static int cheapest(const float* cost) { return static_cast<int>(std::min_element(cost, cost + kStates) - cost); }
#endif

  // The windows whose levels come nearest to the targets of a channel's chains, errors weighed: from state 0 over all states
  // (Viterbi). Of equal paths the one through the smaller window. The chains go side by side: none waits for its own steps.
  // Costs alone are kept; which windows led to them is found on the way back, for the best path's states.
  static void best_windows(const float* levels, const float* turned, const float (*targets)[kChainTokens],
                           const float (*weights)[kChainTokens], uint8_t (*windows)[kChainTokens]) {
    alignas(64) float costs[kChainTokens + 1][kChains][kStates];
    for (float(&cost)[kStates] : costs[0]) {
      std::fill_n(cost, kStates, std::numeric_limits<float>::max());
      cost[0] = 0.0f;
    }
    for (int i = 0; i < kChainTokens; ++i) {
      for (int c = 0; c < kChains; ++c) step(levels, targets[c][i], weights[c][i], costs[i][c], costs[i + 1][c]);
    }
    int state[kChains];
    for (int c = 0; c < kChains; ++c) state[c] = cheapest(costs[kChainTokens][c]);
    for (int i = kChainTokens; i-- > 0;) {
      for (int c = 0; c < kChains; ++c) {
        const int window = window_to(state[c], turned, targets[c][i], weights[c][i], costs[i][c], costs[i + 1][c][state[c]]);
        windows[c][i] = static_cast<uint8_t>(window);
        state[c] = window >> kBits;
      }
    }
  }
};

// TileEncoder::encode.
inline void encode_trellis(const CodecSpec& spec, const TileShape& shape, const uint16_t* x, const float* feedback,
                           std::byte* out) {
  with_trellis_bits(spec.bits, [&](auto bits) {
    if (shape.side == Side::kKey) {
      TrellisEncoder<bits(), Side::kKey>::encode(spec, shape, x, feedback, out);
    } else {
      TrellisEncoder<bits(), Side::kValue>::encode(spec, shape, x, feedback, out);
    }
  });
}

}  // namespace
}  // namespace kvmix
