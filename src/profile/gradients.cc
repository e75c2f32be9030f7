// Gradient scores: dW = G^T X for the key and value projections of all layers from one backward pass (KVmix b.1).
#include "profile/gradients.h"

#include <ggml-alloc.h>
#include <ggml-cpu.h>

#include <cmath>
#include <random>

#include "base/machine.h"
#include "kvmix/error.h"
#include "kvmix/measure.h"

namespace kvmix {
namespace {

struct LossCall {
  const std::vector<Token>* targets;  // of rows 0 .. n-2; the last row predicts nothing
  std::vector<double>* losses;
};

// softmax(logits) - onehot(target), row by row: the gradient of the summed loss.
void loss_gradient(ggml_tensor* out, const ggml_tensor* logits, int ith, int nth, void* data) {
  const auto& call = *static_cast<LossCall*>(data);
  const int64_t vocab = logits->ne[0], n = logits->ne[1];
  for (int64_t r = ith; r < n; r += nth) {
    const float* x = static_cast<const float*>(logits->data) + r * vocab;
    float* g = static_cast<float*>(out->data) + r * vocab;
    if (r == n - 1) {
      std::fill_n(g, vocab, 0.0f);
      continue;
    }
    float top = x[0];
    for (int64_t i = 1; i < vocab; ++i) top = std::max(top, x[i]);
    double sum = 0;
    for (int64_t i = 0; i < vocab; ++i) {
      g[i] = std::exp(x[i] - top);
      sum += static_cast<double>(g[i]);
    }
    const auto norm = static_cast<float>(1 / sum);
    for (int64_t i = 0; i < vocab; ++i) g[i] *= norm;
    const Token target = (*call.targets)[static_cast<size_t>(r)];
    g[target] -= 1.0f;
    (*call.losses)[static_cast<size_t>(r)] = std::log(sum) + static_cast<double>(top - x[target]);
  }
}

std::vector<float> copied(const ggml_tensor* t) {
  const auto* data = static_cast<const float*>(t->data);
  return {data, data + ggml_nelements(t)};
}

}  // namespace

PassResult differentiate(const GgufModel& model, const TransposedWeights& weights, std::span<const Token> prompt,
                         const PassOptions& options) {
  const auto n = static_cast<int64_t>(prompt.size());
  if (n < 2) throw Error(Status::kInvalidArgument, "a calibration prompt needs at least 2 tokens");
  const HyperParameters& p = model.parameters();
  const size_t nodes = static_cast<size_t>(p.layers) * 256 + 256;
  const GgmlContext owner(
      ggml_init({nodes * ggml_tensor_overhead() + ggml_graph_overhead_custom(nodes, false), nullptr, true}));
  ggml_context* ctx = owner.get();
  const auto input = [&](ggml_type type, int64_t ne0, int64_t ne1) {
    ggml_tensor* t = ggml_new_tensor_2d(ctx, type, ne0, ne1);
    ggml_set_input(t);
    return t;
  };
  const GraphInputs inputs{input(GGML_TYPE_I32, n, 1), input(GGML_TYPE_I32, n, 1), nullptr};
  const BackwardInputs masks{input(GGML_TYPE_F32, n, n), input(GGML_TYPE_F32, n, n)};
  DifferentiableHooks hooks(p, masks);
  ggml_tensor* logits = model.architecture().build(ctx, p, model.weights(), inputs, hooks);
  ggml_cgraph* graph = ggml_new_graph_custom(ctx, nodes, false);
  ggml_build_forward_expand(graph, logits);

  std::vector<Token> targets(prompt.begin() + 1, prompt.end());
  std::vector<double> losses(static_cast<size_t>(n - 1));
  LossCall call{&targets, &losses};
  ggml_tensor* loss = ggml_map_custom1(ctx, logits, loss_gradient, GGML_N_TASKS_MAX, &call);
  Backward backward(ctx, p, weights, hooks.layers);
  backward.run(graph, logits, loss);

  std::vector<ggml_tensor*> norms;
  const auto want = [&](ggml_tensor* t) {
    ggml_set_output(t);
    ggml_build_forward_expand(graph, t);
  };
  for (LayerNodes& layer : hooks.layers) {
    ggml_tensor* xt = ggml_cont(ctx, ggml_transpose(ctx, layer.input));  // [n, model_dim]
    for (ggml_tensor* projection : {layer.key_projection, layer.value_projection}) {
      ggml_tensor* gt = ggml_cont(ctx, ggml_transpose(ctx, backward.gradient(projection)));  // [n, kv_dim]
      norms.push_back(ggml_sum(ctx, ggml_sqr(ctx, ggml_mul_mat(ctx, xt, gt))));
      want(norms.back());
    }
    if (!options.rows) continue;
    for (ggml_tensor** t : {&layer.q, &layer.k, &layer.v}) {
      *t = ggml_cont(ctx, ggml_permute(ctx, *t, 0, 2, 1, 3));
      want(*t);
    }
    want(backward.gradient(layer.out));
  }
  const std::unique_ptr<ggml_gallocr, Freer<ggml_gallocr_free>> allocator(ggml_gallocr_new(ggml_backend_cpu_buffer_type()));
  // An input that nothing uses gets no memory; the masks are set only where they have some.
  if (!ggml_gallocr_alloc_graph(allocator.get(), graph)) {
    throw Error(Status::kOutOfMemory,
                "not enough memory to differentiate a prompt of " + std::to_string(n) + " tokens; use shorter ones");
  }
  for (int64_t t = 0; t < n; ++t) {
    static_cast<Token*>(inputs.tokens->data)[t] = prompt[static_cast<size_t>(t)];
    static_cast<Token*>(inputs.positions->data)[t] = static_cast<Token>(t);
  }
  const auto fill = [&](ggml_tensor* t, auto value) {
    if (t->data == nullptr) return;
    for (int64_t query = 0; query < n; ++query) {
      for (int64_t key = 0; key < n; ++key) static_cast<float*>(t->data)[query * n + key] = value(query, key);
    }
  };
  fill(masks.mask_global, [](int64_t q, int64_t k) { return k <= q ? 0.0f : -INFINITY; });
  fill(masks.mask_local, [&](int64_t q, int64_t k) { return k <= q && k > q - p.sliding_window ? 0.0f : -INFINITY; });

  const std::unique_ptr<ggml_backend, Freer<ggml_backend_free>> backend(ggml_backend_cpu_init());
  ggml_backend_cpu_set_n_threads(backend.get(), options.threads);
  if (ggml_backend_graph_compute(backend.get(), graph) != GGML_STATUS_SUCCESS)
    throw Error(Status::kInternal, "the gradient graph failed");

  PassResult result;
  for (const double l : losses) result.loss += l / static_cast<double>(n - 1);
  if (!std::isfinite(result.loss)) model.refuse_not_finite("the losses of a calibration prompt");
  for (size_t i = 0; i < norms.size(); i += 2) {
    const auto norm = [&](const ggml_tensor* t) {  // of the mean loss
      return std::sqrt(static_cast<double>(*static_cast<const float*>(t->data))) / static_cast<double>(n - 1);
    };
    result.key_norm.push_back(norm(norms[i]));
    result.value_norm.push_back(norm(norms[i + 1]));
  }
  for (size_t l = 0; l < result.key_norm.size(); ++l) {
    if (!std::isfinite(result.key_norm[l]) || !std::isfinite(result.value_norm[l]))
      model.refuse_not_finite("the gradients of layer " + std::to_string(l));
  }
  if (options.rows) {
    for (const LayerNodes& layer : hooks.layers) {
      result.queries.push_back(copied(layer.q));
      result.keys.push_back(copied(layer.k));
      result.values.push_back(copied(layer.v));
      result.output_gradient.push_back(copied(backward.gradient(layer.out)));
    }
  }
  return result;
}

void add_scores(const PassResult& pass, size_t tokens, Profile& profile) {
  const double before = profile.prompts;
  profile.key_score.resize(pass.key_norm.size());
  profile.value_score.resize(pass.value_norm.size());
  for (size_t l = 0; l < pass.key_norm.size(); ++l) {
    profile.key_score[l] += (pass.key_norm[l] - profile.key_score[l]) / (before + 1);
    profile.value_score[l] += (pass.value_norm[l] - profile.value_score[l]) / (before + 1);
  }
  profile.key_score_by_prompt.push_back(pass.key_norm);
  profile.value_score_by_prompt.push_back(pass.value_norm);
  ++profile.prompts;
  profile.tokens += static_cast<int64_t>(tokens);
}

Profile profile_gradients(std::shared_ptr<const Model> model, std::span<const std::vector<Token>> prompts, int threads,
                          const Progress& progress) {
  if (prompts.empty()) throw Error(Status::kInvalidArgument, "gradient scores need at least one prompt");
  const GgufModel& inside = gguf_model(*model);
  const TransposedWeights weights(inside);
  Profile profile;
  profile.fingerprint = model->shape().fingerprint;
  profile.model = model->shape().name;
  const PassOptions options{.threads = thread_count(threads)};
  for (const std::vector<Token>& prompt : prompts) {
    if (progress && !progress(static_cast<double>(profile.prompts), static_cast<double>(prompts.size()), "gradients")) {
      throw Error(Status::kCancelled, "stopped while measuring gradients");
    }
    add_scores(differentiate(inside, weights, prompt, options), prompt.size(), profile);
  }
  if (progress) progress(1, 1, "gradients");
  return profile;
}

}  // namespace kvmix
