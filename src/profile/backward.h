// Reverse-mode differentiation of a model's graph with plain ggml operations. ggml's own goes through outer products with
// quantised matrices, which is slow; here a weight's part is a product with its transposed, dequantised copy.
#pragma once

#include <ggml.h>

#include <map>
#include <vector>

#include "engine/model.h"

namespace kvmix {

// The transposed fp32 copies of a model's matrices.
class TransposedWeights {
 public:
  explicit TransposedWeights(const GgufModel& model);
  ggml_tensor* of(const ggml_tensor* weight) const { return transposed_.at(weight); }

 private:
  GgmlContext context_;
  BackendBuffer buffer_;
  std::map<const ggml_tensor*, ggml_tensor*> transposed_;
};

// One layer's attention and projections in the graph, and their gradients once backward ran.
struct LayerNodes {
  ggml_tensor *q = nullptr, *k = nullptr, *v = nullptr;  // [head_dim, heads, n], rotated
  ggml_tensor *mask = nullptr, *out = nullptr;           // f32 [n, n]; output [head_dim * q_heads, n]
  ggml_tensor *input = nullptr, *key_projection = nullptr, *value_projection = nullptr;
};

struct BackwardInputs {
  ggml_tensor* mask_global;  // f32 [n, n]: 0 or -inf
  ggml_tensor* mask_local;
};

// Builds the differentiable forward graph: plain attention, unfused gates.
class DifferentiableHooks final : public GraphHooks {
 public:
  DifferentiableHooks(const HyperParameters& p, const BackwardInputs& inputs)
      : p_(p), inputs_(inputs), layers(static_cast<size_t>(p.layers)) {}
  ggml_tensor* attention(ggml_context* ctx, int64_t layer, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v) override;
  ggml_tensor* projection(ggml_context* ctx, int64_t layer, Side side, ggml_tensor* input, ggml_tensor* output) override;
  ggml_tensor* swiglu(ggml_context* ctx, ggml_tensor* gate, ggml_tensor* up) override {
    return ggml_mul(ctx, ggml_silu(ctx, gate), up);
  }
  ggml_tensor* geglu(ggml_context* ctx, ggml_tensor* gate, ggml_tensor* up) override {
    return ggml_mul(ctx, ggml_gelu(ctx, gate), up);
  }

 private:
  const HyperParameters& p_;
  const BackwardInputs& inputs_;

 public:
  std::vector<LayerNodes> layers;
};

// Extends the graph by the gradients of everything between `output` and the embedding, given d loss / d output.
class Backward {
 public:
  Backward(ggml_context* ctx, const HyperParameters& p, const TransposedWeights& weights, std::vector<LayerNodes>& layers)
      : ctx_(ctx), p_(p), weights_(weights), layers_(layers) {}
  void run(ggml_cgraph* forward, ggml_tensor* output, ggml_tensor* output_gradient);
  ggml_tensor* gradient(const ggml_tensor* t) const;

 private:
  void add(ggml_tensor* t, ggml_tensor* gradient);
  void propagate(ggml_tensor* t, ggml_tensor* g);
  void propagate_attention(LayerNodes& layer, ggml_tensor* g);
  bool is_weight(const ggml_tensor* t) const { return t->op == GGML_OP_NONE; }

  ggml_context* ctx_;
  const HyperParameters& p_;
  const TransposedWeights& weights_;
  std::vector<LayerNodes>& layers_;
  std::map<const ggml_tensor*, ggml_tensor*> gradients_;
};

}  // namespace kvmix
