#include "engine/architecture.h"

namespace kvmix {
namespace {

class Qwen3 final : public Architecture {
 public:
  const char* name() const override { return "qwen3"; }
  const char* description() const override { return "Qwen 3: norms on q and k"; }
  HyperParameters parameters(const GgufMetadata& metadata) const override {
    return common_parameters(metadata, "qwen3", GGML_ROPE_TYPE_NEOX);
  }
  std::vector<TensorSpec> tensors(const HyperParameters& p) const override {
    return common_tensors(p, {.qk_norm = true, .scales = true});
  }
  ggml_tensor* layer(ggml_context* ctx, const HyperParameters& p, const Weights& w, int64_t il, ggml_tensor* hidden,
                     ggml_tensor* positions, ggml_tensor* rows, GraphHooks& hooks) const override {
    return llama_layer(ctx, p, w, il, hidden, positions, rows, hooks);
  }
};

}  // namespace

const Architecture& qwen3_architecture();
const Architecture& qwen3_architecture() {
  static const Qwen3 instance;
  return instance;
}

}  // namespace kvmix
