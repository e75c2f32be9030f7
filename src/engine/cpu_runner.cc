// A step on the CPU: one graph, run by one team of threads; the cache's operations are nodes of that graph.
#include <ggml-backend.h>
#include <ggml-cpu.h>

#include <algorithm>

#include "base/first_failure.h"
#include "engine/runner.h"
#include "kvmix/error.h"

namespace kvmix {
namespace {

constexpr size_t kCachedGraphs = 4;

using Backend = std::unique_ptr<ggml_backend, Freer<ggml_backend_free>>;

// What the cache operations of one layer need at run time.
struct LayerCall {
  Cache** cache;  // of the step
  int layer;
  FirstFailure* failure;  // graphs know no exceptions
};

void append_op(ggml_tensor* out, int ith, int nth, void* data) {
  const auto& call = *static_cast<LayerCall*>(data);
  if (call.failure->failed()) return;
  const ggml_tensor *k = out->src[0], *v = out->src[1];
  call.failure->guard([&] {
    // Once a layer and step: what is not finite here makes all that follows so.
    for (const auto& [t, side] : {std::pair{k, "keys"}, std::pair{v, "values"}}) {
      if (ith == 0 && !all_finite({static_cast<const float*>(t->data), static_cast<size_t>(ggml_nelements(t))}))
        throw NotFinite{"the " + std::string(side) + " of layer " + std::to_string(call.layer)};
    }
    (*call.cache)
        ->append(call.layer, static_cast<const float*>(k->data), k->ne[0] * k->ne[1], static_cast<const float*>(v->data),
                 v->ne[0] * v->ne[1], ith, nth);
  });
}

void attend_op(ggml_tensor* out, int ith, int nth, void* data) {
  const auto& call = *static_cast<LayerCall*>(data);
  if (call.failure->failed()) return;
  const ggml_tensor* q = out->src[0];
  call.failure->guard([&] {
    (*call.cache)
        ->attend(call.layer, static_cast<const float*>(q->data), q->ne[0] * q->ne[1], static_cast<float*>(out->data),
                 out->ne[0], ith, nth);
  });
}

// What makes a layer's latents, [model_dim, rank]; null in a layer without.
struct DownProjections {
  ggml_tensor *key, *value;
};

class CacheHooks final : public GraphHooks {
 public:
  CacheHooks(std::vector<LayerCall>& calls, const std::vector<DownProjections>& down) : calls_(calls), down_(down) {}

  ggml_tensor* projection(ggml_context*, int64_t, Side, ggml_tensor* input, ggml_tensor* output) override {
    input_ = input;
    return output;
  }

  ggml_tensor* attention(ggml_context* ctx, int64_t layer, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v) override {
    LayerCall* call = &calls_[static_cast<size_t>(layer)];
    if (!down_.empty() &&
        down_[static_cast<size_t>(layer)].key != nullptr) {  // latents in their place: the graph then never reaches k and v
      const auto latents = [&](ggml_tensor* down) {
        ggml_tensor* z = ggml_mul_mat(ctx, down, input_);
        return ggml_reshape_3d(ctx, z, z->ne[0], 1, z->ne[1]);
      };
      k = latents(down_[static_cast<size_t>(layer)].key);
      v = latents(down_[static_cast<size_t>(layer)].value);
    }
    ggml_tensor* stored[] = {k, v};
    ggml_tensor* appended = ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, stored, 2, append_op, GGML_N_TASKS_MAX, call);
    ggml_tensor* queries[] = {q, appended};
    return ggml_custom_4d(ctx, GGML_TYPE_F32, q->ne[0] * q->ne[1], q->ne[2], 1, 1, queries, 2, attend_op, GGML_N_TASKS_MAX,
                          call);
  }

