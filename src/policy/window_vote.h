// What SnapKV, PyramidKV and Ada-KV share: the last `window` queries of a prompt vote for the tokens before them, votes are
// averaged over the query heads of a KV head and pooled along the sequence (SnapKV, arXiv 2404.14469, section 4).
#pragma once

#include <algorithm>

#include "policy/parameters.h"
#include "policy/select.h"

namespace kvmix {

struct WindowVote {
  int64_t sinks;
  int window;
  Pooling pooling;
  int kernel;

  explicit WindowVote(const PolicyValues& values)
      : sinks(values.integer("sinks")),
        window(values.integer("window")),
        pooling(parse_pooling(values.choice("pooling"))),
        kernel(values.integer("kernel")) {
    if (kernel % 2 == 0) values.fail("kernel is " + std::to_string(kernel) + "; expected an odd number");
  }

  Needs needs() const { return {.window_queries = window}; }
  Protection protection() const { return {sinks, window}; }

  // The head's pooled votes in scratch.pooled, one for each token before the window.
  Candidates vote(const PolicyView& view, size_t head, PolicyScratch& scratch) const {
    const Candidates range = candidates(view, head, protection());
    window_scores(view.heads[head], view.shape.heads_per_kv, scratch.score);
    pool(std::span(scratch.score).first(range.last), pooling, kernel, scratch.pooled);
    return range;
  }
};

// A policy that keeps each KV head's best votes, up to a capacity of the layer's.
class VotePolicy : public Policy {
 public:
  explicit VotePolicy(const PolicyValues& values) : vote_(values), budget_(values.budget(vote_.sinks + vote_.window)) {}

  Needs needs() const final { return vote_.needs(); }
  Protection protection(const LayerShape&, int64_t) const final { return vote_.protection(); }
  int64_t most_tokens(const LayerShape& shape, int64_t prompt_length) const final {
    return shape.kv_heads * std::min(prompt_length, capacity(shape, prompt_length));
  }

 protected:
  // Tokens that a KV head keeps, on average over the layer's.
  virtual int64_t capacity(const LayerShape& shape, int64_t prompt_length) const {
    return budget_.capacity(shape, prompt_length, vote_.protection());
  }
  void decide_prompt(const PolicyView& view, PolicyScratch& scratch, Decision& decision) const override {
    const int64_t most = capacity(view.shape, view.prompt_length);
    for (size_t h = 0; h < view.heads.size(); ++h) {
      const Candidates range = vote_.vote(view, h, scratch);
      keep_capacity(view.heads[h].size(), range, scratch.pooled, most, scratch, decision.heads[h].drop);
    }
  }

  const WindowVote vote_;
  const Budget budget_;
};

// Their parameters; others follow.
inline std::vector<PolicyParameter> window_vote_parameters(int window, std::vector<PolicyParameter> more = {}) {
  std::vector<PolicyParameter> parameters = {
      keep_parameter(),
      tokens_parameter(),
      sinks_parameter(0),
      window_parameter(window, "newest tokens of the prompt, always kept, whose queries vote"),
      choice_parameter("pooling", {"max", "avg", "none"}, "how votes are smoothed along the sequence"),
      integer_parameter("kernel", 7, 1, 255, "tokens that are pooled, an odd number")};
  parameters.insert(parameters.end(), more.begin(), more.end());
  return parameters;
}

}  // namespace kvmix
