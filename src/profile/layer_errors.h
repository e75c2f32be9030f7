// What a codec does to one layer's attention output, and what that costs by the gradients of one pass.
#pragma once

#include <cstdint>
#include <vector>

#include "kvmix/cache.h"
#include "profile/gradients.h"

namespace kvmix {

struct CodecErrors {
  double output = 0;  // squared error of the attention output, relative to the output's energy
  // Second-order loss in nats per token: half the mean of (output gradient . output error)^2, heads together, over pairs of a
  // query and a token near it that the gradient is taken of. A query's own gradient alone is one draw, and noisy; those of the
  // whole text lose that errors and gradients are large in the same places.
  double fisher = 0;
};

// One layer of one pass with nothing quantised. Attention is computed for queries spread over the second half; each reads rows
// from sealed pages where the running cache would.
class LayerErrors {
 public:
  // `layer` has the sinks and window of the running cache. Keeps both references.
  LayerErrors(const LayerConfig& layer, const PassResult& pass, size_t index);
  // Of this side quantised alone. From several threads at once.
  CodecErrors of(const SideConfig& config, Side side) const;

 private:
  std::vector<float> stored_rows(const SideConfig& config, Side side) const;
  std::vector<float> outputs(const float* keys, const float* values) const;

  const LayerConfig& layer_;
  const std::vector<float>&queries_, &keys_, &values_, &gradient_;
  int64_t n_;
  int width_;  // of the attention output, q_heads * head_dim
  std::vector<int64_t> sampled_;
  std::vector<float> exact_;
  double energy_ = 1e-30;
};

}  // namespace kvmix
