// The file to read first: one step of a model with its cache.
//
//   embed                                          Architecture::embed
//   per layer: project q, k, v and rotate          Architecture::layer
//              append, seal what left the window   append_op -> Cache::append
//              attend on packed pages              attend_op -> Cache::attend
//              finish the layer                    Architecture::layer
//   logits of the wanted rows                      Architecture::head
//
// All of it is one ggml graph, run by one team of threads; the two cache operations are nodes of that graph.
#include <ggml-alloc.h>
#include <ggml-backend.h>
#include <ggml-cpu.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <list>
#include <mutex>

#include "base/checksum.h"
#include "base/machine.h"
#include "engine/model.h"
#include "kvmix/engine.h"
#include "kvmix/error.h"

namespace kvmix {
namespace {

constexpr size_t kCachedGraphs = 4;

using Backend = std::unique_ptr<ggml_backend, Freer<ggml_backend_free>>;
using GraphAllocator = std::unique_ptr<ggml_gallocr, Freer<ggml_gallocr_free>>;

// Where numbers were seen that are NaN or infinite.
struct NotFinite {
  std::string where;
};

// What the cache operations of one layer need at run time.
struct LayerCall {
  Cache* cache;
  int layer;
  struct Failure* failure;
};

// The first exception of any thread: graphs know no exceptions.
struct Failure {
  std::mutex mutex;
  std::exception_ptr error;
  std::atomic<bool> failed{false};

  void catch_current() {
    const std::lock_guard lock(mutex);
    if (!error) error = std::current_exception();
    failed = true;
  }
};

void append_op(ggml_tensor* out, int ith, int nth, void* data) {
  const auto& call = *static_cast<LayerCall*>(data);
  if (call.failure->failed) return;
  const ggml_tensor *k = out->src[0], *v = out->src[1];
  try {
    // Once a layer and step: what is not finite here makes all that follows so.
    for (const auto& [t, side] : {std::pair{k, "keys"}, std::pair{v, "values"}}) {
      if (ith == 0 && !all_finite({static_cast<const float*>(t->data), static_cast<size_t>(ggml_nelements(t))}))
        throw NotFinite{"the " + std::string(side) + " of layer " + std::to_string(call.layer)};
    }
    call.cache->append(call.layer, static_cast<const float*>(k->data), k->ne[0] * k->ne[1], static_cast<const float*>(v->data),
                       v->ne[0] * v->ne[1], ith, nth);
  } catch (...) {
    call.failure->catch_current();
  }
}

void attend_op(ggml_tensor* out, int ith, int nth, void* data) {
  const auto& call = *static_cast<LayerCall*>(data);
  if (call.failure->failed) return;
  const ggml_tensor* q = out->src[0];
  try {
    call.cache->attend(call.layer, static_cast<const float*>(q->data), q->ne[0] * q->ne[1], static_cast<float*>(out->data),
                       out->ne[0], ith, nth);
  } catch (...) {
    call.failure->catch_current();
  }
}

class CacheHooks final : public GraphHooks {
 public:
  explicit CacheHooks(std::vector<LayerCall>& calls) : calls_(calls) {}

  ggml_tensor* attention(ggml_context* ctx, int64_t layer, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v) override {
    LayerCall* call = &calls_[static_cast<size_t>(layer)];
    ggml_tensor* stored[] = {k, v};
    ggml_tensor* appended = ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, stored, 2, append_op, GGML_N_TASKS_MAX, call);
    ggml_tensor* queries[] = {q, appended};
    return ggml_custom_4d(ctx, GGML_TYPE_F32, q->ne[0] * q->ne[1], q->ne[2], 1, 1, queries, 2, attend_op, GGML_N_TASKS_MAX,
                          call);
  }

 private:
  std::vector<LayerCall>& calls_;
};

// A graph for a number of tokens and logit rows, kept for the next step of the same shape.
struct Graph {
  int64_t tokens_n, rows_n;
  GgmlContext context;
  GraphAllocator allocator;
  ggml_cgraph* graph;
  GraphInputs inputs;
  ggml_tensor* logits;  // null when no logits are wanted
};

}  // namespace

