// The device "cuda" in builds without it.
#include "backend/cuda/device.h"
#include "engine/runner.h"

namespace kvmix {

std::unique_ptr<Runner> make_cuda_runner(const GgufModel&) {
  cuda::check_device();  // says so
  return nullptr;
}

GgmlBackend make_cuda_backend() {
  cuda::check_device();
  return nullptr;
}

}  // namespace kvmix
