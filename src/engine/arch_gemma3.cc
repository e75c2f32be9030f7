// Gemma 3: norms before and after each half of a block, norms of q and k, five local layers to a global one, GELU gates, scaled
// embeddings.
#include <cmath>

#include "engine/architecture.h"

namespace kvmix {
namespace {

class Gemma3 final : public Architecture {
 public:
  const char* name() const override { return "gemma3"; }
  const char* description() const override { return "Gemma 3 text models: sliding-window layers, norms of q and k"; }

  HyperParameters parameters(const GgufMetadata& m) const override {
    HyperParameters p = common_parameters(m, "gemma3", GGML_ROPE_TYPE_NEOX);
    p.sliding_window = m.integer_or("gemma3.attention.sliding_window", 0, 0, INT32_MAX);
    if (p.sliding_window > 0) {
      const std::string pattern = "gemma3.attention.sliding_window_pattern";
      if (m.is_list(pattern)) {  // whether each layer is local
        for (const int64_t local : m.per_layer(pattern, p.layers, 0, 1)) p.local.push_back(local != 0);
      } else {  // every n-th is global, with 0 none
        const int64_t n = m.integer_or(pattern, 6, 0, 1024);
        for (int64_t l = 0; l < p.layers; ++l) p.local.push_back(n == 0 || l % n < n - 1);
      }
      p.rope_local.base = static_cast<float>(m.number_or("gemma3.rope.freq_base_swa", 10000.0));
      p.rope_local.scale = 1.0f;
      p.rope_local.ext_factor = 0.0f;
      p.rope_local.attn_factor = 1.0f;
    }
    p.final_softcap = static_cast<float>(m.number_or("gemma3.final_logit_softcapping", 0.0));
    // The 27B model scales queries by its model dimension per head instead of the head dimension.
    if (p.layers == 62) p.attention_scale = 1.0f / std::sqrt(static_cast<float>(p.model_dim) / static_cast<float>(p.q_heads));
    return p;
  }

  std::vector<TensorSpec> tensors(const HyperParameters& p) const override {
    return common_tensors(p, {.qk_norm = true, .post_norms = true});
  }

  ggml_tensor* embed(ggml_context* ctx, const HyperParameters& p, const Weights& w, ggml_tensor* tokens) const override {
    return ggml_scale(ctx, Architecture::embed(ctx, p, w, tokens), std::sqrt(static_cast<float>(p.model_dim)));
  }

  ggml_tensor* layer(ggml_context* ctx, const HyperParameters& p, const Weights& w, int64_t il, ggml_tensor* hidden,
                     ggml_tensor* positions, ggml_tensor* rows, GraphHooks& hooks) const override {
    const int64_t n = hidden->ne[1];
    const RopeOptions& rope = p.is_local(il) ? p.rope_local : p.rope;
    const auto norm = [&](ggml_tensor* x, const char* name) { return rms_norm(ctx, x, w.layer(il, name), p.norm_epsilon); };
    ggml_tensor* x = norm(hidden, "attn_norm.weight");
    ggml_tensor* q = project(ctx, w, il, "attn_q", x);
    ggml_tensor* k = hooks.projection(ctx, il, Side::kKey, x, project(ctx, w, il, "attn_k", x));
    ggml_tensor* v = hooks.projection(ctx, il, Side::kValue, x, project(ctx, w, il, "attn_v", x));
    q = norm(ggml_reshape_3d(ctx, q, p.head_dim, p.q_heads, n), "attn_q_norm.weight");
    k = norm(ggml_reshape_3d(ctx, k, p.head_dim, p.kv_heads, n), "attn_k_norm.weight");
    v = ggml_reshape_3d(ctx, v, p.head_dim, p.kv_heads, n);
    q = rotate(ctx, q, positions, nullptr, rope);
    k = rotate(ctx, k, positions, nullptr, rope);

    ggml_tensor* attended = hooks.attention(ctx, il, q, k, v);
    if (rows != nullptr) {
      attended = ggml_get_rows(ctx, attended, rows);
      hidden = ggml_get_rows(ctx, hidden, rows);
    }
    x = ggml_mul_mat(ctx, w.layer(il, "attn_output.weight"), attended);
    hidden = ggml_add(ctx, norm(x, "post_attention_norm.weight"), hidden);
    x = norm(hidden, "ffn_norm.weight");
    ggml_tensor* gate = ggml_mul_mat(ctx, w.layer(il, "ffn_gate.weight"), x);
    ggml_tensor* up = ggml_mul_mat(ctx, w.layer(il, "ffn_up.weight"), x);
    x = ggml_mul_mat(ctx, w.layer(il, "ffn_down.weight"), hooks.geglu(ctx, gate, up));
    return ggml_add(ctx, norm(x, "post_ffw_norm.weight"), hidden);
  }

  ggml_tensor* head(ggml_context* ctx, const HyperParameters& p, const Weights& w, ggml_tensor* hidden) const override {
    ggml_tensor* logits = Architecture::head(ctx, p, w, hidden);
    if (p.final_softcap <= 0) return logits;
    return ggml_scale(ctx, ggml_tanh(ctx, ggml_scale(ctx, logits, 1.0f / p.final_softcap)), p.final_softcap);
  }
};

}  // namespace

const Architecture& gemma3_architecture();
const Architecture& gemma3_architecture() {
  static const Gemma3 instance;
  return instance;
}

}  // namespace kvmix
