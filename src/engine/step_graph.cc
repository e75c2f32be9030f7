#include "engine/runner.h"
#include "kvmix/error.h"

namespace kvmix {

StepGraph::StepGraph(const GgufModel& model, const Weights& weights, int64_t tokens, int64_t wanted, GraphHooks& hooks,
                     ggml_backend_buffer_type_t memory)
    : tokens_n(tokens), wanted_n(wanted) {
  const HyperParameters& p = model.parameters();
  const size_t nodes = static_cast<size_t>(p.layers) * 64 + 64;
  context.reset(ggml_init({nodes * ggml_tensor_overhead() + ggml_graph_overhead_custom(nodes, false), nullptr, true}));
  ggml_context* ctx = context.get();
  const auto input = [ctx](int64_t n) {
    ggml_tensor* t = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
    ggml_set_input(t);
    return t;
  };
  inputs = {input(tokens), input(tokens), wanted > 0 && wanted < tokens ? input(wanted) : nullptr};
  graph = ggml_new_graph_custom(ctx, nodes, false);
  const Architecture& a = model.architecture();
  if (wanted > 0) {
    logits = a.build(ctx, p, weights, inputs, hooks);
    ggml_set_output(logits);
    ggml_build_forward_expand(graph, logits);
  } else {
    // Nothing behind the last layer's attention is wanted: its append is what counts.
    ggml_tensor* hidden = a.embed(ctx, p, weights, inputs.tokens);
    for (int64_t il = 0; il < p.layers; ++il) hidden = a.layer(ctx, p, weights, il, hidden, inputs.positions, nullptr, hooks);
    ggml_build_forward_expand(graph, hidden);
  }
  allocator.reset(ggml_gallocr_new(memory));
  if (!ggml_gallocr_alloc_graph(allocator.get(), graph)) {
    throw Error(Status::kOutOfMemory,
                "not enough memory for a graph of " + std::to_string(tokens) + " tokens; use smaller chunks");
  }
}

}  // namespace kvmix
