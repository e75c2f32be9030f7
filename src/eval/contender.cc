#include "eval/contender.h"

#include <algorithm>
#include <thread>

namespace kvmix {
namespace {

class Ours final : public Contender {
 public:
  Ours(std::shared_ptr<const Model> model, const Plan& plan, const ContenderOptions& o) : sequences_(o.sequences) {
    EngineOptions options;
    options.threads = o.threads;
    options.chunk_tokens = o.chunk_tokens;
    options.kernel = o.kernel;
    options.exact = o.exact;
    options.force_plan = o.force_plan;
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
    for (int s = 0; s < sequences_; ++s) ids_.push_back(engine_->cache().create());
  }
  int64_t first_chunk() const override { return engine_->plan().sinks + kPageTokens; }
  size_t cache_bytes(int64_t) const override {
    const MemoryReport memory = engine_->cache().memory();
    return memory.total_bytes / ids_.size();
  }
  std::string kernel() const override { return engine_->cache().stats().kernel; }

 private:
  int sequences_;
  std::unique_ptr<Engine> engine_;
  std::vector<SequenceId> ids_;
  std::vector<EngineItem> items_;
};

class Theirs final : public Contender {
 public:
  Theirs(std::shared_ptr<const Model> model, const std::string& type, const ContenderOptions& o)
      : model_(std::move(model)), sequences_(o.sequences), peer_(model_->path(), type, o.context, o.threads, o.sequences) {}

  std::span<const float> feed(std::span<const Token> tokens, bool all_logits) override {
    return peer_.step(tokens, all_logits, !all_logits);
  }
  std::span<const float> decode(std::span<const Token> tokens) override { return peer_.step_batch(tokens); }
  void fill(std::span<const Token> tokens) override {
    if (sequences_ == 1) {
      peer_.step(tokens, false, true);
    } else {
      peer_.fill_batch(tokens, sequences_);
    }
  }
  void truncate(int64_t n) override { peer_.truncate(n); }
  void clear() override { peer_.clear(); }
  int64_t first_chunk() const override { return kPageTokens; }
  size_t cache_bytes(int64_t tokens) const override { return peer_.cache_bytes(model_->shape(), tokens); }
  std::string kernel() const override { return "ggml"; }

 private:
  std::shared_ptr<const Model> model_;
  int sequences_;
  Peer peer_;
};

}  // namespace

std::unique_ptr<Contender> make_contender(std::shared_ptr<const Model> model, const EvalSubject& subject,
                                          const ContenderOptions& given) {
  ContenderOptions options = given;
  if (options.threads == 0) options.threads = static_cast<int>(std::clamp(std::thread::hardware_concurrency(), 1u, 256u));
  if (subject.plan) return std::make_unique<Ours>(std::move(model), *subject.plan, options);
  return std::make_unique<Theirs>(std::move(model), subject.peer_type, options);
}

}  // namespace kvmix
