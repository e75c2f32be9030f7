#include "backend/cuda/device.h"

#ifdef KVMIX_CUDA
#include <cuda_runtime.h>

#include "attention/cuda/shape.h"
#include "codec/cuda/format.h"
#else
#include "backend/backend.h"
#endif

#include "kvmix/cache.h"
#include "kvmix/error.h"

namespace kvmix {
namespace cuda {

#ifdef KVMIX_CUDA
void check_device() {
  int devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  if (status == cudaSuccess && devices > 0) return;
  static_cast<void>(cudaGetLastError());  // it is said here
  std::string what = "the CUDA runtime says \"" + std::string(cudaGetErrorString(status)) + "\"";
  if (status == cudaErrorInsufficientDriver) {
    what = "there is no NVIDIA driver, or one too old for CUDA " + std::to_string(CUDART_VERSION / 1000) + "." +
           std::to_string(CUDART_VERSION % 1000 / 10);
  } else if (status == cudaErrorNoDevice || devices == 0) {
    what = "this machine shows no GPU";
  }
  throw Error(Status::kUnsupported,
              "device \"cuda\": " + what + "; run on a machine with an NVIDIA GPU and its driver, or take the device \"cpu\"");
}
#else
void check_device() {
  throw Error(Status::kUnsupported,
              "device \"cuda\": this build has no CUDA; configure with -DKVMIX_CUDA=ON, or take the device \"cpu\"");
}
#endif

}  // namespace cuda

DeviceSpace cuda_space() {
  cuda::check_device();
  DeviceSpace space{};
#ifdef KVMIX_CUDA
  if (const cudaError_t status = cudaMemGetInfo(&space.free_bytes, &space.total_bytes); status != cudaSuccess)
    throw Error(Status::kUnsupported,
                std::string("device \"cuda\": its memory cannot be asked: ") + cudaGetErrorString(status));
#endif
  return space;
}

#ifdef KVMIX_CUDA
CudaSupport cuda_support() {
  return {KVMIX_CUDA_ARCHITECTURES, cuda::Widths::text(), cuda::Groups::text(), cuda::HeadDims::text(),
          cuda::TrellisBits::text()};
}

std::vector<CudaDevice> cuda_devices() {
  cuda::check_device();
  const auto check = [](cudaError_t status) {
    if (status != cudaSuccess)
      throw Error(Status::kUnsupported,
                  std::string("device \"cuda\": the GPUs cannot be asked: ") + cudaGetErrorString(status));
  };
  int count = 0, current = 0;
  check(cudaGetDeviceCount(&count));
  check(cudaGetDevice(&current));
  std::vector<CudaDevice> devices;
  for (int d = 0; d < count; ++d) {
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, d));
    check(cudaSetDevice(d));
    CudaDevice& device = devices.emplace_back();
    device.name = properties.name;
    device.capability = properties.major * 10 + properties.minor;
    device.total_bytes = properties.totalGlobalMem;
    device.prefill_kernel = cuda::has_prefill_kernel();
    cuda::HeadDims::each([&](int dim) {
      if (cuda::page_shared_bytes(dim) <= cuda::most_shared_bytes()) device.head_dims.push_back(dim);
    });
  }
  check(cudaSetDevice(current));
  return devices;
}
#else
CudaSupport cuda_support() {
  cuda::check_device();
  return {};
}

std::vector<CudaDevice> cuda_devices() {
  cuda::check_device();
  return {};
}
#endif

#ifndef KVMIX_CUDA
std::unique_ptr<Backend> make_cuda_backend(const CacheConfig&, const FormatTable&, std::vector<LayerFormats>, const Backend*) {
  cuda::check_device();
  return nullptr;
}
#endif

}  // namespace kvmix
