// How a model's graph is built. An architecture is one file that knows its weights and operations, and one line in
// architectures.cc. Attention is a hook: the running engine puts a custom operation over the packed cache there, the
// gradient measurement plain differentiable operations.
#pragma once

#include <ggml.h>
#include <gguf.h>

#include <map>
#include <span>
#include <string>
#include <vector>

#include "kvmix/plan.h"

namespace kvmix {

// Typed, checked access to a GGUF's metadata. Errors name file and key.
class GgufMetadata {
 public:
  GgufMetadata(const gguf_context* gguf, std::string path) : gguf_(gguf), path_(std::move(path)) {}

  std::string text(const std::string& key) const;
  std::string text_or(const std::string& key, const std::string& fallback) const;
  int64_t integer(const std::string& key, int64_t low, int64_t high) const;
  int64_t integer_or(const std::string& key, int64_t fallback, int64_t low, int64_t high) const;
  double number(const std::string& key) const;
  double number_or(const std::string& key, double fallback) const;
  // One number for each layer: a single one stands for all. An array must be as long as there are layers.
  std::vector<int64_t> per_layer(const std::string& key, int64_t layers, int64_t low, int64_t high) const;
  // The same where all must be equal. Throws kUnsupported naming the two that differ.
  int64_t same_in_layers(const std::string& key, int64_t layers, int64_t low, int64_t high) const;
  bool is_list(const std::string& key) const;
  bool truth_or(const std::string& key, bool fallback) const;
  bool has(const std::string& key) const;
  const std::string& path() const { return path_; }

 private:
  int64_t find(const std::string& key) const;
  std::string path_suffix(const std::string& key) const;

  const gguf_context* gguf_;
  std::string path_;
};

struct RopeOptions {
  int dims = 0;
  int mode = 0;  // GGML_ROPE_TYPE_*
  int original_context = 0;
  float base = 10000, scale = 1, ext_factor = 0, attn_factor = 1, beta_fast = 32, beta_slow = 1;
};

// What the graphs need beyond ModelShape.
struct HyperParameters {
  int64_t layers = 0, model_dim = 0, q_heads = 0, kv_heads = 0, head_dim = 0, vocab = 0, context = 0;
  std::vector<int64_t> ffn_dims;  // of each layer
  float norm_epsilon = 1e-5f;
  RopeOptions rope;            // global layers
  RopeOptions rope_local;      // layers with a sliding window
  int64_t sliding_window = 0;  // of local layers
  std::vector<bool> local;     // layers with the window; empty: none
  float attention_scale = 0;
  float final_softcap = 0;

  bool is_local(int64_t layer) const { return !local.empty() && local[static_cast<size_t>(layer)]; }
};

// Weights by GGUF name.
class Weights {
 public:
  void add(const std::string& name, ggml_tensor* tensor) { tensors_[name] = tensor; }
  // Throws kCorrupt naming the tensor that is missing.
  ggml_tensor* get(const std::string& name) const;
  ggml_tensor* find(const std::string& name) const;  // null if the model has none
  ggml_tensor* layer(int64_t layer, const std::string& name) const { return get("blk." + std::to_string(layer) + "." + name); }
  ggml_tensor* find_layer(int64_t layer, const std::string& name) const {
    return find("blk." + std::to_string(layer) + "." + name);
  }
  const std::map<std::string, ggml_tensor*>& all() const { return tensors_; }

