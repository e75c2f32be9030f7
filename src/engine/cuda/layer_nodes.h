// Where a layer's attention and the storing of its rows stand in a step's graph.
#pragma once

#include <ggml.h>

#include <vector>

#include "engine/architecture.h"

namespace kvmix::cuda {

// Attention is a node that ggml leaves alone.
class Markers final : public GraphHooks {
 public:
  ggml_tensor* attention(ggml_context* ctx, int64_t layer, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v) override;
};

// A layer's node for attention, and the place of the node that completes its keys and values.
struct LayerNodes {
  const ggml_tensor* attention;
  int stored_at;

  const ggml_tensor* values() const { return attention->src[0]; }
  const ggml_tensor* keys() const { return attention->src[1]; }
  const ggml_tensor* queries() const { return attention->src[2]; }
};

// Of a graph that was built with Markers, layer by layer.
std::vector<LayerNodes> layers_of(ggml_cgraph* graph);

}  // namespace kvmix::cuda
