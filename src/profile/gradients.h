// One forward and backward pass of a prompt.
#pragma once

#include <functional>

#include "kvmix/plan.h"
#include "profile/backward.h"

namespace kvmix {

struct PassOptions {
  int threads = 1;
  bool rows = false;  // also what attention read and gave, and the gradients at its output
};

struct PassResult {
  double loss = 0;                           // mean next-token cross-entropy
  std::vector<double> key_norm, value_norm;  // || dL/dW_k ||, || dL/dW_v || per layer
  // Only with `rows`: [layer], each [head][n][head_dim]; keys and queries after RoPE.
  std::vector<std::vector<float>> queries, keys, values;
  // Only with `rows`: [layer], each [n][q_heads * head_dim], of the summed loss at the output of attention.
  std::vector<std::vector<float>> output_gradient;
};

// Loss and gradients of one prompt (KVmix b.1).
PassResult differentiate(const GgufModel& model, const TransposedWeights& weights, std::span<const Token> prompt,
                         const PassOptions& options);

// The pass of one more prompt, of so many tokens, into a profile's gradient scores.
void add_scores(const PassResult& pass, size_t tokens, Profile& profile);

}  // namespace kvmix
