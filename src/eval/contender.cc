#include "eval/contender.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "base/machine.h"

namespace kvmix {
namespace {

// The lengths at which a cache of this configuration seals pages when it is fed one token at a time, ascending: found by
// feeding one to small caches with the same sinks and windows.
std::vector<int64_t> seal_lengths(const CacheConfig& config, int64_t context) {
  CacheConfig probe;
  for (const LayerConfig& layer : config.layers) {
    const bool known = std::any_of(probe.layers.begin(), probe.layers.end(), [&](const LayerConfig& p) {
      return p.sinks == layer.sinks && p.window == layer.window && p.key.codec == layer.key.codec &&
             p.value.codec == layer.value.codec;
    });
    if (known) continue;
    LayerConfig small;
    small.q_heads = small.kv_heads = 1;
    small.head_dim = 32;
    small.scale = 1;
    small.sinks = layer.sinks;
    small.window = layer.window;
    small.key.codec = layer.key.codec;
    small.value.codec = layer.value.codec;
    probe.layers.push_back(small);
  }
  Cache cache(probe);
  const StepItem token{cache.create(), 1};
  const std::vector<float> row(32);
  std::vector<int64_t> lengths;
  int64_t sealed = 0;
  for (int64_t length = 0; length < context; ++length) {
    cache.begin_step({&token, 1});
    for (size_t l = 0; l < probe.layers.size(); ++l) cache.append(static_cast<int>(l), row.data(), 32, row.data(), 32, 0, 1);
    cache.end_step();
    if (const int64_t now = cache.stats().sealed_pages; now != sealed) {
      sealed = now;
      lengths.push_back(length);
    }
  }
  return lengths;
}

class Ours final : public Contender {
 public:
  Ours(std::shared_ptr<const Model> model, const Plan& plan, const ContenderOptions& o) : sequences_(o.sequences) {
    EngineOptions options;
    options.threads = o.threads;
    options.chunk_tokens = o.chunk_tokens;
    options.kernel = o.kernel;
    options.exact = o.exact;
    options.force_plan = o.force_plan;
    seals_ = seal_lengths(cache_config(plan, model->shape()), o.context);
    engine_ = std::make_unique<Engine>(std::move(model), plan, options);
    clear();
  }

  std::span<const float> feed(std::span<const Token> tokens, bool all_logits) override {
    const EngineItem item{ids_[0], tokens, all_logits, !all_logits};
    return engine_->step({&item, 1});
  }
  std::span<const float> decode(std::span<const Token> tokens) override {
    items_.clear();
    for (size_t s = 0; s < tokens.size(); ++s) items_.push_back({ids_[s], tokens.subspan(s, 1)});
    return engine_->step(items_);
  }
  void fill(std::span<const Token> tokens) override {
    for (const SequenceId id : ids_) engine_->prefill(id, tokens);
  }
  void truncate(int64_t n) override {
    for (const SequenceId id : ids_) engine_->cache().truncate(id, n);
  }
  void clear() override {
    for (const SequenceId id : ids_) engine_->cache().remove(id);
    ids_.clear();
    if (marked_) engine_->cache().remove(*marked_);
    marked_.reset();
    for (int s = 0; s < sequences_; ++s) ids_.push_back(engine_->cache().create());
  }
  void mark() override {
    if (marked_) engine_->cache().remove(*marked_);
    marked_ = engine_->cache().fork(ids_[0]);
  }
  void rewind() override {
    engine_->cache().remove(ids_[0]);
    ids_[0] = engine_->cache().fork(*marked_);
  }
  int64_t chunk_end(int64_t from) const override {
    const auto next = std::upper_bound(seals_.begin(), seals_.end(), from);
    return next == seals_.end() ? from + kPageTokens : std::min(*next, from + kPageTokens);
  }
  size_t cache_bytes(int64_t) const override {
    const MemoryReport memory = engine_->cache().memory();
    return memory.total_bytes / ids_.size();
  }
  std::string kernel() const override { return engine_->cache().stats().kernel; }

 private:
  int sequences_;
  std::unique_ptr<Engine> engine_;
  std::vector<SequenceId> ids_;
  std::optional<SequenceId> marked_;
  std::vector<EngineItem> items_;
  std::vector<int64_t> seals_;
};

class Theirs final : public Contender {
 public:
  Theirs(std::shared_ptr<const Model> model, const std::string& type, const ContenderOptions& o)
      : model_(std::move(model)), sequences_(o.sequences), peer_(model_->path(), type, o.context, o.threads, o.sequences) {}

  std::span<const float> feed(std::span<const Token> tokens, bool all_logits) override {
    length_ += static_cast<int64_t>(tokens.size());
    return peer_.step(tokens, all_logits, !all_logits);
  }
  std::span<const float> decode(std::span<const Token> tokens) override {
    ++length_;
    return peer_.step_batch(tokens);
  }
  void fill(std::span<const Token> tokens) override {
    length_ += static_cast<int64_t>(tokens.size());
    if (sequences_ == 1) {
      peer_.step(tokens, false, true);
    } else {
      peer_.fill_batch(tokens, sequences_);
    }
  }
  void truncate(int64_t n) override {
    peer_.truncate(n);
    length_ = n;
  }
  void clear() override {
    peer_.clear();
    length_ = 0;
  }
  // Its cells keep what they hold, so the first tokens of a sequence are the same again.
  void mark() override { marked_ = length_; }
  void rewind() override { truncate(marked_); }
  int64_t chunk_end(int64_t from) const override { return from + kPageTokens; }
  size_t cache_bytes(int64_t tokens) const override { return peer_.cache_bytes(model_->shape(), tokens); }
  std::string kernel() const override { return "ggml"; }

 private:
  std::shared_ptr<const Model> model_;
  int sequences_;
  int64_t length_ = 0, marked_ = 0;
  Peer peer_;
};

}  // namespace

std::unique_ptr<Contender> make_contender(std::shared_ptr<const Model> model, const EvalSubject& subject,
                                          const ContenderOptions& given) {
  ContenderOptions options = given;
  options.threads = thread_count(options.threads);
  if (subject.plan) return std::make_unique<Ours>(std::move(model), *subject.plan, options);
  return std::make_unique<Theirs>(std::move(model), subject.peer_type, options);
}

}  // namespace kvmix
