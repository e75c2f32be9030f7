// Splitting work over threads: a caller's team, or one made for the purpose.
#pragma once

#include <atomic>
#include <cstddef>
#include <thread>
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

// Runs work(i) once for every i in [0, n) on `threads` threads, the caller's among them. `work` must not throw.
template <class Work>
void parallel_for(int threads, size_t n, const Work& work) {
  std::atomic<size_t> next{0};
  const auto member = [&] {
    for (size_t i = next++; i < n; i = next++) work(i);
  };
  std::vector<std::thread> team;
  for (int t = 1; t < threads; ++t) team.emplace_back(member);
  member();
  for (std::thread& t : team) t.join();
}

}  // namespace kvmix
