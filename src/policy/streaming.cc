// StreamingLLM (arXiv 2309.17453): attention sinks and the newest tokens. Tokens keep the positions that they were rotated to;
// the paper's renumbering inside the cache would need keys stored before rotation.
#include "policy/parameters.h"
#include "policy/select.h"

namespace kvmix {
namespace {

class Streaming final : public Policy {
 public:
  explicit Streaming(const PolicyValues& values)
      : sinks_(values.integer("sinks")), budget_(values.budget(sinks_ + 1)), evict_(values.choice("decode") == "evict") {}

  Needs needs() const override { return {.every_step = evict_}; }
  bool heads_share() const override { return true; }
  Protection protection(const LayerShape& shape, int64_t prompt_length) const override {
    const int64_t capacity = budget_.capacity(shape, prompt_length, {sinks_, 1});
    return {sinks_, capacity - sinks_};
  }
  int64_t most_tokens(const LayerShape& shape, int64_t prompt_length) const override {
    return shape.kv_heads * std::min(prompt_length, budget_.capacity(shape, prompt_length, {sinks_, 1}));
  }
  int64_t most_decoding(const LayerShape& shape, int64_t prompt_length) const override {
    return evict_ ? shape.kv_heads * (budget_.capacity(shape, prompt_length, {sinks_, 1}) - 1) : kUnbounded;
  }

 protected:
  void decide_prompt(const PolicyView& view, PolicyScratch&, Decision& decision) const override { drop_middle(view, decision); }
  void decide_token(const PolicyView& view, PolicyScratch&, Decision& decision) const override { drop_middle(view, decision); }

 private:
  void drop_middle(const PolicyView& view, Decision& decision) const {
    const Protection kept = protection(view.shape, view.prompt_length);
    for (size_t h = 0; h < view.heads.size(); ++h) {
      const Candidates range = candidates(view, h, kept);
      for (size_t i = range.first; i < range.last; ++i) decision.heads[h].drop.push_back(static_cast<int32_t>(i));
    }
  }

  int64_t sinks_;
  Budget budget_;
  bool evict_;
};

}  // namespace

extern const PolicyEntry kStreamingPolicy;
const PolicyEntry kStreamingPolicy = {
    {"streaming",
     "the first tokens and the newest ones",
     "arXiv 2309.17453",
     {keep_parameter(), tokens_parameter(), sinks_parameter(4), decode_parameter()}},
    [](const PolicyValues& values) -> std::unique_ptr<Policy> { return std::make_unique<Streaming>(values); }};

}  // namespace kvmix
