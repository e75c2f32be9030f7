// Memory of a device that a cache can be on, as an engine would have it.
#pragma once

#include <cstddef>
#include <new>
#include <string>
#include <utility>

#include "support/aligned_bytes.h"
#ifdef KVMIX_CUDA
#include <cuda_runtime.h>
#endif

namespace kvmix::testing {

class DeviceBytes {
 public:
  DeviceBytes(const std::string& device, size_t bytes, std::byte fill) : host_(device == "cpu" ? bytes : 0, fill) {
#ifdef KVMIX_CUDA
    if (device == "cuda" &&
        (cudaMalloc(&device_, bytes) != cudaSuccess || cudaMemset(device_, static_cast<int>(fill), bytes) != cudaSuccess))
      throw std::bad_alloc();
#endif
  }
  DeviceBytes(DeviceBytes&& other) noexcept : host_(std::move(other.host_)), device_(std::exchange(other.device_, nullptr)) {}
  DeviceBytes& operator=(DeviceBytes&&) = delete;
  ~DeviceBytes() {
#ifdef KVMIX_CUDA
    static_cast<void>(cudaFree(device_));
#endif
  }
  std::byte* data() { return device_ == nullptr ? host_.data() : static_cast<std::byte*>(device_); }

 private:
  AlignedBytes host_;
  void* device_ = nullptr;
};

}  // namespace kvmix::testing
