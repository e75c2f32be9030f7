// The registry of architectures and what they share.
#include <array>
#include <cmath>

#include "engine/architecture.h"
#include "kvmix/engine.h"
#include "kvmix/error.h"

namespace kvmix {

const Architecture& llama_architecture();
const Architecture& qwen2_architecture();
const Architecture& qwen3_architecture();
const Architecture& gemma3_architecture();

std::span<const Architecture* const> architecture_registry() {
  // One line adds an architecture.
  static const std::array kArchitectures = {
      &llama_architecture(),
      &qwen2_architecture(),
      &qwen3_architecture(),
      &gemma3_architecture(),
  };
  return kArchitectures;
}

const Architecture& find_architecture(const std::string& name, const std::string& path) {
  std::string names;
  for (const Architecture* a : architecture_registry()) {
    if (name == a->name()) return *a;
    names += std::string(names.empty() ? "" : ", ") + a->name();
  }
  throw Error(Status::kUnsupported,
              path + ": architecture \"" + name.substr(0, 64) + "\" is not supported; supported are " + names);
}

std::vector<ArchitectureInfo> architectures() {
  std::vector<ArchitectureInfo> infos;
  for (const Architecture* a : architecture_registry()) infos.push_back({a->name(), a->description()});
  return infos;
}

ggml_tensor* Weights::find(const std::string& name) const {
  const auto it = tensors_.find(name);
  return it == tensors_.end() ? nullptr : it->second;
}

ggml_tensor* Weights::get(const std::string& name) const {
  ggml_tensor* tensor = find(name);
  if (tensor == nullptr) throw Error(Status::kCorrupt, "the model lacks the tensor " + name + "; obtain the file again");
  return tensor;
}

HyperParameters common_parameters(const GgufMetadata& m, const std::string& prefix, int rope_mode) {
  HyperParameters p;
  const auto key = [&](const char* name) { return prefix + "." + name; };
  p.layers = m.integer(key("block_count"), 1, 1024);
  p.model_dim = m.integer(key("embedding_length"), 32, 65536);
  p.ffn_dims = m.per_layer(key("feed_forward_length"), p.layers, 32, 1 << 20);
  p.q_heads = m.same_in_layers(key("attention.head_count"), p.layers, 1, 1024);
  p.kv_heads =
      m.has(key("attention.head_count_kv")) ? m.same_in_layers(key("attention.head_count_kv"), p.layers, 1, 1024) : p.q_heads;
  p.head_dim = m.integer_or(key("attention.key_length"), p.model_dim / p.q_heads, 1, 1024);
  p.context = m.integer(key("context_length"), 1, INT32_MAX);
  p.norm_epsilon = static_cast<float>(m.number(key("attention.layer_norm_rms_epsilon")));
  p.attention_scale = 1.0f / std::sqrt(static_cast<float>(p.head_dim));
  if (p.q_heads % p.kv_heads != 0 || p.head_dim < 32 || p.head_dim > 256 || p.head_dim % 16 != 0) {
    throw Error(Status::kUnsupported, m.path() + ": " + std::to_string(p.q_heads) + " query heads, " +
                                          std::to_string(p.kv_heads) + " KV heads of dimension " + std::to_string(p.head_dim) +
                                          "; supported are head dimensions 32 to 256 in steps of 16 and whole groups");
  }
  if (!(p.norm_epsilon >= 0.0f && p.norm_epsilon < 1.0f)) {
    throw Error(Status::kCorrupt, m.path() + ": attention.layer_norm_rms_epsilon is " + std::to_string(p.norm_epsilon) +
                                      "; expected 0 to 1, obtain the file again");
  }
  if (m.integer_or(key("attention.value_length"), p.head_dim, 1, 1024) != p.head_dim) {
    throw Error(Status::kUnsupported, m.path() + ": key and value heads of different length are not supported");
  }
  if (m.integer_or(key("expert_count"), 0, 0, 4096) > 0) {
    throw Error(Status::kUnsupported, m.path() + ": mixture-of-experts models are not supported");
  }
  if (!m.truth_or(key("attention.causal"), true)) {
    throw Error(Status::kUnsupported, m.path() + ": " + key("attention.causal") +
                                          " is false: a model that sees ahead has no use for a cache; it is not supported");
  }
  if (m.integer_or(key("nextn_predict_layers"), 0, 0, 1024) > 0) {
    throw Error(Status::kUnsupported,
                m.path() + ": " + key("nextn_predict_layers") +
                    " is set: layers that predict several tokens are not supported; convert without them");
  }
  const auto as_global = [&](const char* name, int64_t global) {
    if (const int64_t value = m.integer_or(key(name), global, 0, INT32_MAX); value != global) {
      throw Error(Status::kUnsupported, m.path() + ": " + key(name) + " is " + std::to_string(value) +
                                            ", in other layers it is " + std::to_string(global) +
                                            "; layers that differ so are not supported");
    }
  };
  as_global("attention.key_length_swa", p.head_dim);
  as_global("attention.value_length_swa", p.head_dim);

  RopeOptions& r = p.rope;
  r.mode = rope_mode;
  r.dims = static_cast<int>(m.integer_or(key("rope.dimension_count"), p.head_dim, 2, p.head_dim));
  as_global("rope.dimension_count_swa", r.dims);
  r.base = static_cast<float>(m.number_or(key("rope.freq_base"), 10000.0));
  if (r.dims % 2 != 0 || !(r.base > 0.0f)) {
    throw Error(Status::kCorrupt, m.path() + ": rotation of " + std::to_string(r.dims) + " dimensions with base " +
                                      std::to_string(r.base) + "; expected an even number and a positive base");
  }
  r.original_context = static_cast<int>(m.integer_or(key("rope.scaling.original_context_length"), p.context, 1, INT32_MAX));
  const std::string scaling = m.text_or(key("rope.scaling.type"), "linear");
  r.attn_factor = static_cast<float>(m.number_or(key("rope.scaling.attn_factor"), 1.0));
  if (scaling == "linear" || scaling == "yarn") {
    // The second is an older name; 0 stands for no scaling.
    const double factor = m.number_or(key("rope.scaling.factor"), m.number_or(key("rope.scale_linear"), 0.0));
    if (!(factor >= 0.0))
      throw Error(Status::kCorrupt, m.path() + ": rope.scaling.factor is " + std::to_string(factor) + "; expected at least 0");
    if (factor > 0.0) r.scale = static_cast<float>(1.0 / factor);
    if (scaling == "yarn") r.ext_factor = 1.0f;
  } else if (scaling != "none") {
    throw Error(Status::kUnsupported,
                m.path() + ": rope scaling \"" + scaling.substr(0, 32) + "\" is not supported; none, linear and yarn are");
  }
  p.rope_local = r;
  return p;
}

ggml_tensor* rms_norm(ggml_context* ctx, ggml_tensor* x, ggml_tensor* weight, float epsilon) {
  return ggml_mul(ctx, ggml_rms_norm(ctx, x, epsilon), weight);
}

std::vector<TensorSpec> common_tensors(const HyperParameters& p, const BlockTensors& has) {
  std::vector<TensorSpec> specs = {{"token_embd.weight", p.model_dim, p.vocab},
                                   {"output_norm.weight", p.model_dim, 1},
                                   {"output.weight", p.model_dim, p.vocab, false}};
  for (int64_t l = 0; l < p.layers; ++l) {
    const std::string block = "blk." + std::to_string(l) + ".";
    const int64_t q = p.q_heads * p.head_dim, kv = p.kv_heads * p.head_dim, ffn = p.ffn_dims[static_cast<size_t>(l)];
    const auto matrix = [&](const std::string& name, int64_t in, int64_t out, bool bias) {
      specs.push_back({block + name + ".weight", in, out});
      if (bias) specs.push_back({block + name + ".bias", out, 1, false});
      if (has.scales) specs.push_back({block + name + ".scale", 1, 1, false});
    };
    const auto norm = [&](const char* name, int64_t n) { specs.push_back({block + name, n, 1}); };
    matrix("attn_q", p.model_dim, q, true);
    matrix("attn_k", p.model_dim, kv, true);
    matrix("attn_v", p.model_dim, kv, true);
    matrix("attn_output", q, p.model_dim, has.output_bias);
    matrix("ffn_gate", p.model_dim, ffn, has.ffn_bias);
    matrix("ffn_up", p.model_dim, ffn, has.ffn_bias);
    matrix("ffn_down", ffn, p.model_dim, has.ffn_bias);
    norm("attn_norm.weight", p.model_dim);
    norm("ffn_norm.weight", p.model_dim);
    if (has.qk_norm) norm("attn_q_norm.weight", p.head_dim);
    if (has.qk_norm) norm("attn_k_norm.weight", p.head_dim);
    if (has.post_norms) norm("post_attention_norm.weight", p.model_dim);
    if (has.post_norms) norm("post_ffw_norm.weight", p.model_dim);
  }
  return specs;
}

ggml_tensor* project(ggml_context* ctx, const Weights& w, int64_t il, const char* name, ggml_tensor* x) {
  const std::string base(name);
  ggml_tensor* y = ggml_mul_mat(ctx, w.layer(il, base + ".weight"), x);
  ggml_tensor *scale = w.find_layer(il, base + ".scale"), *bias = w.find_layer(il, base + ".bias");
  // libllama scales attention's products before it adds the bias, the feed-forward's after.
  const bool late = base.starts_with("ffn_");
  if (scale != nullptr && !late) y = ggml_mul(ctx, y, scale);
  if (bias != nullptr) y = ggml_add(ctx, y, bias);
  return scale != nullptr && late ? ggml_mul(ctx, y, scale) : y;
}

ggml_tensor* rotate(ggml_context* ctx, ggml_tensor* x, ggml_tensor* positions, ggml_tensor* factors, const RopeOptions& r) {
  return ggml_rope_ext(ctx, x, positions, factors, r.dims, r.mode, r.original_context, r.base, r.scale, r.ext_factor,
                       r.attn_factor, r.beta_fast, r.beta_slow);
}

ggml_tensor* Architecture::embed(ggml_context* ctx, const HyperParameters&, const Weights& w, ggml_tensor* tokens) const {
  return ggml_get_rows(ctx, w.get("token_embd.weight"), tokens);
}

ggml_tensor* Architecture::head(ggml_context* ctx, const HyperParameters& p, const Weights& w, ggml_tensor* hidden) const {
  ggml_tensor* output = w.find("output.weight");
  ggml_tensor* x = rms_norm(ctx, hidden, w.get("output_norm.weight"), p.norm_epsilon);
  ggml_tensor* logits = ggml_mul_mat(ctx, output != nullptr ? output : w.get("token_embd.weight"), x);
  ggml_tensor* bias = w.find("output.bias");
  return bias != nullptr ? ggml_add(ctx, logits, bias) : logits;
}

ggml_tensor* Architecture::build(ggml_context* ctx, const HyperParameters& p, const Weights& w, const GraphInputs& inputs,
                                 GraphHooks& hooks) const {
  ggml_tensor* hidden = embed(ctx, p, w, inputs.tokens);
  for (int64_t il = 0; il < p.layers; ++il) {
    hidden = hooks.layer_input(ctx, il, hidden);
    hidden = layer(ctx, p, w, il, hidden, inputs.positions, il == p.layers - 1 ? inputs.rows : nullptr, hooks);
  }
  return head(ctx, p, w, hidden);
}

ggml_tensor* llama_layer(ggml_context* ctx, const HyperParameters& p, const Weights& w, int64_t il, ggml_tensor* hidden,
                         ggml_tensor* positions, ggml_tensor* rows, GraphHooks& hooks) {
  const int64_t n = hidden->ne[1];
  ggml_tensor* x = rms_norm(ctx, hidden, w.layer(il, "attn_norm.weight"), p.norm_epsilon);
  ggml_tensor* q = project(ctx, w, il, "attn_q", x);
  ggml_tensor* k = project(ctx, w, il, "attn_k", x);
  ggml_tensor* v = project(ctx, w, il, "attn_v", x);
  k = hooks.projection(ctx, il, Side::kKey, x, k);
  v = hooks.projection(ctx, il, Side::kValue, x, v);
  q = ggml_reshape_3d(ctx, q, p.head_dim, p.q_heads, n);
  k = ggml_reshape_3d(ctx, k, p.head_dim, p.kv_heads, n);
  v = ggml_reshape_3d(ctx, v, p.head_dim, p.kv_heads, n);
  if (ggml_tensor* norm = w.find_layer(il, "attn_q_norm.weight")) q = rms_norm(ctx, q, norm, p.norm_epsilon);
  if (ggml_tensor* norm = w.find_layer(il, "attn_k_norm.weight")) k = rms_norm(ctx, k, norm, p.norm_epsilon);
  ggml_tensor* factors = w.find("rope_freqs.weight");
  q = rotate(ctx, q, positions, factors, p.rope);
  k = rotate(ctx, k, positions, factors, p.rope);

  ggml_tensor* attended = hooks.attention(ctx, il, q, k, v);
  if (rows != nullptr) {  // the last layer goes on with the wanted rows only
    attended = ggml_get_rows(ctx, attended, rows);
    hidden = ggml_get_rows(ctx, hidden, rows);
  }
  hidden = ggml_add(ctx, project(ctx, w, il, "attn_output", attended), hidden);
  x = rms_norm(ctx, hidden, w.layer(il, "ffn_norm.weight"), p.norm_epsilon);
  ggml_tensor* gate = project(ctx, w, il, "ffn_gate", x);
  ggml_tensor* up = project(ctx, w, il, "ffn_up", x);
  ggml_tensor* down = project(ctx, w, il, "ffn_down", hooks.swiglu(ctx, gate, up));
  return ggml_add(ctx, down, hidden);
}

}  // namespace kvmix
