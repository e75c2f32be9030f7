// Host side of launches: checked calls of the CUDA runtime.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "kvmix/error.h"

namespace kvmix::cuda {

// Throws kInternal with what failed.
inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw Error(Status::kInternal, std::string(what) + ": " + cudaGetErrorString(status) + " (cudaError " +
                                     std::to_string(static_cast<int>(status)) + ")");
}

inline int current_device() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "device");
  return device;
}

// Of the current device.
inline int device_attribute(cudaDeviceAttr which) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, current_device()), "device");
  return value;
}

// Lets a kernel use `shared` bytes of dynamic shared memory; `what` names the caller in an error.
template <class Kernel>
void allow_shared(Kernel* kernel, int shared, const char* what) {
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), what);
}

// Launches a kernel of one argument. With `overlapped` it may begin before the launch before it has ended, where the device can
// (base/cuda/overlap.cuh).
template <class Argument>
void launch_overlapped(bool overlapped, void (*kernel)(Argument), dim3 grid, unsigned threads, size_t shared,
                       cudaStream_t stream, const Argument& argument, const char* what) {
  constexpr int kOverlaps = 9;  // compute capability
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared, config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlapped && device_attribute(cudaDevAttrComputeCapabilityMajor) >= kOverlaps ? 1 : 0;
  void* arguments[] = {const_cast<Argument*>(&argument)};
  check_cuda(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments), what);
}

// Blocks of a kernel that one multiprocessor holds.
template <class Kernel>
int blocks_on_processor(Kernel* kernel, int threads, int shared) {
  int blocks = 0;
  allow_shared(kernel, shared, "cut: shared memory");
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, static_cast<size_t>(shared)),
             "cut: occupancy");
  return blocks;
}

}  // namespace kvmix::cuda
