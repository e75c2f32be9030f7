// Perplexity and divergence of caches against our f16 cache, by teacher forcing over what the running cache stores.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <deque>

#include "base/machine.h"
#include "base/parallel.h"
#include "engine/float_copy.h"
#include "eval/contender.h"
#include "eval/windows.h"
#include "kvmix/error.h"
#include "score/divergence.h"

namespace kvmix {
namespace {

constexpr int kPositionBins = 32;

int64_t first_scored(int64_t context, int64_t scored) { return scored > 0 ? context - scored : context / 2; }

struct Tally {
  std::vector<float> kl;
  std::vector<double> bin_kl = std::vector<double>(kPositionBins), bin_count = std::vector<double>(kPositionBins);
  double nll = 0, seconds = 0;
  int64_t same_top = 0;
  size_t cache_bytes = 0;
  double body_bits = 0;
  double kept = 1;
};

class Evaluation {
 public:
  Evaluation(std::shared_ptr<const Model> model, std::span<const EvalSubject> subjects, const EvalOptions& options)
      : model_(std::move(model)), options_(options), vocab_(static_cast<size_t>(model_->vocab_size())) {
    threads_ = thread_count(options.threads);
    ContenderOptions contender;
    contender.context = options.context;
    contender.threads = threads_;
    contender.device = options.device;
    contender.chunk_tokens = kPageTokens;
    contender.kernel = options.kernel;
    contender.exact = options.exact;
    contender.force_plan = options.force_plan;
    reference_ = make_contender(model_, {"f16", f16_plan(model_->shape()), ""}, contender);
    tallies_.resize(subjects.size() + 1);
    fed_.resize(subjects.size() + 1);
    lost_.resize(subjects.size());
    for (size_t s = 0; s < subjects.size(); ++s) {
      peer_.push_back(!subjects[s].plan);
      contenders_.emplace_back();
      or_lose(s, [&] { contenders_[s] = make_contender(model_, subjects[s], contender); });
    }
  }

  void window(std::span<const Token> tokens, const std::function<void(int64_t)>& fed) {
    tokens_ = tokens;
    options_.context = static_cast<int64_t>(tokens.size());
    first_scored_ = first_scored(options_.context, options_.scored);
    rows_.clear();
    rows_base_ = first_scored_;
    reference_->clear();
    std::fill(fed_.begin(), fed_.end(), int64_t{0});
    for (auto& c : contenders_) {
      if (!c) continue;
      c->clear();
      c->set_prompt(first_scored_);
    }
    while (fed_[0] < options_.context) {
      fed(advance_reference());
      for (size_t s = 0; s < contenders_.size(); ++s) {
        // As far as the reference has rows: a contender's own chunks end where its pages do.
        while (contenders_[s] && fed_[s + 1] < options_.context && next_end(*contenders_[s], fed_[s + 1]) <= fed_[0])
          or_lose(s, [&] { fed(advance(s)); });
        if (!contenders_[s]) fed_[s + 1] = fed_[0];
      }
      const int64_t slowest = *std::min_element(fed_.begin(), fed_.end());
      for (; rows_base_ < slowest && !rows_.empty(); ++rows_base_) {
        free_rows_.push_back(std::move(rows_.front()));
        rows_.pop_front();
      }
    }
  }

  const std::string& lost(size_t s) const { return lost_[s]; }
  std::vector<Tally>& tallies() { return tallies_; }

 private:
  int64_t next_end(const Contender& c, int64_t fed) const { return std::min(options_.context, c.chunk_end(fed)); }

  bool scored(int64_t position) const { return position >= first_scored_ && position + 1 < options_.context; }

  // A peer that fails is left out from then on.
  template <typename Work>
  void or_lose(size_t s, const Work& work) {
    try {
      work();
    } catch (const Error& e) {
      if (!peer_[s] || e.status() == Status::kCancelled || e.status() == Status::kInvalidArgument) throw;
      contenders_[s].reset();
      lost_[s] = e.what();
    }
  }

