// Reverse-mode differentiation of a part of a model's graph, a layer or the head, with plain ggml operations. ggml's own goes
// through outer products with quantised matrices, which is slow; here a weight's part is a product with its transposed fp32
// copy, which is made inside the graph, in blocks, and lives only until it was used.
#pragma once

#include <ggml.h>

#include <deque>
#include <map>

#include "engine/model.h"

namespace kvmix {

// A layer's attention and projections in the graph.
struct LayerNodes {
  ggml_tensor *q = nullptr, *k = nullptr, *v = nullptr;  // [head_dim, heads, n], rotated
  ggml_tensor* queries = nullptr;                        // [head_dim, n, heads]: products on the CPU want them contiguous
  ggml_tensor *mask = nullptr, *out = nullptr;           // f32 [n, n]; output [head_dim * q_heads, n]
  ggml_tensor *input = nullptr, *key_projection = nullptr, *value_projection = nullptr;
};

// Builds the differentiable forward graph of one layer: plain attention, one KV head after the other, and unfused gates.
class DifferentiableHooks final : public GraphHooks {
 public:
  // mask: f32 [n, n], 0 or -inf.
  DifferentiableHooks(const HyperParameters& p, ggml_tensor* mask) : p_(p) { nodes.mask = mask; }
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

 public:
  LayerNodes nodes;
};

// A contiguous matrix turned around, contiguous too. ggml's copies on the CPU go number by number, which for the n x n numbers
// of attention took a quarter of a profile's time; `on_cpu` takes tiles.
ggml_tensor* transposed(ggml_context* ctx, ggml_tensor* t, bool on_cpu);

// Extends a graph by the gradients of everything between its output and `input`, given d loss / d output. Must live until the
// graph has run.
class Backward {
 public:
  // `attention`: the layer's, or null where there is none. `on_cpu`: the graph runs there. Keeps references.
  Backward(ggml_context* ctx, const GgufModel& model, const ggml_tensor* input, const LayerNodes* attention, bool on_cpu)
      : ctx_(ctx), model_(model), input_(input), attention_(attention), on_cpu_(on_cpu) {}
  void run(ggml_cgraph* graph, ggml_tensor* output, ggml_tensor* output_gradient);
  ggml_tensor* gradient(const ggml_tensor* t) const;

 private:
  // A block of a matrix, transposed.
  struct Block {
    const ggml_tensor* source;
    int64_t first;  // row of the source
  };

  void add(ggml_tensor* t, ggml_tensor* gradient);
  void propagate(ggml_tensor* t, ggml_tensor* g);
  void propagate_attention(ggml_cgraph* graph, ggml_tensor* g);
  // W^T g for a matrix [in, out] and g [out, n].
  ggml_tensor* transposed_product(const ggml_tensor* weight, ggml_tensor* g);
  bool is_weight(const ggml_tensor* t) const { return t->op == GGML_OP_NONE && t != input_; }
  static void fill_block(ggml_tensor* out, int ith, int nth, void* data);

  ggml_context* ctx_;
  const GgufModel& model_;
  const ggml_tensor* input_;
  const LayerNodes* attention_;
  bool on_cpu_;
  std::map<const ggml_tensor*, ggml_tensor*> gradients_;
  std::deque<Block> blocks_;
};

}  // namespace kvmix
