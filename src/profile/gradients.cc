// Gradient scores: dW = G^T X for the key and value projections of all layers from one backward pass (KVmix b.1).
#include "profile/gradients.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/machine.h"
#include "engine/graph_device.h"
#include "kvmix/error.h"
#include "kvmix/measure.h"
#include "profile/backward.h"

namespace kvmix {
namespace {

// Rows whose logits are there at a time; the head's weights are read anew for each.
constexpr int64_t kHeadRows = 128, kDeviceHeadRows = 1024;
// At most, of graphs of a layer and of the head.
size_t layer_nodes(const HyperParameters& p) { return 512 + 64 * static_cast<size_t>(p.kv_heads); }
size_t head_nodes(const HyperParameters& p) { return 128 + static_cast<size_t>(p.vocab * p.model_dim >> 21); }

// Of rows [first, first + n) of a prompt.
struct LossCall {
  std::span<const Token> prompt;
  int64_t first;
  double* losses;  // of these rows
};

// softmax(logits) - onehot(target), row by row: the gradient of the summed loss.
void loss_gradient(ggml_tensor* out, const ggml_tensor* logits, int ith, int nth, void* data) {
  const auto& call = *static_cast<LossCall*>(data);
  const int64_t vocab = logits->ne[0], n = logits->ne[1];
  for (int64_t r = ith; r < n; r += nth) {
    const float* x = static_cast<const float*>(logits->data) + r * vocab;
    float* g = static_cast<float*>(out->data) + r * vocab;
    const auto next = static_cast<size_t>(call.first + r + 1);
    if (next == call.prompt.size()) {  // the last row predicts nothing
      std::fill_n(g, vocab, 0.0f);
      call.losses[r] = 0;
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
    const Token target = call.prompt[next];
    g[target] -= 1.0f;
    call.losses[r] = std::log(sum) + static_cast<double>(top - x[target]);
  }
}

// A graph that is built, run and read once.
class Graph {
 public:
  explicit Graph(size_t nodes)
      : context_(ggml_init({nodes * ggml_tensor_overhead() + ggml_graph_overhead_custom(nodes, false), nullptr, true})),
        graph_(ggml_new_graph_custom(context_.get(), nodes, false)) {}
  ggml_context* context() const { return context_.get(); }
  ggml_cgraph* get() const { return graph_; }
  ggml_tensor* input(ggml_type type, int64_t ne0, int64_t ne1) const {
    ggml_tensor* t = ggml_new_tensor_2d(context(), type, ne0, ne1);
    ggml_set_input(t);
    return t;
  }
  ggml_tensor* want(ggml_tensor* t) const {
    ggml_set_output(t);
    ggml_build_forward_expand(graph_, t);
    return t;
  }

 private:
  GgmlContext context_;
  ggml_cgraph* graph_;
};

class Pass {
 public:
  Pass(const GgufModel& model, std::span<const Token> prompt, const PassOptions& options)
      : model_(model),
        p_(model.parameters()),
        prompt_(prompt),
        options_(options),
        n_(static_cast<int64_t>(prompt.size())),
        device_(options.device, options.threads, 2 * std::max(layer_nodes(p_), head_nodes(p_))),
        head_rows_(on_cpu() ? kHeadRows : kDeviceHeadRows) {}

  PassResult run() {
    PassResult result;
    embed();
    for (int64_t l = 0; l < p_.layers; ++l) {
      report(l, p_.layers, "forward pass");
      forward(l);
    }
    head(result);
    result.key_norm.resize(static_cast<size_t>(p_.layers));
    result.value_norm = result.key_norm;
    for (int64_t l = p_.layers; l-- > 0;) {
      report(p_.layers - 1 - l, p_.layers, options_.rows ? "backward pass, errors by layer and codec" : "backward pass");
      backward(l, result);
    }
    return result;
  }

 private:
  void report(int64_t done, int64_t total, const char* stage) const {
    if (options_.progress) options_.progress(static_cast<double>(done), static_cast<double>(total), stage);
  }

  // Memory for the graph's tensors; inputs are to be filled, then it is computed.
  void allocate(const Graph& graph) {
    if (device_.allocate(graph.get())) return;
    throw Error(Status::kOutOfMemory,
                "not enough memory to differentiate a prompt of " + std::to_string(n_) + " tokens; use shorter ones");
  }
  void compute(const Graph& graph) { device_.compute(graph.get(), "the gradient graph"); }
  const Weights& weights() const { return device_.weights(model_); }
  bool on_cpu() const { return options_.device == "cpu"; }

  void embed() {
    const Graph graph(16);
    ggml_tensor* tokens = graph.input(GGML_TYPE_I32, n_, 1);
    ggml_tensor* hidden = graph.want(model_.architecture().embed(graph.context(), p_, weights(), tokens));
    allocate(graph);
    ggml_backend_tensor_set(tokens, prompt_.data(), 0, prompt_.size_bytes());
    compute(graph);
    streams_.push_back(copied(hidden));
  }

  // One layer, from its input.
  struct LayerGraph {
    LayerGraph(const GgufModel& model, const Weights& weights, int64_t layer, int64_t n)
        : graph(layer_nodes(model.parameters())),
          input(graph.input(GGML_TYPE_F32, model.parameters().model_dim, n)),
          positions(graph.input(GGML_TYPE_I32, n, 1)),
          hooks(model.parameters(), graph.input(GGML_TYPE_F32, n, n)),
          out(model.architecture().layer(graph.context(), model.parameters(), weights, layer, input, positions, nullptr,
                                         hooks)) {
      ggml_build_forward_expand(graph.get(), out);
    }
    Graph graph;
    ggml_tensor *input, *positions;
    DifferentiableHooks hooks;
    ggml_tensor* out;
  };
  void fill_inputs(const LayerGraph& g, int64_t layer) const {
    fill(g.input, streams_[static_cast<size_t>(layer)]);
    std::vector<Token> positions(static_cast<size_t>(n_));
    std::iota(positions.begin(), positions.end(), 0);
    ggml_backend_tensor_set(g.positions, positions.data(), 0, ggml_nbytes(g.positions));
    std::vector<float> mask(static_cast<size_t>(n_ * n_));
    const int64_t sees = p_.is_local(layer) ? p_.sliding_window : n_;
    for (int64_t query = 0; query < n_; ++query) {
      for (int64_t key = 0; key < n_; ++key)
        mask[static_cast<size_t>(query * n_ + key)] = key <= query && key > query - sees ? 0.0f : -INFINITY;
    }
    fill(g.hooks.nodes.mask, mask);
  }

  void forward(int64_t layer) {
    const LayerGraph g(model_, weights(), layer, n_);
    ggml_set_output(g.out);
    allocate(g.graph);
    fill_inputs(g, layer);
    compute(g.graph);
    streams_.push_back(copied(g.out));
  }

  // Losses, and their gradient in place of the last stream.
  void head(PassResult& result) {
    std::vector<float>& stream = streams_.back();
    std::vector<double> losses(static_cast<size_t>(n_));
    for (int64_t first = 0; first < n_; first += head_rows_) {
      report(first, n_, "output head");
      const int64_t rows = std::min(head_rows_, n_ - first);
      const Graph graph(head_nodes(p_));
      ggml_tensor* input = graph.input(GGML_TYPE_F32, p_.model_dim, rows);
      ggml_tensor* logits = model_.architecture().head(graph.context(), p_, weights(), input);
      ggml_build_forward_expand(graph.get(), logits);
      LossCall call{prompt_, first, &losses[static_cast<size_t>(first)]};
      ggml_tensor* loss = ggml_map_custom1(graph.context(), logits, loss_gradient, GGML_N_TASKS_MAX, &call);
      Backward backward(graph.context(), model_, input, nullptr, on_cpu());
      backward.run(graph.get(), logits, loss);
      ggml_tensor* gradient = graph.want(backward.gradient(input));
      allocate(graph);
      const auto part =
          std::span(stream).subspan(static_cast<size_t>(first * p_.model_dim), static_cast<size_t>(rows * p_.model_dim));
      fill(input, part);
      compute(graph);
      std::ranges::copy(copied(gradient), part.begin());
    }
    for (const double l : losses) result.loss += l / static_cast<double>(n_ - 1);
    if (!std::isfinite(result.loss)) model_.refuse_not_finite("the losses of a calibration prompt");
  }

  // From the gradient at the layer's output, which stands in the last stream, to that at its input.
  void backward(int64_t layer, PassResult& result) {
    LayerGraph g(model_, weights(), layer, n_);
    ggml_context* ctx = g.graph.context();
    LayerNodes& nodes = g.hooks.nodes;
    ggml_tensor* output_gradient = g.graph.input(GGML_TYPE_F32, p_.model_dim, n_);
    Backward backward(ctx, model_, g.input, &nodes, on_cpu());
    backward.run(g.graph.get(), g.out, output_gradient);
    std::vector<ggml_tensor*> norms;
    ggml_tensor* xt = transposed(ctx, nodes.input, on_cpu());  // [n, model_dim]
    for (ggml_tensor* projection : {nodes.key_projection, nodes.value_projection}) {
      ggml_tensor* gt = transposed(ctx, backward.gradient(projection), on_cpu());  // [n, kv_dim]
      norms.push_back(g.graph.want(ggml_sum(ctx, ggml_sqr(ctx, ggml_mul_mat(ctx, xt, gt)))));
    }
    std::vector<ggml_tensor*> rows;
    if (options_.rows) {
      for (ggml_tensor* t : {nodes.q, nodes.k, nodes.v})
        rows.push_back(g.graph.want(ggml_cont(ctx, ggml_permute(ctx, t, 0, 2, 1, 3))));
      rows.push_back(g.graph.want(backward.gradient(nodes.out)));
    }
    ggml_tensor* gradient = g.graph.want(backward.gradient(g.input));
    allocate(g.graph);
    fill_inputs(g, layer);
    fill(output_gradient, streams_.back());
    compute(g.graph);
    const auto norm = [&](const ggml_tensor* t) {  // of the mean loss
      const double value = std::sqrt(static_cast<double>(copied(t).front())) / static_cast<double>(n_ - 1);
      if (!std::isfinite(value)) model_.refuse_not_finite("the gradients of layer " + std::to_string(layer));
      return value;
    };
    result.key_norm[static_cast<size_t>(layer)] = norm(norms[0]);
    result.value_norm[static_cast<size_t>(layer)] = norm(norms[1]);
    streams_.pop_back();
    streams_.back() = copied(gradient);
    if (options_.rows)
      options_.rows(static_cast<size_t>(layer), {copied(rows[0]), copied(rows[1]), copied(rows[2]), copied(rows[3])});
  }

  const GgufModel& model_;
  const HyperParameters& p_;
  std::span<const Token> prompt_;
  const PassOptions& options_;
  int64_t n_;
  GraphDevice device_;
  int64_t head_rows_;
  std::vector<std::vector<float>> streams_;  // [model_dim, n] in front of every layer, and behind the last
};

}  // namespace

PassResult differentiate(const GgufModel& model, std::span<const Token> prompt, const PassOptions& options) {
  if (prompt.size() < 2) throw Error(Status::kInvalidArgument, "a calibration prompt needs at least 2 tokens");
  return Pass(model, prompt, options).run();
}

void check_same_model(const Profile& profile, const ModelShape& shape) {
  if (profile.fingerprint == shape.fingerprint) return;
  throw Error(Status::kMismatch,
              "the profile was measured on " + other_model(profile.model, profile.fingerprint, shape) + ": start a new one");
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

void profile_gradients(std::shared_ptr<const Model> model, std::span<const std::vector<Token>> prompts,
                       const GradientOptions& options, Profile& profile, const Progress& progress) {
  if (prompts.empty()) throw Error(Status::kInvalidArgument, "gradient scores need at least one prompt");
  const GgufModel& inside = gguf_model(*model);
  check_same_model(profile, model->shape());
  for (auto i = static_cast<size_t>(profile.prompts); i < prompts.size(); ++i) {
    const std::string of = ", prompt " + std::to_string(i + 1) + " of " + std::to_string(prompts.size());
    PassOptions pass{.device = options.device, .threads = thread_count(options.threads), .rows = {}, .progress = {}};
    pass.progress = [&](double done, double total, const char* stage) {
      if (progress && !progress(done, total, stage + of)) throw Error(Status::kCancelled, "stopped while measuring gradients");
    };
    add_scores(differentiate(inside, prompts[i], pass), prompts[i].size(), profile);
    if (options.partial) options.partial(profile);
  }
  if (progress) progress(1, 1, "gradients");
}

}  // namespace kvmix
