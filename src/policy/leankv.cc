// LeanKV, now DiffKV (arXiv 2412.03131): each KV head sorts its tokens into high precision, low precision and dropped, by
// thresholds on their mean attention rather than by a budget. While decoding, each new token may push the least significant
// older one of the high tier down or out.
#include <algorithm>
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
        every_(values.integer("every")),
        tiers_{TierBits{values.bits("high-k-bits"), values.bits("high-v-bits")},
               TierBits{values.bits("low-k-bits"), values.bits("low-v-bits")}} {
    if (low_ > high_) values.fail("low is above high; tokens below low are dropped, those below high lose precision");
  }

  Needs needs() const override {
    return {.mass = MassReduce::kMax,
            .mass_from_window = true,
            .mass_every = every_,
            .window_queries = queries_,
            .every_step = true};
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

  // The newest `window` tokens, the one to come among them, stay; so does everything until there are as many. For each token
  // that has come, the lightest of the high tier is moved or dropped, as thresholds say.
  void decide_token(const PolicyView& view, PolicyScratch& scratch, Decision& decision) const override {
    const auto p = static_cast<double>(view.length);
    for (size_t h = 0; h < view.heads.size(); ++h) {
      const HeadView& head = view.heads[h];
      if (static_cast<int64_t>(head.size()) + view.incoming <= kept_.window) continue;
      const Candidates range = candidates(view, h, kept_);
      const Lightest high(head, Tier::kHigh, range, view.since, scratch.order);
      const Lightest low(head, Tier::kLow, range, view.since, scratch.count);
      HeadDecision& out = decision.heads[h];
      size_t next_high = 0, next_low = 0, next_moved = 0;  // moved tokens are of the low tier from then on
      for (int64_t token = 0; token < view.since && next_high < high.size(); ++token) {
        const double least = high.mean(next_high);
        if (!(least < high_ / p)) break;
        const double stored = next_low < low.size() ? low.mean(next_low) : kNone;
        const double moved =
            next_moved < out.move.size() ? mean_mass(head, static_cast<size_t>(out.move[next_moved].token)) : kNone;
        const int32_t lightest = high.token(next_high++);
        if (least < low_ / p && least < std::min(stored, moved)) {
          out.drop.push_back(lightest);
          continue;
        }
        if (stored <= moved && stored < low_ / p) {
          out.drop.push_back(low.token(next_low++));
        } else if (moved < stored && moved < low_ / p) {
          out.drop.push_back(out.move[next_moved++].token);
        }
        out.move.push_back({lightest, Tier::kLow});
      }
      out.move.erase(out.move.begin(), out.move.begin() + static_cast<ptrdiff_t>(next_moved));
      std::sort(out.drop.begin(), out.drop.end());
      std::sort(out.move.begin(), out.move.end(), [](const Move& a, const Move& b) { return a.token < b.token; });
    }
  }

 private:
  // A token that no query has been counted for yet is not known to be light.
  static double mean_mass(const HeadView& head, size_t i) {
    return head.queries[i] < 1 ? kNone : finite(head.mass[i]) / head.queries[i];
  }
  static constexpr double kNone = std::numeric_limits<double>::infinity();

  // A tier's candidates with the least means, ascending, as many as may be acted on; ties by lower index.
  class Lightest {
   public:
    Lightest(const HeadView& head, Tier tier, Candidates range, int64_t most, std::vector<int32_t>& order)
        : head_(head), order_(order) {
      const auto lighter = [&](int32_t a, int32_t b) {
        const double x = mean(a), y = mean(b);
        return x < y || (x == y && a < b);
      };
      order.clear();
      if (order.capacity() < head.size()) order.reserve(2 * head.size());  // not at every step
      for (size_t i = range.first; i < range.last; ++i) {
        if (head.tiers[i] == tier) order.push_back(static_cast<int32_t>(i));
      }
      const auto sorted = order.begin() + static_cast<ptrdiff_t>(std::min<size_t>(order.size(), static_cast<size_t>(most)));
      std::partial_sort(order.begin(), sorted, order.end(), lighter);
      order.erase(sorted, order.end());
    }
    size_t size() const { return order_.size(); }
    int32_t token(size_t i) const { return order_[i]; }
    double mean(size_t i) const { return mean(order_[i]); }

   private:
    double mean(int32_t token) const { return mean_mass(head_, static_cast<size_t>(token)); }
    const HeadView& head_;
    std::vector<int32_t>& order_;
  };

  double high_, low_;
  Protection kept_;
  int queries_, every_;
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
      integer_parameter("queries", 64, 1, 4096, "last queries of the prompt whose attention counts"), every_parameter(),
      bits_parameter("high-k-bits", 8), bits_parameter("high-v-bits", 4), bits_parameter("low-k-bits", 4),
      bits_parameter("low-v-bits", 2)}},
    [](const PolicyValues& values) -> std::unique_ptr<Policy> { return std::make_unique<LeanKv>(values); }};

}  // namespace kvmix
