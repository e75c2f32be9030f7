#include "engine/architecture.h"

namespace kvmix {
namespace {

class Llama final : public Architecture {
 public:
  const char* name() const override { return "llama"; }
  const char* description() const override { return "LLaMA 1 to 3 and kin: Mistral, TinyLlama, SmolLM2"; }
  HyperParameters parameters(const GgufMetadata& metadata) const override {
    return common_parameters(metadata, "llama", GGML_ROPE_TYPE_NORMAL);
  }
  std::vector<TensorSpec> tensors(const HyperParameters& p) const override {
    auto specs = common_tensors(p, {.output_bias = true, .ffn_bias = true, .scales = true});
    specs.push_back({"rope_freqs.weight", p.rope.dims / 2, 1, false});
    return specs;
  }
  ggml_tensor* layer(ggml_context* ctx, const HyperParameters& p, const Weights& w, int64_t il, ggml_tensor* hidden,
                     ggml_tensor* positions, ggml_tensor* rows, GraphHooks& hooks) const override {
    return llama_layer(ctx, p, w, il, hidden, positions, rows, hooks);
  }
};

}  // namespace

const Architecture& llama_architecture();
const Architecture& llama_architecture() {
  static const Llama instance;
  return instance;
}

}  // namespace kvmix
