// A model run one layer at a time in fp32, so that a measurement can restart at the layer it changes. Weights are dequantised
// when a layer runs and activations are never rounded: what differs between two runs is what was changed, not noise.
#pragma once

#include <ggml-alloc.h>

#include <span>
#include <string>
#include <vector>

#include "engine/model.h"
#include "kvmix/plan.h"

namespace kvmix {

class Layerwise {
 public:
  // `fp16` decides which keys a query reads from sealed pages, as in the running cache.
  Layerwise(const GgufModel& model, int threads, const Fp16Part& fp16);

  // Codecs are fp16: nothing is quantised until a caller sets them in a copy.
  const LayerConfig& layer_config(int layer) const { return layers_[static_cast<size_t>(layer)]; }
  int layers() const { return static_cast<int>(layers_.size()); }
  int64_t vocab() const { return model_.parameters().vocab; }

  std::vector<float> embed(std::span<const Token> tokens);
  // Residual stream [n][model_dim] through one layer whose stored rows go through the codecs of `config`.
  std::vector<float> forward(int layer, const LayerConfig& config, std::span<const float> hidden);
  // The layer's weights of this name from now on until another layer runs, in the tensor's order, as they act.
  void replace(int layer, const std::string& name, std::span<const float> values);
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
