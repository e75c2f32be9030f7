// The file to read first: one step of a model with its cache.
//
//   embed                                          Architecture::embed
//   per layer: project q, k, v and rotate          Architecture::layer
//              append, seal what left the window   GraphHooks::attention -> Cache::append
//              attend on packed pages                                    -> Cache::attend
//              finish the layer                    Architecture::layer
//   logits of the wanted rows                      Architecture::head
//
// All of it is one ggml graph, which a Runner (runner.h) runs on its device.
#include <algorithm>
#include <chrono>

#include "base/checksum.h"
#include "base/machine.h"
#include "engine/runner.h"
#include "kvmix/engine.h"
#include "kvmix/error.h"

namespace kvmix {

struct Engine::Impl {
  Impl(std::shared_ptr<const Model> m, const Plan& p, const EngineOptions& o)
      : model(std::move(m)), inside(gguf_model(*model)), plan(p), options(o) {
    options.threads = thread_count(options.threads);
    if (options.threads < 1 || options.threads > 256) throw Error(Status::kInvalidArgument, "threads must be 1 to 256");
    if (options.chunk_tokens < 1 || options.chunk_tokens > 8192)
      throw Error(Status::kInvalidArgument, "chunk_tokens must be 1 to 8192");
    check_plan(plan, model->shape(), options.force_plan);
    std::vector<LayerLatents> latents;
    if (options.device == "cpu") {
      latents = load_latents(inside, plan, options.force_plan);
      runner = make_cpu_runner(inside, options.threads, latents);
    } else if (options.device == "cuda") {
      if (plan.rank) {
        throw Error(Status::kUnsupported,
                    "a plan with \"rank\" does not run on the device \"cuda\"; take one without, or the device \"cpu\"");
      }
      runner = make_cuda_runner(inside);
    } else {
      throw Error(Status::kInvalidArgument, "device \"" + options.device + "\" is unknown; expected \"cpu\" or \"cuda\"");
    }
    CacheConfig config = cache_config(plan, model->shape());
    for (size_t l = 0; l < latents.size(); ++l) config.layers[l].factors = latents[l].factors;
    config.device = options.device;
    config.max_bytes = options.max_cache_bytes;
    config.kernel = options.kernel;
    config.exact = options.exact;
    runner->configure(config);
    cache = std::make_unique<Cache>(std::move(config));
  }

  std::shared_ptr<const Model> model;
  const GgufModel& inside;
  Plan plan;
  EngineOptions options;
  std::unique_ptr<Runner> runner;
  std::unique_ptr<Cache> cache;
  EngineStats stats;
  std::vector<StepItem> items;
  std::vector<Token> tokens, positions, rows;
};

Engine::Engine(std::shared_ptr<const Model> model, const Plan& plan, const EngineOptions& options)
    : impl_(std::make_unique<Impl>(std::move(model), plan, options)) {}
Engine::~Engine() = default;

const Model& Engine::model() const { return *impl_->model; }
const Plan& Engine::plan() const { return impl_->plan; }
Cache& Engine::cache() { return *impl_->cache; }

std::string Engine::cache_fingerprint() const {
  Checksum sum;
  Plan named = impl_->plan;
  if (named.rank) named.rank->factors.clear();  // its checksum says which factors
  const std::string plan = to_json(named);
  sum.update(plan.data(), plan.size());
  return impl_->model->shape().fingerprint + "+" + std::to_string(sum.value());
}

EngineStats Engine::stats() const {
  EngineStats stats = impl_->stats;
  stats.wait_seconds = impl_->runner->wait_seconds();
  return stats;
}

std::span<const float> Engine::step(std::span<const EngineItem> work) {
  Impl& impl = *impl_;
  const auto began = std::chrono::steady_clock::now();
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
  impl.runner->prepare(static_cast<int64_t>(impl.tokens.size()), static_cast<int64_t>(impl.rows.size()));
  impl.cache->begin_step(impl.items);
  std::span<const float> logits;
  try {
    logits = impl.runner->run(*impl.cache, {impl.tokens, impl.positions, impl.rows});
  } catch (const NotFinite& found) {
    impl.cache->abort_step();
    impl.inside.refuse_not_finite(found.where);
  } catch (...) {
    impl.cache->abort_step();
    throw;
  }
  impl.cache->end_step();
  ++impl.stats.steps;
  impl.stats.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
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
