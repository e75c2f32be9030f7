// Kullback-Leibler divergence by its definition, for comparisons of logits.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>

namespace kvmix::testing {

// In nats, of softmax(q) from softmax(p).
inline double divergence(std::span<const float> p, std::span<const float> q) {
  const auto log_sum = [](std::span<const float> x) {
    const float top = *std::max_element(x.begin(), x.end());
    double total = 0;
    for (const float v : x) total += std::exp(static_cast<double>(v - top));
    return static_cast<double>(top) + std::log(total);
  };
  const double lp = log_sum(p), lq = log_sum(q);
  double kl = 0;
  for (size_t i = 0; i < p.size(); ++i) {
    const double a = static_cast<double>(p[i]) - lp, b = static_cast<double>(q[i]) - lq;
    kl += std::exp(a) * (a - b);
  }
  return kl;
}

}  // namespace kvmix::testing
