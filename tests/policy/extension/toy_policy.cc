// A policy that exists only in scripts/extend's scratch copy: the newest tokens.
#include "policy/parameters.h"
#include "policy/select.h"

namespace kvmix {
namespace {

class Toy final : public Policy {
 public:
  explicit Toy(const PolicyValues& values) : budget_(values.budget(1)) {}

  Needs needs() const override { return {}; }
  bool heads_share() const override { return true; }
  Protection protection(const LayerShape& shape, int64_t prompt_length) const override {
    return {0, budget_.capacity(shape, prompt_length, {0, 1})};
  }
  int64_t most_tokens(const LayerShape& shape, int64_t prompt_length) const override {
    return shape.kv_heads * std::min(prompt_length, budget_.capacity(shape, prompt_length, {0, 1}));
  }

 protected:
  void decide_prompt(const PolicyView& view, PolicyScratch&, Decision& decision) const override {
    const Protection kept = protection(view.shape, view.prompt_length);
    for (size_t h = 0; h < view.heads.size(); ++h) {
      const Candidates range = candidates(view, h, kept);
      for (size_t i = range.first; i < range.last; ++i) decision.heads[h].drop.push_back(static_cast<int32_t>(i));
    }
  }

 private:
  Budget budget_;
};

}  // namespace

extern const PolicyEntry kToyPolicy;
const PolicyEntry kToyPolicy = {
    {"toy", "the newest tokens", "none", {keep_parameter(), tokens_parameter()}},
    [](const PolicyValues& values) -> std::unique_ptr<Policy> { return std::make_unique<Toy>(values); }};

}  // namespace kvmix
