// SnapKV (arXiv 2404.14469): the last queries of a prompt vote for older tokens; the best of each KV head stay.
#include "policy/window_vote.h"

namespace kvmix {
namespace {

class SnapKv final : public Policy {
 public:
  explicit SnapKv(const PolicyValues& values) : vote_(values), budget_(values.budget(vote_.sinks + vote_.window)) {}

  Needs needs() const override { return vote_.needs(); }
  Protection protection(const LayerShape&, int64_t) const override { return vote_.protection(); }
  int64_t most_tokens(const LayerShape& shape, int64_t prompt_length) const override {
    return shape.kv_heads * std::min(prompt_length, budget_.capacity(shape, prompt_length, vote_.protection()));
  }

 protected:
  void decide_prompt(const PolicyView& view, PolicyScratch& scratch, Decision& decision) const override {
    const int64_t capacity = budget_.capacity(view.shape, view.prompt_length, vote_.protection());
    for (size_t h = 0; h < view.heads.size(); ++h) {
      const Candidates range = vote_.vote(view, h, scratch);
      keep_capacity(view.heads[h].size(), range, scratch.pooled, capacity, scratch, decision.heads[h].drop);
    }
  }

 private:
  WindowVote vote_;
  Budget budget_;
};

}  // namespace

extern const PolicyEntry kSnapkvPolicy;
const PolicyEntry kSnapkvPolicy = {
    {"snapkv", "tokens that the prompt's last queries look at", "arXiv 2404.14469", window_vote_parameters(32)},
    [](const PolicyValues& values) -> std::unique_ptr<Policy> { return std::make_unique<SnapKv>(values); }};

}  // namespace kvmix
