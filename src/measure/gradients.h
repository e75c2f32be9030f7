// One forward and backward pass of a prompt.
#pragma once

#include <functional>

#include "measure/backward.h"

namespace kvmix {

struct PassOptions {
  int threads = 1;
  bool later = false;  // gradients at cached rows from queries in later pages
  int sinks = 16;      // where pages start
};

struct PassResult {
  double loss = 0;                           // mean next-token cross-entropy
  std::vector<double> key_norm, value_norm;  // || dL/dW_k ||, || dL/dW_v || per layer
  // [layer][kv_head * n * head_dim + t * head_dim + c]; only with `later`. Gradients are of the summed loss.
  std::vector<std::vector<float>> keys, values, key_gradient, value_gradient;
  std::vector<std::vector<float>> queries;  // [layer][q_head * n * head_dim + ...]; only with `later`
};

// Loss and gradients of one prompt (KVmix b.1).
PassResult differentiate(const GgufModel& model, const TransposedWeights& weights, std::span<const Token> prompt,
                         const PassOptions& options);

}  // namespace kvmix
