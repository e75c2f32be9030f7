#include "eval/contender.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "base/machine.h"

namespace kvmix {
namespace {

class Ours final : public Contender {
 public:
  Ours(std::shared_ptr<const Model> model, const Plan& plan, const ContenderOptions& o) : sequences_(o.sequences) {
    EngineOptions options;
    options.device = o.device;
    options.threads = o.threads;
    options.chunk_tokens = o.chunk_tokens;
    options.kernel = o.kernel;
    options.exact = o.exact;
    options.force_plan = o.force_plan;
    chooses_ = plan.tokens.has_value() || plan.channels.has_value();
    engine_ = std::make_unique<Engine>(std::move(model), plan, options);
    clear();
  }

  std::span<const float> feed(std::span<const Token> tokens, bool all_logits) override {
    const int64_t end = engine_->cache().length(ids_[0]) + static_cast<int64_t>(tokens.size());
    const bool prompt = end <= prompt_;
    const EngineItem item{.sequence = ids_[0],
                          .tokens = tokens,
                          .all_logits = all_logits,
                          .no_logits = !all_logits,
                          .more = prompt && end < prompt_,
                          .decoded = !prompt};
    return engine_->step({&item, 1});
  }
  std::span<const float> decode(std::span<const Token> tokens) override {
    items_.clear();
    for (size_t s = 0; s < tokens.size(); ++s) items_.push_back({ids_[s], tokens.subspan(s, 1)});
    return engine_->step(items_);
  }
  void spread() override {
    if (sequences_ == 1) return;
    for (; ids_.size() > 1; ids_.pop_back()) engine_->cache().remove(ids_.back());
    const int64_t n = engine_->cache().length(ids_[0]);
    // What the last chunk left to be sealed is sealed by the next step, and need not be copied.
    const Token token = 0;
    const EngineItem item{.sequence = ids_[0], .tokens = {&token, 1}, .no_logits = true};
    engine_->step({&item, 1});
    engine_->cache().truncate(ids_[0], n);
    while (ids_.size() < static_cast<size_t>(sequences_)) {
      ids_.push_back(engine_->cache().copy(ids_[0]));
      engine_->cache().truncate(ids_.back(), shorter(n, ids_.size() - 1));
    }
  }
  void truncate(int64_t n) override {
    for (size_t s = 0; s < ids_.size(); ++s) engine_->cache().truncate(ids_[s], shorter(n, s));
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
  void set_prompt(int64_t tokens) override { prompt_ = chooses_ ? tokens : 0; }
  int64_t chunk_end(int64_t from) const override {
    if (from < prompt_) return std::min(prompt_, from + kPageTokens);
    return std::min(engine_->cache().next_seal(ids_[0]), from + kPageTokens);
  }
  double kept(int64_t tokens) const override {
    double sum = 0, heads = 0;
    for (size_t l = 0; l < engine_->cache().config().layers.size(); ++l) {
      if (engine_->cache().config().layers[l].sliding_window > 0) continue;
      for (const auto& head : engine_->cache().kept(ids_[0], static_cast<int>(l))) {
        sum += static_cast<double>(head.size());
        heads += static_cast<double>(tokens);
      }
    }
    return heads > 0 ? sum / heads : 1;
  }
  size_t cache_bytes(int64_t) const override {
    const MemoryReport memory = engine_->cache().memory();
    // A device's memory comes in chunks, each for pages of one size, which one sequence does not fill: their rest is not its.
    return (memory.total_bytes - (engine_->cache().config().device == "cuda" ? memory.slack_bytes : 0)) / ids_.size();
  }
  double body_bits(int64_t tokens) const override { return predict_body_bits(engine_->cache().config(), tokens); }
  std::string kernel() const override { return engine_->cache().stats().kernel; }
  std::pair<int64_t, double> host_seconds() const override {
    const EngineStats stats = engine_->stats();
    return {stats.steps, stats.seconds - stats.wait_seconds};
  }

 private:
  // Tokens of sequence s where sequence 0 has n.
  static int64_t shorter(int64_t n, size_t s) { return n - std::min<int64_t>(n / 2, static_cast<int64_t>(s) % kPageTokens); }

  int sequences_;
  std::unique_ptr<Engine> engine_;
  std::vector<SequenceId> ids_;
  std::optional<SequenceId> marked_;
  std::vector<EngineItem> items_;
  bool chooses_ = false;  // what it keeps depends on where prompts end
  int64_t prompt_ = 0;
};

class Theirs final : public Contender {
 public:
  Theirs(std::shared_ptr<const Model> model, const std::string& type, const ContenderOptions& o)
      : model_(std::move(model)),
        type_(type),
        sequences_(o.sequences),
        peer_(model_->path(), type, o.context, o.threads, o.sequences, o.device) {}

  std::span<const float> feed(std::span<const Token> tokens, bool all_logits) override {
    length_ += static_cast<int64_t>(tokens.size());
    return peer_.step(tokens, all_logits, !all_logits);
  }
  std::span<const float> decode(std::span<const Token> tokens) override {
    ++length_;
    return peer_.step_batch(tokens);
  }
  void spread() override { peer_.spread(sequences_); }
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
  void set_prompt(int64_t) override {}
  int64_t chunk_end(int64_t from) const override { return from + kPageTokens; }
  double kept(int64_t) const override { return 1; }
  size_t cache_bytes(int64_t tokens) const override { return Peer::cache_bytes(type_, model_->shape(), tokens); }
  double body_bits(int64_t) const override { return peer_.bits_per_element(); }
  std::string kernel() const override { return "ggml"; }
  std::pair<int64_t, double> host_seconds() const override { return {0, 0}; }

 private:
  std::shared_ptr<const Model> model_;
  std::string type_;
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

std::vector<EvalSubject> rows_after_f16(const ModelShape& model, std::span<const EvalSubject> subjects, bool force_plan) {
  std::vector<EvalSubject> rows{{"f16", f16_plan(model), ""}};
  rows.insert(rows.end(), subjects.begin(), subjects.end());
  for (const EvalSubject& s : rows) {
    if (s.plan) check_plan(*s.plan, model, force_plan);
  }
  return rows;
}

double f16_elements(const ModelShape& model, int64_t tokens) {
  return live_elements(cache_config(f16_plan(model), model), tokens);
}

}  // namespace kvmix
