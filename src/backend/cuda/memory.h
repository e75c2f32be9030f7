// Device and pinned memory that grows, and the inputs of a step: what the host decides, on the device by one copy.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace kvmix::cuda {

class DeviceMemory {
 public:
  DeviceMemory() = default;
  DeviceMemory(DeviceMemory&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~DeviceMemory() { static_cast<void>(cudaFree(data_)); }
  // What was there is lost, unless it is as large already. True where it is new. Throws kOutOfMemory naming `what`, and is
  // empty then.
  bool reserve(size_t bytes, const char* what);
  std::byte* data() const { return static_cast<std::byte*>(data_); }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// Of the host, so that copies to and from the device need not stop at it.
class PinnedMemory {
 public:
  PinnedMemory() = default;
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;
  ~PinnedMemory() { static_cast<void>(cudaFreeHost(data_)); }
  // As DeviceMemory's.
  bool reserve(size_t bytes, const char* what);
  template <class T>
  T* data() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// Two buffers of pinned memory take turns, so that a step is written down while the copy of the one before may be waiting.
class StepInputs {
 public:
  StepInputs() = default;
  StepInputs(const StepInputs&) = delete;
  StepInputs& operator=(const StepInputs&) = delete;
  ~StepInputs();
  // Room for a step on both sides; what the host's holds is what the step before the last wrote.
  std::byte* begin(size_t bytes);
  void upload(size_t bytes, cudaStream_t stream);
  std::byte* device() const { return device_.data(); }
  size_t bytes() const { return device_.bytes(); }

 private:
  struct Half {
    PinnedMemory memory;
    cudaEvent_t copied = nullptr;
    bool waiting = false;
  };
  Half halves_[2];
  int turn_ = 0;
  DeviceMemory device_;
};

// An array of ids on the device. Whole rows are written down in pinned memory and copied; single ids, which that memory does
// not hear of, a kernel may change.
class PageTables {
 public:
  PageTables() = default;
  PageTables(const PageTables&) = delete;
  PageTables& operator=(const PageTables&) = delete;
  ~PageTables();

  int64_t stride = 0;               // ids of a head
  std::vector<uint64_t> revisions;  // of the sequence in each row; 0: none
  // All rows are unknown afterwards, unless there is room already.
  void reserve(size_t rows, size_t ids_of_row, int64_t ids_of_head);
  // To be called before ids of rows that were copied are written.
  void wait();
  int32_t* host(size_t at) { return host_.data<int32_t>() + at; }
  int32_t* device(size_t at) const { return reinterpret_cast<int32_t*>(device_.data()) + at; }
  // `ids` from `at` on, and as many in `times` places in all, `step` ids apart.
  void copy(size_t at, size_t ids, size_t times, size_t step, cudaStream_t stream);
  size_t rows() const { return rows_; }
  size_t bytes() const { return device_.bytes(); }

 private:
  size_t rows_ = 0;
  PinnedMemory host_;
  DeviceMemory device_;
  cudaEvent_t copied_ = nullptr;
  bool waiting_ = false;
};

}  // namespace kvmix::cuda
