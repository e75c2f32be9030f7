// A model's weights in device memory, shared by the engines of a model.
#pragma once

#include <memory>

#include "engine/model.h"

namespace kvmix::cuda {

class DeviceWeights {
 public:
  // Of the current device. Throws kOutOfMemory naming what is needed and free.
  explicit DeviceWeights(const GgufModel& model);
  const Weights& weights() const { return weights_; }
  // Those of the engines that live, or new ones.
  static std::shared_ptr<const DeviceWeights> of(const GgufModel& model);

 private:
  GgmlContext tensors_;
  BackendBuffer buffer_;
  Weights weights_;
};

}  // namespace kvmix::cuda