 private:
  std::vector<LayerCall>& calls_;
  const std::vector<DownProjections>& down_;
  ggml_tensor* input_ = nullptr;  // of the layer's projections
};

class CpuRunner final : public Runner {
 public:
  CpuRunner(const GgufModel& model, int threads, const std::vector<LayerLatents>& latents)
      : model_(model), threads_(threads), backend_(ggml_backend_cpu_init()) {
    for (size_t l = 0; l < model.shape().layers.size(); ++l) calls_.push_back({&cache_, static_cast<int>(l), &failure_});
    ggml_backend_cpu_set_n_threads(backend_.get(), threads);
    if (!latents.empty()) load_down(latents);
  }

  void configure(CacheConfig& config) const override { config.threads = threads_; }

  void prepare(int64_t tokens, int64_t wanted) override {
    graph_ = &recent_graph(graphs_, kCachedGraphs, tokens, wanted, [&](std::list<StepGraph>& graphs) {
      CacheHooks hooks(calls_, down_);
      graphs.emplace_front(model_, model_.weights(), tokens, wanted, hooks, ggml_backend_cpu_buffer_type());
    });
  }

  std::span<const float> run(Cache& cache, const StepRows& rows) override {
    const auto set = [](ggml_tensor* t, std::span<const Token> values) {
      std::copy(values.begin(), values.end(), static_cast<Token*>(t->data));
    };
    set(graph_->inputs.tokens, rows.tokens);
    set(graph_->inputs.positions, rows.positions);
    if (graph_->inputs.rows != nullptr) set(graph_->inputs.rows, rows.wanted);
    cache_ = &cache;
    failure_.clear();
    const ggml_status status = ggml_backend_graph_compute(backend_.get(), graph_->graph);
    failure_.rethrow();
    if (status != GGML_STATUS_SUCCESS)
      throw Error(Status::kInternal, std::string("the graph failed: ") + ggml_status_to_string(status));
    if (graph_->logits == nullptr) return {};
    const std::span<const float> logits{static_cast<const float*>(graph_->logits->data),
                                        static_cast<size_t>(ggml_nelements(graph_->logits))};
    if (!all_finite(logits)) throw NotFinite{"the logits, behind layer " + std::to_string(calls_.size() - 1)};
    return logits;
  }

 private:
  void load_down(const std::vector<LayerLatents>& latents) {
    down_context_.reset(ggml_init({2 * latents.size() * ggml_tensor_overhead(), nullptr, true}));
    const int64_t dim = model_.parameters().model_dim;
    const auto tensor = [&](const std::vector<float>& numbers) {
      return ggml_new_tensor_2d(down_context_.get(), GGML_TYPE_F32, dim, static_cast<int64_t>(numbers.size()) / dim);
    };
    for (const LayerLatents& l : latents) {
      const bool none = l.factors == nullptr;
      down_.push_back({none ? nullptr : tensor(l.key_down), none ? nullptr : tensor(l.value_down)});
    }
    down_buffer_.reset(ggml_backend_alloc_ctx_tensors_from_buft(down_context_.get(), ggml_backend_cpu_buffer_type()));
    if (down_buffer_ == nullptr) throw Error(Status::kOutOfMemory, "not enough memory for the plan's factors");
    for (size_t l = 0; l < latents.size(); ++l) {
      if (down_[l].key == nullptr) continue;
      std::copy(latents[l].key_down.begin(), latents[l].key_down.end(), static_cast<float*>(down_[l].key->data));
      std::copy(latents[l].value_down.begin(), latents[l].value_down.end(), static_cast<float*>(down_[l].value->data));
    }
  }

  const GgufModel& model_;
  int threads_;
  GgmlContext down_context_;
  BackendBuffer down_buffer_;
  std::vector<DownProjections> down_;  // by layer; empty without latents
  Backend backend_;
  FirstFailure failure_;
  Cache* cache_ = nullptr;  // of the step that runs
  std::vector<LayerCall> calls_;
  std::list<StepGraph> graphs_;
  StepGraph* graph_ = nullptr;  // the prepared one
};

}  // namespace

std::unique_ptr<Runner> make_cpu_runner(const GgufModel& model, int threads, const std::vector<LayerLatents>& latents) {
  return std::make_unique<CpuRunner>(model, threads, latents);
}

}  // namespace kvmix
