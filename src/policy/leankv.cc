// LeanKV, now DiffKV (arXiv 2412.03131): each KV head sorts its tokens into high precision, low precision and dropped, by
// thresholds on their mean attention rather than by a budget. While decoding, each new token may push the least significant
// older one of the high tier down or out.
#include <limits>

#include "policy/parameters.h"
#include "policy/select.h"

namespace kvmix {
namespace {

class LeanKv final : public Policy {
 public:
  explicit LeanKv(const PolicyValues& values)
      : high_(values.number("high")),
        low_(values.number("low")),
        kept_{values.integer("sinks"), values.integer("window")},
        queries_(values.integer("queries")),
        tiers_{TierBits{values.bits("high-k-bits"), values.bits("high-v-bits")},
               TierBits{values.bits("low-k-bits"), values.bits("low-v-bits")}} {
    if (low_ > high_) values.fail("low is above high; tokens below low are dropped, those below high lose precision");
  }

  Needs needs() const override {
    return {.mass = MassReduce::kMax, .mass_from_window = true, .window_queries = queries_, .every_step = true};
  }
  std::array<TierBits, kTiers> tiers() const override { return tiers_; }
  bool has_low_tier() const override { return true; }
  Protection protection(const LayerShape&, int64_t) const override { return kept_; }
  int64_t most_tokens(const LayerShape& shape, int64_t prompt_length) const override { return shape.kv_heads * prompt_length; }

 protected:
  void decide_prompt(const PolicyView& view, PolicyScratch&, Decision& decision) const override {
    const auto n = static_cast<double>(view.length);
    for (size_t h = 0; h < view.heads.size(); ++h) {
      const HeadView& head = view.heads[h];
      const Candidates range = candidates(view, h, kept_);
      for (size_t i = range.first; i < range.last; ++i) {
        const double mean = mean_mass(head, i);
        if (mean < low_ / n) {
          decision.heads[h].drop.push_back(static_cast<int32_t>(i));
        } else if (mean < high_ / n && head.tiers[i] == Tier::kHigh) {
          decision.heads[h].move.push_back({static_cast<int32_t>(i), Tier::kLow});
        }
      }
    }
  }

  // The newest `window` tokens, the one to come among them, stay; so does everything until there are as many.
  void decide_token(const PolicyView& view, PolicyScratch&, Decision& decision) const override {
    const auto p = static_cast<double>(view.length);
    for (size_t h = 0; h < view.heads.size(); ++h) {
      const HeadView& head = view.heads[h];
      if (static_cast<int64_t>(head.size()) + view.incoming <= kept_.window) continue;
      const Candidates range = candidates(view, h, kept_);
      constexpr double kNone = std::numeric_limits<double>::infinity();
      double least[kTiers] = {kNone, kNone};
      size_t token[kTiers] = {0, 0};
      for (size_t i = range.first; i < range.last; ++i) {
        const auto tier = static_cast<size_t>(head.tiers[i]);
        const double mean = mean_mass(head, i);
        if (mean < least[tier]) least[tier] = mean, token[tier] = i;
      }
      constexpr auto kHighest = static_cast<size_t>(Tier::kHigh), kLowest = static_cast<size_t>(Tier::kLow);
      const auto lightest = static_cast<int32_t>(token[kHighest]);
      HeadDecision& out = decision.heads[h];
      if (least[kHighest] < low_ / p && least[kHighest] < least[kLowest]) {
        out.drop.push_back(lightest);
      } else if (least[kHighest] < high_ / p) {
        out.move.push_back({lightest, Tier::kLow});
        if (least[kLowest] < low_ / p) out.drop.push_back(static_cast<int32_t>(token[kLowest]));
      }
    }
  }

 private:
  // A token that no query has been counted for yet is not known to be light.
  static double mean_mass(const HeadView& head, size_t i) {
    return head.queries[i] < 1 ? std::numeric_limits<double>::infinity() : finite(head.mass[i]) / head.queries[i];
  }

  double high_, low_;
  Protection kept_;
  int queries_;
  std::array<TierBits, kTiers> tiers_;
};

}  // namespace

extern const PolicyEntry kLeankvPolicy;
const PolicyEntry kLeankvPolicy = {
    {"leankv",
     "three tiers by thresholds: high precision, low precision, dropped; each head has its own counts",
     "arXiv 2412.03131",
     {number_parameter("high", 1, 0, 1e6, "a token whose mean attention is below high / length loses precision"),
      number_parameter("low", 0.02, 0, 1e6, "one below low / length is dropped"), sinks_parameter(0),
      window_parameter(64, "newest tokens that stay in high precision"),
      integer_parameter("queries", 64, 1, 4096, "last queries of the prompt whose attention counts"),
      bits_parameter("high-k-bits", 8), bits_parameter("high-v-bits", 4), bits_parameter("low-k-bits", 4),
      bits_parameter("low-v-bits", 2)}},
    [](const PolicyValues& values) -> std::unique_ptr<Policy> { return std::make_unique<LeanKv>(values); }};

}  // namespace kvmix
