#include "engine/architecture.h"

namespace kvmix {
namespace {

class Qwen2 final : public Architecture {
 public:
  const char* name() const override { return "qwen2"; }
  const char* description() const override { return "Qwen 2 and 2.5: biases on q, k and v"; }
  HyperParameters parameters(const GgufMetadata& metadata) const override {
    return common_parameters(metadata, "qwen2", GGML_ROPE_TYPE_NEOX);
  }
  std::vector<TensorSpec> tensors(const HyperParameters& p) const override {
    auto specs = common_tensors(p, {});
    specs.push_back({"output.bias", p.vocab, 1, false});
    return specs;
  }
  ggml_tensor* layer(ggml_context* ctx, const HyperParameters& p, const Weights& w, int64_t il, ggml_tensor* hidden,
                     ggml_tensor* positions, ggml_tensor* rows, GraphHooks& hooks) const override {
    return llama_layer(ctx, p, w, il, hidden, positions, rows, hooks);
  }
};

}  // namespace

const Architecture& qwen2_architecture();
const Architecture& qwen2_architecture() {
  static const Qwen2 instance;
  return instance;
}

}  // namespace kvmix
