#include "engine/cuda/layer_nodes.h"

#include <algorithm>

namespace kvmix::cuda {
namespace {

void never_computed(ggml_tensor*, int, int, void*) { GGML_ABORT("a node that stands for attention was computed"); }

}  // namespace

ggml_tensor* Markers::attention(ggml_context* ctx, int64_t, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v) {
  ggml_tensor* rows[] = {v, k, q};  // in this order in the graph: rows of keys are turned when both projections are there
  return ggml_custom_4d(ctx, GGML_TYPE_F32, q->ne[0] * q->ne[1], q->ne[2], 1, 1, rows, 3, never_computed, 1, nullptr);
}

std::vector<LayerNodes> layers_of(ggml_cgraph* graph) {
  const auto place = [&](const ggml_tensor* node) {
    int i = 0;
    while (ggml_graph_node(graph, i) != node) ++i;
    return i;
  };
  std::vector<LayerNodes> layers;
  for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
    const ggml_tensor* node = ggml_graph_node(graph, i);
    if (node->op != GGML_OP_CUSTOM) continue;
    layers.push_back({node, 0});
    layers.back().stored_at = std::max(place(layers.back().keys()), place(layers.back().values()));
  }
  return layers;
}

}  // namespace kvmix::cuda
