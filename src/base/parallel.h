// Splitting work over the threads of a caller's team.
#pragma once

#include <atomic>
#include <cstddef>
#include <vector>

namespace kvmix {

// A vector of atomics that can grow between parallel phases (std::atomic does not move).
class AtomicCounters {
 public:
  void reset(size_t n, int value) {
    if (n > counters_.size()) counters_ = std::vector<std::atomic<int>>(n + n / 2);
    for (size_t i = 0; i < n; ++i) counters_[i].store(value, std::memory_order_relaxed);
  }
  std::atomic<int>& operator[](size_t i) { return counters_[i]; }

 private:
  std::vector<std::atomic<int>> counters_;
};

}  // namespace kvmix
