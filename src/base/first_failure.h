// The first exception of threads that work together: their work must not throw, as every one must come to its barriers.
#pragma once

#include <atomic>
#include <exception>
#include <mutex>

namespace kvmix {

class FirstFailure {
 public:
  // Runs body() and keeps what it throws, unless something was thrown before.
  template <class Body>
  void guard(const Body& body) {
    try {
      body();
    } catch (...) {
      const std::lock_guard lock(mutex_);
      if (!first_) first_ = std::current_exception();
      failed_ = true;
    }
  }
  bool failed() const { return failed_; }

  // For one thread, with no other at work.
  void rethrow() const {
    if (first_) std::rethrow_exception(first_);
  }
  void clear() {
    first_ = nullptr;
    failed_ = false;
  }

 private:
  std::mutex mutex_;
  std::exception_ptr first_;
  std::atomic<bool> failed_{false};
};

}  // namespace kvmix
