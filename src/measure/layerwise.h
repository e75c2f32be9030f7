// A model run one layer at a time in fp32, so that a measurement can restart at the layer it changes. Weights are dequantised
// when a layer runs and activations are never rounded: what differs between two runs is what was changed, not noise.
#pragma once

#include <ggml-alloc.h>

#include <cmath>
#include <span>
#include <vector>

#include "engine/model.h"
#include "kvmix/cache.h"

namespace kvmix {

// What a side of a layer reads back from sealed pages: rows [n][kv_heads][head_dim] that fill a page behind the sinks are
// transformed, encoded, decoded and transformed back; the others are copied. Pages are shared over `nth` callers.
void stored_rows(const LayerConfig& layer, Side side, int64_t n, const float* rows, float* out, int ith, int nth);

// A layer's attention inputs, rotated: [n][heads][head_dim].
struct AttentionRows {
  std::vector<float> q, k, v;
};

class Layerwise {
 public:
  // `sinks` and `window` decide which keys a query reads from sealed pages, as in the running cache.
  Layerwise(const GgufModel& model, int threads, int sinks, int window);

  // Codecs are fp16: nothing is quantised until a caller sets them in a copy.
  const LayerConfig& layer_config(int layer) const { return layers_[static_cast<size_t>(layer)]; }
  int layers() const { return static_cast<int>(layers_.size()); }
  int64_t vocab() const { return model_.parameters().vocab; }

  std::vector<float> embed(std::span<const Token> tokens);
  // Residual stream [n][model_dim] through one layer whose stored rows go through the codecs of `config`.
  std::vector<float> forward(int layer, const LayerConfig& config, std::span<const float> hidden,
                             AttentionRows* rows = nullptr);
  // The layer's attention output behind its output projection, [n][model_dim], with the codecs of `config`.
  std::vector<float> attention_output(int layer, const LayerConfig& config, const AttentionRows& rows);
  // Logits [rows.size()][vocab]; valid until the next call.
  std::span<const float> logits(std::span<const float> hidden, std::span<const int> rows);

 private:
  struct Slot {  // the weights of one layer in fp32
    int layer = -1;
    GgmlContext context;
    BackendBuffer buffer;
    Weights weights;
  };
  const Weights& load(int layer);
  void dequantise(const ggml_tensor* source, ggml_tensor* to) const;
  void compute(ggml_cgraph* graph);

  const GgufModel& model_;
  int threads_;
  int64_t dim_;
  std::vector<LayerConfig> layers_;
  Slot slot_, head_;
  std::unique_ptr<ggml_backend, Freer<ggml_backend_free>> backend_;
  std::unique_ptr<ggml_gallocr, Freer<ggml_gallocr_free>> allocator_;
  GgmlContext head_graph_;
};

}  // namespace kvmix
