// LatentOps over a vector type V: kWidth floats (4, 8 or 16), zero, set, load, store, fused or plain multiply-add, sum.
// Internal linkage: included once per instruction set.
#pragma once

#include "attention/cpu/latent_ops.h"

namespace kvmix {
namespace {

// kTokens tokens by kVectors vectors of channels at a time stay in registers while all latents go by.
template <typename V, int kTokens, int kVectors>
void rebuild_block(const float* rows, int count, const float* up, int dim, float* out) {
  typename V::Type sums[kTokens][kVectors];
  for (auto& token : sums) {
    for (auto& sum : token) sum = V::zero();
  }
  for (int i = 0; i < count; ++i, up += dim) {
    typename V::Type u[kVectors];
    for (int v = 0; v < kVectors; ++v) u[v] = V::load(up + v * V::kWidth);
    for (int t = 0; t < kTokens; ++t) {
      const typename V::Type z = V::set(rows[t * count + i]);
      for (int v = 0; v < kVectors; ++v) sums[t][v] = V::add_product(z, u[v], sums[t][v]);
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int v = 0; v < kVectors; ++v) V::store(out + t * dim + v * V::kWidth, sums[t][v]);
  }
}

template <typename V>
void rebuild(const float* rows, int n, int count, const float* up, int dim, float* out) {
  constexpr int kTokens = 4, kVectors = 2, kChannels = kVectors * V::kWidth;
  const auto blocks = [&](auto tokens) {
    int c = 0;
    for (; c + kChannels <= dim; c += kChannels)
      rebuild_block<V, decltype(tokens)::value, kVectors>(rows, count, up + c, dim, out + c);
    for (; c < dim; c += V::kWidth) rebuild_block<V, decltype(tokens)::value, 1>(rows, count, up + c, dim, out + c);
    rows += decltype(tokens)::value * count;
    out += decltype(tokens)::value * dim;
  };
  for (; n >= kTokens; n -= kTokens) blocks(std::integral_constant<int, kTokens>{});
  for (; n > 0; --n) blocks(std::integral_constant<int, 1>{});
}

template <typename V>
void dots(const float* query, const float* keys, int n, int dim, float* out) {
  for (int t = 0; t < n; ++t, keys += dim) {
    typename V::Type a = V::zero(), b = V::zero();
    int c = 0;
    for (; c + 2 * V::kWidth <= dim; c += 2 * V::kWidth) {
      a = V::add_product(V::load(query + c), V::load(keys + c), a);
      b = V::add_product(V::load(query + c + V::kWidth), V::load(keys + c + V::kWidth), b);
    }
    for (; c < dim; c += V::kWidth) a = V::add_product(V::load(query + c), V::load(keys + c), a);
    out[t] = V::sum(a) + V::sum(b);
  }
}

template <typename V>
void add(const float* weights, const float* rows, int n, int width, float* acc) {
  constexpr int kVectors = 4;
  int c = 0;
  for (; c + kVectors * V::kWidth <= width; c += kVectors * V::kWidth) {
    typename V::Type sums[kVectors];
    for (int v = 0; v < kVectors; ++v) sums[v] = V::load(acc + c + v * V::kWidth);
    for (int t = 0; t < n; ++t) {
      const typename V::Type w = V::set(weights[t]);
      const float* row = rows + static_cast<ptrdiff_t>(t) * width + c;
      for (int v = 0; v < kVectors; ++v) sums[v] = V::add_product(w, V::load(row + v * V::kWidth), sums[v]);
    }
    for (int v = 0; v < kVectors; ++v) V::store(acc + c + v * V::kWidth, sums[v]);
  }
  for (int t = 0; t < n; ++t) {
    for (int i = c; i < width; ++i) acc[i] += weights[t] * rows[static_cast<ptrdiff_t>(t) * width + i];
  }
}

template <typename V>
constexpr LatentOps ops(const char* name, bool (*available)()) {
  return {name, available, rebuild<V>, dots<V>, add<V>};
}

}  // namespace
}  // namespace kvmix