struct Engine::Impl {
  Impl(std::shared_ptr<const Model> m, const Plan& p, const EngineOptions& o)
      : model(std::move(m)), inside(gguf_model(*model)), plan(p), options(o) {
    options.threads = thread_count(options.threads);
    if (options.threads < 1 || options.threads > 256) throw Error(Status::kInvalidArgument, "threads must be 1 to 256");
    if (options.chunk_tokens < 1 || options.chunk_tokens > 8192)
      throw Error(Status::kInvalidArgument, "chunk_tokens must be 1 to 8192");
    check_plan(plan, model->shape(), options.force_plan);
    CacheConfig config = cache_config(plan, model->shape());
    config.threads = options.threads;
    config.max_bytes = options.max_cache_bytes;
    config.kernel = options.kernel;
    config.exact = options.exact;
    cache = std::make_unique<Cache>(std::move(config));
    for (size_t l = 0; l < model->shape().layers.size(); ++l) calls.push_back({cache.get(), static_cast<int>(l), &failure});
    backend.reset(ggml_backend_cpu_init());
    ggml_backend_cpu_set_n_threads(backend.get(), options.threads);
  }

  Graph& graph_for(int64_t tokens_n, int64_t rows_n);
  std::shared_ptr<const Model> model;
  const GgufModel& inside;
  Plan plan;
  EngineOptions options;
  std::unique_ptr<Cache> cache;
  Failure failure;
  std::vector<LayerCall> calls;
  Backend backend;
  std::list<Graph> graphs;  // most recently used first
  std::vector<StepItem> items;
  std::vector<Token> tokens, positions, rows;
};

Graph& Engine::Impl::graph_for(int64_t tokens_n, int64_t rows_n) {
  for (auto it = graphs.begin(); it != graphs.end(); ++it) {
    if (it->tokens_n == tokens_n && it->rows_n == rows_n) {
      graphs.splice(graphs.begin(), graphs, it);
      return graphs.front();
    }
  }
  if (graphs.size() == kCachedGraphs) graphs.pop_back();
  const HyperParameters& p = inside.parameters();
  const size_t nodes = static_cast<size_t>(p.layers) * 64 + 64;
  Graph g{tokens_n,
          rows_n,
          GgmlContext(ggml_init({nodes * ggml_tensor_overhead() + ggml_graph_overhead_custom(nodes, false), nullptr, true})),
          nullptr,
          nullptr,
          {},
          nullptr};
  ggml_context* ctx = g.context.get();
  const auto input = [ctx](int64_t n) {
    ggml_tensor* t = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
    ggml_set_input(t);
    return t;
  };
  g.inputs = {input(tokens_n), input(tokens_n), rows_n > 0 && rows_n < tokens_n ? input(rows_n) : nullptr};
  CacheHooks hooks(calls);
  g.graph = ggml_new_graph_custom(ctx, nodes, false);
  const Architecture& a = inside.architecture();
  if (rows_n > 0) {
    g.logits = a.build(ctx, p, inside.weights(), g.inputs, hooks);
    ggml_set_output(g.logits);
    ggml_build_forward_expand(g.graph, g.logits);
  } else {
    // Nothing behind the last layer's attention is wanted: its append is what counts.
    ggml_tensor* hidden = a.embed(ctx, p, inside.weights(), g.inputs.tokens);
    for (int64_t il = 0; il < p.layers; ++il) {
      hidden = a.layer(ctx, p, inside.weights(), il, hidden, g.inputs.positions, nullptr, hooks);
    }
    ggml_build_forward_expand(g.graph, hidden);
  }
  g.allocator.reset(ggml_gallocr_new(ggml_backend_cpu_buffer_type()));
  if (!ggml_gallocr_alloc_graph(g.allocator.get(), g.graph)) {
    throw Error(Status::kOutOfMemory,
                "not enough memory for a graph of " + std::to_string(tokens_n) + " tokens; use smaller chunks");
  }
  graphs.push_front(std::move(g));
  return graphs.front();
}

Engine::Engine(std::shared_ptr<const Model> model, const Plan& plan, const EngineOptions& options)
    : impl_(std::make_unique<Impl>(std::move(model), plan, options)) {}
Engine::~Engine() = default;

const Model& Engine::model() const { return *impl_->model; }
const Plan& Engine::plan() const { return impl_->plan; }
Cache& Engine::cache() { return *impl_->cache; }

std::string Engine::cache_fingerprint() const {
  Checksum sum;
  const std::string plan = to_json(impl_->plan);
  sum.update(plan.data(), plan.size());
  return impl_->model->shape().fingerprint + "+" + std::to_string(sum.value());
}