  int64_t advance_reference() {
    const auto start = std::chrono::steady_clock::now();
    const int64_t from = fed_[0], to = std::min(options_.context, from + kPageTokens);
    const bool wanted = to > first_scored_;
    const auto logits = reference_->feed(tokens_.subspan(static_cast<size_t>(from), static_cast<size_t>(to - from)), wanted);
    if (wanted) {
      const int64_t first = std::max(from, first_scored_);
      const size_t old = rows_.size();
      for (int64_t p = first; p < to; ++p) {
        rows_.push_back(free_rows_.empty() ? ReferenceRow{} : std::move(free_rows_.back()));
        if (!free_rows_.empty()) free_rows_.pop_back();
      }
      Tally& tally = tallies_[0];
      parallel_for(threads_, static_cast<size_t>(to - first), [&](size_t i) {
        set_reference(logits.subspan((static_cast<size_t>(first - from) + i) * vocab_, vocab_), rows_[old + i]);
      });
      for (int64_t p = first; p < to; ++p) {
        if (!scored(p)) continue;
        const ReferenceRow& row = rows_[old + static_cast<size_t>(p - first)];
        tally.nll += row.log_sum - static_cast<double>(row.logits[static_cast<size_t>(tokens_[static_cast<size_t>(p + 1)])]);
        tally.kl.push_back(0);
        ++tally.same_top;
      }
    }
    fed_[0] = to;
    tallies_[0].seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (to == options_.context) {
      tallies_[0].cache_bytes = reference_->cache_bytes(options_.context);
      tallies_[0].body_bits = reference_->body_bits(options_.context);
    }
    return to - from;
  }

  int64_t advance(size_t s) {
    const auto start = std::chrono::steady_clock::now();
    Contender& c = *contenders_[s];
    const int64_t from = fed_[s + 1], to = next_end(c, from);
    const bool wanted = to > first_scored_;
    const auto logits = c.feed(tokens_.subspan(static_cast<size_t>(from), static_cast<size_t>(to - from)), wanted);
    if (wanted) {
      std::vector<RowScore> scores(static_cast<size_t>(to - from));
      parallel_for(threads_, scores.size(), [&](size_t i) {
        const int64_t p = from + static_cast<int64_t>(i);
        if (!scored(p)) return;
        scores[i] = score_row(rows_[static_cast<size_t>(p - rows_base_)], logits.subspan(i * vocab_, vocab_),
                              tokens_[static_cast<size_t>(p + 1)]);
      });
      Tally& tally = tallies_[s + 1];
      for (size_t i = 0; i < scores.size(); ++i) {
        const int64_t p = from + static_cast<int64_t>(i);
        if (!scored(p)) continue;
        if (!std::isfinite(scores[i].kl) || !std::isfinite(scores[i].nll)) {
          throw Error(Status::kInternal,
                      "its logits at token " + std::to_string(p) + " of a window are not finite; leave this row out");
        }
        tally.kl.push_back(static_cast<float>(scores[i].kl));
        tally.nll += scores[i].nll;
        tally.same_top += scores[i].same_top ? 1 : 0;
        const auto bin = static_cast<size_t>((p - first_scored_) * kPositionBins / (options_.context - first_scored_));
        tally.bin_kl[bin] += scores[i].kl;
        tally.bin_count[bin] += 1;
      }
    }
    fed_[s + 1] = to;
    tallies_[s + 1].seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (to == options_.context) {
      tallies_[s + 1].cache_bytes = c.cache_bytes(options_.context);
      tallies_[s + 1].body_bits = c.body_bits(options_.context);
      tallies_[s + 1].kept = c.kept(options_.context);
    }
    return to - from;
  }

