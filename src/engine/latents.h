// What a plan with ranks makes of a model's layers: factors cut to its ranks, as the cache and the step's graph take them.
#pragma once

#include <memory>
#include <vector>

#include "engine/model.h"

namespace kvmix {

struct LayerLatents {
  std::shared_ptr<const LatentFactors> factors;
  std::vector<float> key_down, value_down;  // [rank][model_dim]
};

// Empty for a plan without ranks. Reads the plan's factors file and throws kMismatch for another file, ranks that it does not
// hold or, not `forced`, another model.
std::vector<LayerLatents> load_latents(const GgufModel& model, const Plan& plan, bool forced);

// The layer's projection as it acts, [kv_heads * head_dim][model_dim], without bias; its bias, or empty.
std::vector<float> projection_weights(const GgufModel& model, size_t layer, Side side);
std::vector<float> projection_bias(const GgufModel& model, size_t layer, Side side);

}  // namespace kvmix
