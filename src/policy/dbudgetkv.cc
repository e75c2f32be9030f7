// DBudgetKV, now ReFreeKV (arXiv 2502.16886): each layer drops as many of its oldest tokens as the last query's attention can
// lose with its norm within a threshold. One cut for all heads of a layer; the budget depends on the prompt.
#include "policy/dbudgetkv.h"

#include <cmath>

#include "policy/parameters.h"
#include "policy/select.h"

namespace kvmix {

std::vector<double> norm_losses(std::span<const double> rows, size_t n, size_t sinks, bool sinks_count) {
  std::vector<double> norm(n - sinks, 0);
  for (size_t first = 0; first < rows.size(); first += n) {
    double left = 0;
    for (size_t i = 0; sinks_count && i < sinks; ++i) left += rows[first + i] * rows[first + i];
    for (size_t i = n; i-- > sinks;) {
      left += rows[first + i] * rows[first + i];
      norm[i - sinks] += std::sqrt(left);
    }
  }
  const double whole = norm.empty() ? 0 : norm[0];
  for (double& x : norm) x = whole > 0 ? (whole - x) / whole : 0;
  return norm;
}

namespace {

class DBudgetKv final : public Policy {
 public:
  explicit DBudgetKv(const PolicyValues& values)
      : sinks_(values.integer("sinks")),
        window_(values.integer("window")),
        threshold_(values.number("threshold")),
        frozen_(values.integer("frozen")),
        sinks_count_(values.choice("norm") == "all") {}

  Needs needs() const override { return {.window_queries = 1}; }
  bool heads_share() const override { return true; }
  Protection protection(const LayerShape&, int64_t) const override { return {sinks_, window_}; }
  int64_t most_tokens(const LayerShape& shape, int64_t prompt_length) const override { return shape.kv_heads * prompt_length; }

 protected:
  void decide_prompt(const PolicyView& view, PolicyScratch& scratch, Decision& decision) const override {
    if (view.shape.layer < frozen_) return;
    const Aligned tokens = align(view);
    const HeadView all{.positions = tokens.positions, .tiers = {}, .mass = {}, .queries = {}, .window = {}};
    const Candidates range = candidates(all, protection(view.shape, view.prompt_length), view.length);
    if (range.size() == 0) return;

    const size_t n = tokens.size();
    std::vector<double>& rows = scratch.score;
    rows.clear();
    bool any = false;
    for (size_t h = 0; h < view.heads.size(); ++h) {
      const HeadView& head = view.heads[h];
      for (int q = 0; q < view.shape.heads_per_kv; ++q) {
        for (size_t i = 0; i < n; ++i) {
          const int32_t index = tokens.index[h][i];
          rows.push_back(index < 0 ? 0 : finite(head.window[q * head.size() + index]));
          any |= rows.back() != 0 && i >= range.first;
        }
      }
    }
    if (!any) return;  // a norm of 0 says nothing
    const std::vector<double> loss = norm_losses(rows, n, range.first, sinks_count_);
    size_t cut = 0;
    while (cut < range.size() && cut + 1 < loss.size() && loss[cut + 1] <= threshold_) ++cut;
    for (size_t h = 0; h < view.heads.size(); ++h) {
      for (size_t i = range.first; i < range.first + cut; ++i) {
        if (tokens.index[h][i] >= 0) decision.heads[h].drop.push_back(tokens.index[h][i]);
      }
    }
  }

 private:
  int64_t sinks_, window_;
  double threshold_;
  int frozen_;
  bool sinks_count_;
};

}  // namespace

extern const PolicyEntry kDbudgetkvPolicy;
const PolicyEntry kDbudgetkvPolicy = {
    {"dbudgetkv",
     "drops the oldest tokens as long as the last query hardly notices; the prompt decides how many",
     "arXiv 2502.16886",
     {number_parameter("threshold", 0.01, 0, 0.999, "part of the norm of the last query's attention that may be lost"),
      sinks_parameter(4), window_parameter(1),
      integer_parameter("frozen", 2, 0, 4096, "first layers of the model that keep everything"),
      choice_parameter("norm", {"without-sinks", "all"}, "whether the sinks' attention counts in the norm")}},
    [](const PolicyValues& values) -> std::unique_ptr<Policy> { return std::make_unique<DBudgetKv>(values); }};

}  // namespace kvmix