  std::shared_ptr<const Model> model_;
  EvalOptions options_;
  size_t vocab_;
  int threads_;
  std::unique_ptr<Contender> reference_;
  std::vector<std::unique_ptr<Contender>> contenders_;
  std::vector<Tally> tallies_;  // the reference first
  std::vector<int64_t> fed_;
  std::vector<bool> peer_;
  std::vector<std::string> lost_;
  std::span<const Token> tokens_;
  int64_t first_scored_ = 0, rows_base_ = 0;
  std::deque<ReferenceRow> rows_;
  std::vector<ReferenceRow> free_rows_;
};

EvalRow make_row(const std::string& name, Tally tally, const Tally& reference, double elements) {
  EvalRow row;
  row.name = name;
  const auto n = static_cast<double>(tally.kl.size());
  row.scored_tokens = static_cast<int64_t>(tally.kl.size());
  row.perplexity = std::exp(tally.nll / n);
  row.perplexity_ratio = std::exp((tally.nll - reference.nll) / n);
  double sum = 0, squares = 0;
  for (const float k : tally.kl) {
    sum += static_cast<double>(k);
    squares += static_cast<double>(k) * static_cast<double>(k);
  }
  row.kl_mean = sum / n;
  row.kl_stderr = n > 1 ? std::sqrt(std::max(0.0, squares / n - row.kl_mean * row.kl_mean) / (n - 1)) : 0;
  std::sort(tally.kl.begin(), tally.kl.end());
  row.kl_p99 = static_cast<double>(tally.kl[std::min(tally.kl.size() - 1, static_cast<size_t>(0.99 * n))]);
  row.kl_max = static_cast<double>(tally.kl.back());
  row.top1 = static_cast<double>(tally.same_top) / n;
  row.cache_bytes = tally.cache_bytes;
  row.body_bits = tally.body_bits;
  row.kept = tally.kept;
  row.bits_per_element = static_cast<double>(tally.cache_bytes) * 8 / elements;
  row.seconds = tally.seconds;
  return row;
}

}  // namespace

std::vector<EvalRow> evaluate_tokens(std::shared_ptr<const Model> model, std::span<const std::vector<Token>> windows,
                                     std::span<const EvalSubject> subjects, const EvalOptions& options,
                                     const Progress& progress) {
  if (windows.empty()) throw Error(Status::kInvalidArgument, "nothing to evaluate: no windows");
  size_t longest = 0;
  double total = 0;
  for (const auto& window : windows) {
    if (window.size() < 8) throw Error(Status::kInvalidArgument, "a window needs at least 8 tokens");
    if (options.scored < 0 || options.scored == 1 || options.scored >= static_cast<int64_t>(window.size())) {
      throw Error(Status::kInvalidArgument, "scored is " + std::to_string(options.scored) + " of a window of " +
                                                std::to_string(window.size()) +
                                                " tokens; take 0 for its second half, or 2 to all but one");
    }
    longest = std::max(longest, window.size());
    total += static_cast<double>(window.size() * (subjects.size() + 1));
  }
  EvalOptions sized = options;
  sized.context = static_cast<int64_t>(longest);
  if (sized.context > model->shape().context_tokens) {
    throw Error(Status::kInvalidArgument, "windows of " + std::to_string(sized.context) +
                                              " tokens exceed the model's context of " +
                                              std::to_string(model->shape().context_tokens) + "; take shorter ones");
  }
  Evaluation evaluation(model, subjects, sized);
  const auto rows_after = [&](size_t length) {
    const double elements = f16_elements(model->shape(), static_cast<int64_t>(length));
    const std::vector<Tally>& tallies = evaluation.tallies();
    std::vector<EvalRow> rows;
    for (size_t r = 0; r < tallies.size(); ++r) {
      if (r > 0 && !evaluation.lost(r - 1).empty()) {
        rows.emplace_back().name = subjects[r - 1].name;
        rows.back().lost = evaluation.lost(r - 1);
        continue;
      }
      rows.push_back(make_row(r == 0 ? "f16" : subjects[r - 1].name, tallies[r], tallies[0], elements));
      for (int b = 0; r > 0 && b < kPositionBins; ++b) {
        const auto bin = static_cast<size_t>(b);
        if (tallies[r].bin_count[bin] == 0) continue;
        const auto end = static_cast<int64_t>(longest), from = first_scored(end, options.scored);
        rows.back().kl_by_position.emplace_back(from + (2 * b + 1) * (end - from) / (2 * kPositionBins),
                                                tallies[r].bin_kl[bin] / tallies[r].bin_count[bin]);
      }
    }
    return rows;
  };
  double done = 0;
  for (size_t w = 0; w < windows.size(); ++w) {
    evaluation.window(windows[w], [&](int64_t n) {
      done += static_cast<double>(n);
      if (progress && !progress(done, total, "evaluating")) throw Error(Status::kCancelled, "stopped while evaluating");
    });
    if (options.on_window) options.on_window(rows_after(windows[w].size()), w + 1);
  }
  return rows_after(windows.back().size());
}

std::vector<EvalRow> evaluate(std::shared_ptr<const Model> model, const std::string& text,
                              std::span<const EvalSubject> subjects, const EvalOptions& options, const Progress& progress) {
  const std::vector<std::vector<Token>> windows = text_windows(*model, text, options.context, options.windows);
  if (!options.float_weights) return evaluate_tokens(std::move(model), windows, subjects, options, progress);
  // The copy has another fingerprint; plans are held to the model that was named.
  for (const EvalSubject& s : subjects) {
    if (s.plan) check_plan(*s.plan, model->shape(), options.force_plan);
  }
  const FloatCopy copy(model->path());
  EvalOptions forced = options;
  forced.force_plan = true;
  return evaluate_tokens(Model::load(copy.path()), windows, subjects, forced, progress);
}

}  // namespace kvmix
