// Ada-KV (arXiv 2407.11550): one budget per layer, divided between its KV heads by where the best votes are, with a share that
// every head is sure of. Shares are rounded so that their sum is the layer's budget.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "policy/window_vote.h"

namespace kvmix {
namespace {

class AdaKv final : public VotePolicy {
 public:
  explicit AdaKv(const PolicyValues& values)
      : VotePolicy(values), safe_(values.number("safe")), blend_(values.choice("shares") == "blend") {}

 protected:
  void decide_prompt(const PolicyView& view, PolicyScratch& scratch, Decision& decision) const override {
    const int64_t most = capacity(view.shape, view.prompt_length);
    const size_t heads = view.heads.size();
    std::vector<Candidates> ranges(heads);
    std::vector<std::vector<double>> votes(heads);
    std::vector<int64_t> limits(heads);
    int64_t stored = 0, total = 0;
    for (size_t h = 0; h < heads; ++h) {
      ranges[h] = vote_.vote(view, h, scratch);
      votes[h] = scratch.pooled;
      limits[h] = static_cast<int64_t>(ranges[h].size());
      const auto n = static_cast<int64_t>(view.heads[h].size());
      stored += n;
      total += most - (n - limits[h]);
    }
    if (stored <= static_cast<int64_t>(heads) * most) return;

    const std::vector<int64_t> shares =
        blend_ ? blended(ranges, votes, limits, total) : guaranteed(ranges, votes, limits, most, total);
    for (size_t h = 0; h < heads; ++h) {
      keep_protected(view.heads[h].size(), ranges[h], scratch.keep);
      keep_best(votes[h], ranges[h], shares[h], scratch.order, scratch.keep);
      drop_rest(scratch.keep, decision.heads[h].drop);
    }
  }

 private:
  // How many of the layer's `total` best votes are each head's. Each head's first `passed` are left out.
  static std::vector<int64_t> best_counts(const std::vector<Candidates>& ranges, const std::vector<std::vector<double>>& votes,
                                          const std::vector<int64_t>& passed, int64_t total) {
    struct Vote {
      double score;
      size_t head, token;
    };
    std::vector<Vote> all;
    for (size_t h = 0; h < votes.size(); ++h) {
      const size_t first = all.size();
      for (size_t i = ranges[h].first; i < ranges[h].last; ++i) all.push_back({votes[h][i], h, i});
      const auto better = [](const Vote& a, const Vote& b) {
        return a.score != b.score ? a.score > b.score : a.token < b.token;
      };
      const auto begin = all.begin() + static_cast<ptrdiff_t>(first);
      const auto skipped = std::min<ptrdiff_t>(passed[h], all.end() - begin);
      std::partial_sort(begin, begin + skipped, all.end(), better);
      all.erase(begin, begin + skipped);
    }
    const auto better = [](const Vote& a, const Vote& b) {
      if (a.score != b.score) return a.score > b.score;
      return a.head != b.head ? a.head < b.head : a.token < b.token;
    };
    const auto count = std::clamp<ptrdiff_t>(total, 0, static_cast<ptrdiff_t>(all.size()));
    if (count < static_cast<ptrdiff_t>(all.size())) std::nth_element(all.begin(), all.begin() + count, all.end(), better);
    std::vector<int64_t> counts(votes.size(), 0);
    for (ptrdiff_t i = 0; i < count; ++i) ++counts[all[i].head];
    return counts;
  }

  // (1 - safe) * count + safe * mean budget.
  std::vector<int64_t> blended(const std::vector<Candidates>& ranges, const std::vector<std::vector<double>>& votes,
                               const std::vector<int64_t>& limits, int64_t total) const {
    const std::vector<int64_t> counts = best_counts(ranges, votes, std::vector<int64_t>(votes.size(), 0), total);
    std::vector<double> quotas(votes.size());
    for (size_t h = 0; h < votes.size(); ++h) {
      quotas[h] =
          (1 - safe_) * static_cast<double>(counts[h]) + safe_ * static_cast<double>(total) / static_cast<double>(votes.size());
    }
    return largest_remainder(quotas, limits, total);
  }

  // Each head's best `safe` of the whole budget, window included, then the layer's best.
  std::vector<int64_t> guaranteed(const std::vector<Candidates>& ranges, const std::vector<std::vector<double>>& votes,
                                  const std::vector<int64_t>& limits, int64_t most, int64_t total) const {
    std::vector<int64_t> sure(votes.size());
    const auto floor = static_cast<int64_t>(safe_ * static_cast<double>(most) + 1e-9);
    for (size_t h = 0; h < votes.size(); ++h) {
      sure[h] = std::clamp<int64_t>(floor - vote_.sinks - vote_.window, 0, limits[h]);
      total -= sure[h];
    }
    std::vector<int64_t> shares = best_counts(ranges, votes, sure, total);
    for (size_t h = 0; h < votes.size(); ++h) shares[h] += sure[h];
    return shares;
  }

  double safe_;
  bool blend_;
};

}  // namespace

extern const PolicyEntry kAdakvPolicy;
const PolicyEntry kAdakvPolicy = {
    {"adakv", "snapkv with a layer's budget divided between its heads", "arXiv 2407.11550",
     window_vote_parameters(
         32, {number_parameter("safe", 0.2, 0, 1, "share of the mean budget that every head is sure of"),
              choice_parameter("shares", {"blend", "guarantee"},
                               "the safe share is mixed with the head's count of best votes, or a floor under it (kvpress)")})},
    [](const PolicyValues& values) -> std::unique_ptr<Policy> { return std::make_unique<AdaKv>(values); }};

}  // namespace kvmix
