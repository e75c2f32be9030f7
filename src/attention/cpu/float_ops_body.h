// FloatOps over vectors as base/simd_avx2.h has them: V of kWidth floats (4, 8 or 16), zero, set1, load, store, fma,
// reduce_add. Internal linkage: included once per instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention/cpu/float_ops.h"

namespace kvmix {
namespace {

// kTokens tokens by kVectors vectors of channels at a time stay in registers while all latents go by.
template <typename Simd, int kTokens, int kVectors>
void multiply_block(const float* rows, int count, const float* up, int dim, float* out) {
  typename Simd::V sums[kTokens][kVectors];
  for (auto& token : sums) {
    for (auto& sum : token) sum = Simd::zero();
  }
  for (int i = 0; i < count; ++i, up += dim) {
    typename Simd::V u[kVectors];
    for (int v = 0; v < kVectors; ++v) u[v] = Simd::load(up + v * Simd::kWidth);
    for (int t = 0; t < kTokens; ++t) {
      const typename Simd::V z = Simd::set1(rows[t * count + i]);
      for (int v = 0; v < kVectors; ++v) sums[t][v] = Simd::fma(z, u[v], sums[t][v]);
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int v = 0; v < kVectors; ++v) Simd::store(out + t * dim + v * Simd::kWidth, sums[t][v]);
  }
}

template <typename Simd>
void multiply(const float* rows, int n, int count, const float* up, int dim, float* out) {
  // As many as there are registers for: 32 where vectors are of 16, else 16.
  constexpr int kTokens = Simd::kWidth == 16 ? 8 : 6, kVectors = 2, kChannels = kVectors * Simd::kWidth;
  const auto blocks = [&](auto tokens) {
    int c = 0;
    for (; c + kChannels <= dim; c += kChannels)
      multiply_block<Simd, decltype(tokens)::value, kVectors>(rows, count, up + c, dim, out + c);
    for (; c < dim; c += Simd::kWidth) multiply_block<Simd, decltype(tokens)::value, 1>(rows, count, up + c, dim, out + c);
    rows += decltype(tokens)::value * count;
    out += decltype(tokens)::value * dim;
  };
  for (; n >= kTokens; n -= kTokens) blocks(std::integral_constant<int, kTokens>{});
  for (; n >= kTokens / 2; n -= kTokens / 2) blocks(std::integral_constant<int, kTokens / 2>{});
  for (; n > 0; --n) blocks(std::integral_constant<int, 1>{});
}

template <typename Simd>
void dots(const float* query, const float* keys, int n, int dim, float* out) {
  for (int t = 0; t < n; ++t, keys += dim) {
    typename Simd::V a = Simd::zero(), b = Simd::zero();
    int c = 0;
    for (; c + 2 * Simd::kWidth <= dim; c += 2 * Simd::kWidth) {
      a = Simd::fma(Simd::load(query + c), Simd::load(keys + c), a);
      b = Simd::fma(Simd::load(query + c + Simd::kWidth), Simd::load(keys + c + Simd::kWidth), b);
    }
    for (; c < dim; c += Simd::kWidth) a = Simd::fma(Simd::load(query + c), Simd::load(keys + c), a);
    out[t] = Simd::reduce_add(a) + Simd::reduce_add(b);
  }
}

template <typename Simd>
void add(const float* weights, const float* rows, int n, int width, float* acc) {
  constexpr int kVectors = 4;
  int c = 0;
  for (; c + kVectors * Simd::kWidth <= width; c += kVectors * Simd::kWidth) {
    typename Simd::V sums[kVectors];
    for (int v = 0; v < kVectors; ++v) sums[v] = Simd::load(acc + c + v * Simd::kWidth);
    for (int t = 0; t < n; ++t) {
      const typename Simd::V w = Simd::set1(weights[t]);
      const float* row = rows + static_cast<ptrdiff_t>(t) * width + c;
      for (int v = 0; v < kVectors; ++v) sums[v] = Simd::fma(w, Simd::load(row + v * Simd::kWidth), sums[v]);
    }
    for (int v = 0; v < kVectors; ++v) Simd::store(acc + c + v * Simd::kWidth, sums[v]);
  }
  for (int t = 0; t < n; ++t) {
    for (int i = c; i < width; ++i) acc[i] += weights[t] * rows[static_cast<ptrdiff_t>(t) * width + i];
  }
}

// The weights of a softmax over x scale, kWidth at a time; what is left over is filled up.
template <typename Simd>
void weigh(float* x, size_t n, float scale, float softcap) {
  using V = typename Simd::V;
  constexpr size_t kWidth = Simd::kWidth;
  constexpr float kLog2e = 1.44269504f;
  const auto each = [&](float fill, const auto& change) {
    size_t i = 0;
    for (; i + kWidth <= n; i += kWidth) change(x + i);
    if (i == n) return;
    alignas(64) float rest[kWidth];
    std::fill(std::copy(x + i, x + n, rest), rest + kWidth, fill);
    change(rest);
    std::copy_n(rest, n - i, x + i);
  };
  float most = -std::numeric_limits<float>::infinity();
  for (size_t i = 0; softcap > 0 && i < n; ++i) x[i] = softcap * std::tanh(x[i] * scale / softcap);
  const V by = Simd::set1(softcap > 0 ? 1.0f : scale);
  V highest = Simd::set1(most);
  each(most, [&](float* at) {
    const V scaled = Simd::mul(Simd::load(at), by);
    Simd::store(at, scaled);
    highest = Simd::max(scaled, highest);
  });
  most = Simd::reduce_max(highest);
  const V reference = Simd::set1(most), log2e = Simd::set1(kLog2e);
  V sum = Simd::zero();
  each(-std::numeric_limits<float>::infinity(), [&](float* at) {
    const V weight = Simd::exp2(Simd::mul(Simd::sub(Simd::load(at), reference), log2e));
    Simd::store(at, weight);
    sum = Simd::add(sum, weight);
  });
  const V part = Simd::set1(1.0f / Simd::reduce_add(sum));
  each(0.0f, [&](float* at) { Simd::store(at, Simd::mul(Simd::load(at), part)); });
}

template <typename Simd>
constexpr FloatOps ops(const char* name, bool (*available)(), decltype(FloatOps::weigh) weighs = weigh<Simd>) {
  return {name, available, multiply<Simd>, dots<Simd>, weighs, add<Simd>};
}

}  // namespace
}  // namespace kvmix