std::span<const float> Engine::step(std::span<const EngineItem> work) {
  Impl& impl = *impl_;
  const int64_t context = impl.model->shape().context_tokens;
  impl.items.clear();
  impl.tokens.clear();
  impl.positions.clear();
  impl.rows.clear();
  for (const EngineItem& item : work) {
    const int64_t start = impl.cache->length(item.sequence);
    const auto n = static_cast<int64_t>(item.tokens.size());
    if (n == 0) throw Error(Status::kInvalidArgument, "a step needs at least one token of each sequence");
    if (n > impl.options.chunk_tokens) {
      throw Error(Status::kInvalidArgument, "a step of " + std::to_string(n) + " tokens exceeds the chunk of " +
                                                std::to_string(impl.options.chunk_tokens) + "; use prefill");
    }
    if (start + n > context) {
      throw Error(Status::kInvalidArgument, "sequence " + std::to_string(item.sequence) + " would reach " +
                                                std::to_string(start + n) + " tokens; the model's context ends at " +
                                                std::to_string(context));
    }
    impl.items.push_back({item.sequence, static_cast<int>(n), item.more, item.decoded});
    for (int64_t t = 0; t < n; ++t) {
      const Token token = item.tokens[static_cast<size_t>(t)];
      if (token < 0 || token >= impl.model->vocab_size()) {
        throw Error(Status::kInvalidArgument, "token " + std::to_string(token) + " is outside the vocabulary");
      }
      if (item.all_logits || (!item.no_logits && t == n - 1)) impl.rows.push_back(static_cast<Token>(impl.tokens.size()));
      impl.tokens.push_back(token);
      impl.positions.push_back(static_cast<Token>(start + t));
    }
  }
  const auto tokens_n = static_cast<int64_t>(impl.tokens.size()), rows_n = static_cast<int64_t>(impl.rows.size());
  Graph& g = impl.graph_for(tokens_n, rows_n);
  const auto set = [](ggml_tensor* t, const std::vector<Token>& values) {
    std::copy(values.begin(), values.end(), static_cast<Token*>(t->data));
  };
  set(g.inputs.tokens, impl.tokens);
  set(g.inputs.positions, impl.positions);
  if (g.inputs.rows != nullptr) set(g.inputs.rows, impl.rows);

  impl.cache->begin_step(impl.items);
  impl.failure.error = nullptr;
  impl.failure.failed = false;
  const ggml_status status = ggml_backend_graph_compute(impl.backend.get(), g.graph);
  if (impl.failure.error) {
    impl.cache->abort_step();
    try {
      std::rethrow_exception(impl.failure.error);
    } catch (const NotFinite& found) {
      impl.inside.refuse_not_finite(found.where);
    }
  }
  if (status != GGML_STATUS_SUCCESS) {
    impl.cache->abort_step();
    throw Error(Status::kInternal, std::string("the graph failed: ") + ggml_status_to_string(status));
  }
  std::span<const float> logits;
  if (rows_n > 0) logits = {static_cast<const float*>(g.logits->data), static_cast<size_t>(rows_n * g.logits->ne[0])};
  if (!all_finite(logits)) {
    impl.cache->abort_step();
    impl.inside.refuse_not_finite("the logits, behind layer " + std::to_string(impl.calls.size() - 1));
  }
  impl.cache->end_step();
  return logits;
}

std::span<const float> Engine::prefill(SequenceId sequence, std::span<const Token> tokens,
                                       const std::function<bool(int64_t, int64_t)>& progress) {
  if (tokens.empty()) throw Error(Status::kInvalidArgument, "nothing to prefill: the prompt has no tokens");
  const int64_t after = impl_->cache->length(sequence) + static_cast<int64_t>(tokens.size());
  if (after > impl_->model->shape().context_tokens) {
    throw Error(Status::kInvalidArgument, "the prompt would take the sequence to " + std::to_string(after) +
                                              " tokens; the model's context ends at " +
                                              std::to_string(impl_->model->shape().context_tokens));
  }
  const auto chunk = static_cast<size_t>(impl_->options.chunk_tokens);
  std::span<const float> logits;
  for (size_t done = 0; done < tokens.size();) {
    const size_t n = std::min(chunk, tokens.size() - done);
    const bool more = done + n < tokens.size();
    const EngineItem item{.sequence = sequence, .tokens = tokens.subspan(done, n), .no_logits = more, .more = more};
    logits = step({&item, 1});
    done += n;
    if (progress && !progress(static_cast<int64_t>(done), static_cast<int64_t>(tokens.size()))) {
      throw Error(Status::kCancelled, "stopped while reading the prompt");
    }
  }
  return logits;
}

}  // namespace kvmix