 private:
  std::map<std::string, ggml_tensor*> tensors_;
};

class GraphHooks {
 public:
  virtual ~GraphHooks() = default;
  // q [head_dim, q_heads, n], k and v [head_dim, kv_heads, n]: contiguous fp32, rotated, q not scaled. Returns the attention
  // output [head_dim * q_heads, n].
  virtual ggml_tensor* attention(ggml_context* ctx, int64_t layer, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v) = 0;
  // The key and value projections' outputs before norms and rotation, [kv_heads * head_dim, n], with their input
  // [model_dim, n]. What is returned is used in their place.
  virtual ggml_tensor* projection(ggml_context*, int64_t, Side, ggml_tensor*, ggml_tensor* output) { return output; }
  // The residual stream entering a layer, [model_dim, n].
  virtual ggml_tensor* layer_input(ggml_context*, int64_t, ggml_tensor* hidden) { return hidden; }
  // Gated feed-forward activation; the measurement replaces fused operations by differentiable ones.
  virtual ggml_tensor* swiglu(ggml_context* ctx, ggml_tensor* gate, ggml_tensor* up) {
    return ggml_swiglu_split(ctx, gate, up);
  }
  virtual ggml_tensor* geglu(ggml_context* ctx, ggml_tensor* gate, ggml_tensor* up) { return ggml_geglu_split(ctx, gate, up); }
};

struct GraphInputs {
  ggml_tensor* tokens;     // i32 [n]
  ggml_tensor* positions;  // i32 [n]
  ggml_tensor* rows;       // i32 [r]: rows whose logits are wanted; null for all
};

// A tensor that an architecture reads: a vector where `out` is 1.
struct TensorSpec {
  std::string name;
  int64_t in, out;
  bool required = true;
};

class Architecture {
 public:
  virtual ~Architecture() = default;
  virtual const char* name() const = 0;  // of general.architecture
  virtual const char* description() const = 0;
  // Throws kCorrupt or kUnsupported naming the key.
  virtual HyperParameters parameters(const GgufMetadata& metadata) const = 0;
  // All tensors that the graph reads; p.vocab is known. A file with others is refused: what they would do is missing.
  virtual std::vector<TensorSpec> tensors(const HyperParameters& p) const = 0;
  // Embedding of the tokens, scaled as the model does.
  virtual ggml_tensor* embed(ggml_context* ctx, const HyperParameters& p, const Weights& w, ggml_tensor* tokens) const;
  // One layer: residual stream in, residual stream out.
  virtual ggml_tensor* layer(ggml_context* ctx, const HyperParameters& p, const Weights& w, int64_t il, ggml_tensor* hidden,
                             ggml_tensor* positions, ggml_tensor* rows, GraphHooks& hooks) const = 0;
  // Final norm and output head.
  virtual ggml_tensor* head(ggml_context* ctx, const HyperParameters& p, const Weights& w, ggml_tensor* hidden) const;

  // The whole graph: logits [vocab, rows].
  ggml_tensor* build(ggml_context* ctx, const HyperParameters& p, const Weights& w, const GraphInputs& inputs,
                     GraphHooks& hooks) const;
};

std::span<const Architecture* const> architecture_registry();
// Throws kUnsupported naming what is supported.
const Architecture& find_architecture(const std::string& name, const std::string& path);

// Pieces that most architectures share.
HyperParameters common_parameters(const GgufMetadata& metadata, const std::string& prefix, int rope_mode);
// What blocks may have beside their norms and matrices.
struct BlockTensors {
  bool qk_norm = false, post_norms = false, output_bias = false, ffn_bias = false, scales = false;
};
std::vector<TensorSpec> common_tensors(const HyperParameters& p, const BlockTensors& has);
ggml_tensor* rms_norm(ggml_context* ctx, ggml_tensor* x, ggml_tensor* weight, float epsilon);
// The layer's matrix `name` times x, with NAME.scale and NAME.bias where the model has them.
ggml_tensor* project(ggml_context* ctx, const Weights& w, int64_t il, const char* name, ggml_tensor* x);
ggml_tensor* rotate(ggml_context* ctx, ggml_tensor* x, ggml_tensor* positions, ggml_tensor* factors, const RopeOptions& rope);

// The Llama block, which Qwen varies by biases and by norms of q and k: each is used where the model has the tensor.
ggml_tensor* llama_layer(ggml_context* ctx, const HyperParameters& p, const Weights& w, int64_t il, ggml_tensor* hidden,
                         ggml_tensor* positions, ggml_tensor* rows, GraphHooks& hooks);

}  // namespace kvmix
