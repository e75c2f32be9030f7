// H2O (arXiv 2306.14048): recent tokens and the heavy hitters, by attention accumulated over all queries. Query heads that
// share a KV head are averaged. After each token the cheapest older one goes, once the budget is full.
#include <algorithm>
#include <cmath>

#include "policy/parameters.h"
#include "policy/select.h"

namespace kvmix {
namespace {

class H2o final : public Policy {
 public:
  explicit H2o(const PolicyValues& values)
      : sinks_(values.integer("sinks")),
        recent_(values.number("recent")),
        budget_(values.budget(sinks_ + (recent_ < 1 ? 0 : static_cast<int64_t>(recent_)))),
        every_(values.integer("every")),
        mean_(values.choice("score") == "mean"),
        evict_(values.choice("decode") == "evict") {
    if (recent_ >= 1 && recent_ != std::floor(recent_))
      values.fail("recent is neither a fraction nor a whole number of tokens");
  }

  Needs needs() const override { return {.mass = MassReduce::kMean, .mass_every = every_, .every_step = evict_}; }
  Protection protection(const LayerShape& shape, int64_t prompt_length) const override {
    if (recent_ >= 1) return {sinks_, static_cast<int64_t>(recent_)};
    const int64_t capacity = budget_.capacity(shape, prompt_length, {sinks_, 0});
    return {sinks_, std::min(capacity - sinks_, static_cast<int64_t>(recent_ * static_cast<double>(capacity) + 1e-9))};
  }
  int64_t most_tokens(const LayerShape& shape, int64_t prompt_length) const override {
    return shape.kv_heads * std::min(prompt_length, capacity(shape, prompt_length));
  }
  int64_t most_decoding(const LayerShape& shape, int64_t prompt_length) const override {
    return evict_ ? shape.kv_heads * capacity(shape, prompt_length) : kUnbounded;
  }

 protected:
  void decide_prompt(const PolicyView& view, PolicyScratch& scratch, Decision& decision) const override {
    evict(view, scratch, decision);
  }
  void decide_token(const PolicyView& view, PolicyScratch& scratch, Decision& decision) const override {
    evict(view, scratch, decision);
  }

 private:
  int64_t capacity(const LayerShape& shape, int64_t prompt_length) const {
    return budget_.capacity(shape, prompt_length, protection(shape, prompt_length));
  }
  double score(const HeadView& head, size_t i) const {
    const double mass = finite(head.mass[i]);
    return mean_ ? mass / std::max(1, head.queries[i]) : mass;
  }

  void evict(const PolicyView& view, PolicyScratch& scratch, Decision& decision) const {
    const Protection kept = protection(view.shape, view.prompt_length);
    const auto most = static_cast<size_t>(capacity(view.shape, view.prompt_length));
    for (size_t h = 0; h < view.heads.size(); ++h) {
      const HeadView& head = view.heads[h];
      if (head.size() <= most) continue;
      // The window is of the tokens that are here: the one to come is not among them.
      const Candidates range = candidates(head, kept, view.length);
      if (range.size() == 0) continue;
      if (head.size() == most + 1) {  // every token's step: one pass, no order
        size_t least = range.first;
        double least_score = score(head, least);
        for (size_t i = range.first + 1; i < range.last; ++i) {
          const double s = score(head, i);
          if (s <= least_score) least = i, least_score = s;
        }
        decision.heads[h].drop.push_back(static_cast<int32_t>(least));
        continue;
      }
      scratch.score.resize(head.size());
      for (size_t i = 0; i < head.size(); ++i) scratch.score[i] = score(head, i);
      keep_capacity(head.size(), range, scratch.score, static_cast<int64_t>(most), scratch, decision.heads[h].drop);
    }
  }

  int64_t sinks_;
  double recent_;
  Budget budget_;
  int every_;
  bool mean_, evict_;
};

}  // namespace

extern const PolicyEntry kH2oPolicy;
const PolicyEntry kH2oPolicy = {
    {"h2o",
     "recent tokens and those with the most attention so far",
     "arXiv 2306.14048",
     {keep_parameter(), tokens_parameter(), sinks_parameter(0),
      number_parameter("recent", 0.5, 0, 1 << 16, "newest tokens always kept: below 1 a fraction of the budget, else a count"),
      choice_parameter("score", {"sum", "mean"}, "attention summed over queries, or per query that could see the token"),
      every_parameter(), decode_parameter()}},
    [](const PolicyValues& values) -> std::unique_ptr<Policy> { return std::make_unique<H2o>(values); }};

}  // namespace kvmix
