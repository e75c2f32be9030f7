// One forward and backward pass of a prompt, layer by layer: of activations only what enters each layer is kept, and a layer's
// own are computed again when the gradient reaches it.
#pragma once

#include <functional>
#include <span>
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
  int threads = 1;
  // Where they are given, the loss is that of the tokens at these positions alone, and each by its log-odds, log (1 - p) / p:
  // its gradient stays alive where the model is sure.
  std::span<const int64_t> answers = {};
  // Called for every layer, the last one first.
  std::function<void(size_t layer, const LayerRows& rows)> rows;
  // May throw to stop.
  std::function<void(double done, double total, const char* stage)> progress;
};

struct PassResult {
  double loss = 0;                           // mean next-token cross-entropy, of the answers where there are any
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
