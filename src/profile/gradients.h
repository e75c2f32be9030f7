// One forward and backward pass of a prompt, layer by layer: of activations only what enters each layer is kept, and a layer's
// own are computed again when the gradient reaches it.
#pragma once

#include <functional>
#include <span>
#include <string>
#include <vector>

#include "kvmix/engine.h"
#include "kvmix/plan.h"

namespace kvmix {

class GgufModel;

// What a layer's attention read and gave.
struct LayerRows {
  std::vector<float> queries, keys, values;  // [head][n][head_dim], queries and keys after RoPE
  std::vector<float> output_gradient;        // [n][q_heads * head_dim], of the summed loss at the output of attention
};

struct PassOptions {
  std::string device = "cpu";  // or "cuda"
  int threads = 1;
  // Called for every layer, the last one first.
  std::function<void(size_t layer, LayerRows rows)> rows;
  // May throw to stop.
  std::function<void(double done, double total, const char* stage)> progress;
};

struct PassResult {
  double loss = 0;                           // mean next-token cross-entropy
  std::vector<double> key_norm, value_norm;  // || dL/dW_k ||, || dL/dW_v || per layer
};

// Loss and gradients of one prompt (KVmix b.1). Memory beside the model: model_dim floats per token and layer, and the work of
// one layer.
PassResult differentiate(const GgufModel& model, std::span<const Token> prompt, const PassOptions& options);

// Throws kMismatch for another model's profile.
void check_same_model(const Profile& profile, const ModelShape& shape);
// The pass of one more prompt, of so many tokens, into a profile's gradient scores.
void add_scores(const PassResult& pass, size_t tokens, Profile& profile);

}  // namespace kvmix
