#pragma once

#include <numeric>
#include <span>

namespace kvmix {

inline double mean(std::span<const double> x) {
  return std::accumulate(x.begin(), x.end(), 0.0) / static_cast<double>(x.size());
}

}  // namespace kvmix
