#include "engine/cuda/device_weights.h"

#include <cuda_runtime.h>
#include <ggml-alloc.h>
#include <ggml-cuda.h>

#include "base/cuda/launch.h"
#include "engine/library_call.h"
#include "kvmix/error.h"

namespace kvmix::cuda {

DeviceWeights::DeviceWeights(const GgufModel& model) {
  const LibraryCall call;
  const auto& stored = model.stored_weights().all();
  tensors_.reset(ggml_init({(stored.size() + 1) * ggml_tensor_overhead(), nullptr, true}));
  for (const auto& [name, tensor] : stored) {
    ggml_tensor* copy = ggml_dup_tensor(tensors_.get(), tensor);
    ggml_set_name(copy, name.c_str());
    weights_.add(name, copy);
  }
  buffer_.reset(ggml_backend_alloc_ctx_tensors_from_buft(tensors_.get(), ggml_backend_cuda_buffer_type(current_device())));
  if (buffer_ == nullptr) {
    size_t free = 0, total = 0;
    check_cuda(cudaMemGetInfo(&free, &total), "device memory");
    throw Error(Status::kOutOfMemory, model.path() + ": its weights take " + std::to_string(model.weight_bytes() >> 20) +
                                          " MiB and the GPU has " + std::to_string(free >> 20) +
                                          " MiB free; take a smaller or more quantised model, or the device \"cpu\"");
  }
  ggml_backend_buffer_set_usage(buffer_.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
  for (const auto& [name, tensor] : stored) {
    ggml_backend_tensor_set(weights_.get(name), tensor->data, 0, ggml_nbytes(tensor));
  }
}

std::shared_ptr<const DeviceWeights> DeviceWeights::of(const GgufModel& model) {
  return std::static_pointer_cast<const DeviceWeights>(
      model.shared_on_device([&]() -> std::shared_ptr<void> { return std::make_shared<DeviceWeights>(model); }));
}

}  // namespace kvmix::cuda
