// What the benchmarks share: cold memory, the machine's read bandwidth, a team of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <random>
#include <thread>
#include <vector>

namespace kvmix::bench {

inline double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

inline std::vector<float> gaussian(size_t n) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> x(n);
  for (float& v : x) v = normal(random);
  return x;
}

// Threads that run a function with (ith, nth) together, spinning between calls as a graph's thread pool does.
class Team {
 public:
  explicit Team(int threads) : threads_(threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
  }
  ~Team() {
    stop_ = true;
    start_.fetch_add(1);
    for (std::thread& w : workers_) w.join();
  }
  int size() const { return threads_; }
  void run(const std::function<void(int ith, int nth)>& job) {
    job_ = &job;
    done_ = 0;
    start_.fetch_add(1);
    job(0, threads_);
    while (done_.load() != threads_ - 1) {
    }
  }

 private:
  void work(int i) {
    for (int seen = 0;;) {
      while (start_.load() == seen) {
      }
      ++seen;
      if (stop_) return;
      (*job_)(i, threads_);
      done_.fetch_add(1);
    }
  }
  int threads_;
  std::atomic<int> start_{0}, done_{0};
  std::atomic<bool> stop_{false};
  const std::function<void(int, int)>* job_ = nullptr;
  std::vector<std::thread> workers_;
};

// 128 MB that are read between measurements, so that what is measured comes from DRAM, as it does between a model's weights.
class Eviction {
 public:
  Eviction() : data_(size_t{128} << 17, 1) {}
  void read(Team& team) {
    team.run([this](int ith, int nth) {
      uint64_t sums[8] = {};
      const size_t begin = data_.size() / 64 * static_cast<size_t>(ith) / static_cast<size_t>(nth) * 64;
      const size_t end = data_.size() / 64 * static_cast<size_t>(ith + 1) / static_cast<size_t>(nth) * 64;
      for (size_t i = begin; i < end; i += 8) {
        for (size_t k = 0; k < 8; ++k) sums[k] += data_[i + k];
      }
      for (const uint64_t s : sums) sink_.fetch_add(s, std::memory_order_relaxed);
    });
  }
  size_t bytes() const { return data_.size() * sizeof(uint64_t); }

 private:
  std::vector<uint64_t> data_;
  std::atomic<uint64_t> sink_{0};
};

// Best of several plain reads, bytes per second.
inline double read_bandwidth(Team& team) {
  Eviction memory;
  double best = 0;
  for (int i = 0; i < 8; ++i) {
    const double start = now();
    memory.read(team);
    best = std::max(best, static_cast<double>(memory.bytes()) / (now() - start));
  }
  return best;
}

}  // namespace kvmix::bench
