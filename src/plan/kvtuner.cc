// KVTuner (arXiv 2502.04420): a pair of widths for each layer, found in three steps. Inside a layer only pairs survive that are
// Pareto-optimal in bits and error of the attention output; layers with the same survivors and similar errors form a group that
// shares its choice; a multi-objective search assigns pairs to groups. Its objective is what a meter measures of the whole
// plan, divergence or unanswered tasks (the paper's own), else the sum of what the profile measured.
//
// The profile holds the squared error of each side alone; of a pair it is taken to be their sum, as of independent errors.
// Sizes are all bytes, not the mean of nominal widths.
#include "plan/kvtuner.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "base/mean.h"
#include "plan/candidates.h"
#include "plan/front_search.h"
#include "plan/planner.h"

namespace kvmix {

std::vector<WidthPair> pareto_pairs(std::vector<WidthPair> pairs) {
  std::stable_sort(pairs.begin(), pairs.end(), [](const WidthPair& a, const WidthPair& b) {
    return a.bits() != b.bits() ? a.bits() < b.bits() : a.error < b.error;
  });
  std::vector<WidthPair> kept;
  for (const WidthPair& p : pairs) {
    if (kept.empty() || p.error < kept.back().error) kept.push_back(p);
  }
  return kept;
}

std::vector<std::vector<size_t>> cluster_layers(const std::vector<std::vector<WidthPair>>& kept, double threshold) {
  const auto linked = [&](size_t a, size_t b) {
    return std::equal(
        kept[a].begin(), kept[a].end(), kept[b].begin(), kept[b].end(), [&](const WidthPair& p, const WidthPair& q) {
          return p.key_bits == q.key_bits && p.value_bits == q.value_bits &&
                 std::abs(std::log10(std::max(p.error, 1e-30)) - std::log10(std::max(q.error, 1e-30))) <= threshold;
        });
  };
  std::vector<std::vector<size_t>> groups;
  std::vector<bool> placed(kept.size(), false);
  for (size_t first = 0; first < kept.size(); ++first) {
    if (placed[first]) continue;
    std::vector<size_t> group{first};
    placed[first] = true;
    for (size_t at = 0; at < group.size(); ++at) {
      for (size_t l = 0; l < kept.size(); ++l) {
        if (placed[l] || !linked(group[at], l)) continue;
        placed[l] = true;
        group.push_back(l);
      }
    }
    std::sort(group.begin(), group.end());
    groups.push_back(std::move(group));
  }
  return groups;
}

namespace {

constexpr int kPredictedTrials = 20000;

// Of a side's candidates of each width the one with the least output error, by index; none where a width is missing.
std::vector<std::pair<int, size_t>> by_width(const std::vector<Candidate>& output, const std::vector<int>& widths) {
  std::vector<std::pair<int, size_t>> out;
  for (const int bits : widths) {
    size_t best = output.size();
    for (size_t c = 0; c < output.size(); ++c) {
      if (output[c].config.codec.bits == bits && (best == output.size() || output[c].cost < output[best].cost)) best = c;
    }
    if (best < output.size()) out.emplace_back(bits, best);
  }
  return out;
}

size_t find_config(const std::vector<Candidate>& candidates, const SideConfig& config, const std::string& metric) {
  const auto at = std::find_if(candidates.begin(), candidates.end(), [&](const Candidate& c) { return c.config == config; });
  if (at == candidates.end()) {
    throw Error(Status::kMismatch, "the profile has no \"" + metric + "\" sensitivity of " + to_string(config.codec) +
                                       ", which it has an output error of; run kvmix profile again");
  }
  return static_cast<size_t>(at - candidates.begin());
}

class Tuner {
 public:
  Tuner(const PlannerRequest& request, const Plan& plan, const std::string& metric, const std::vector<int>& widths,
        double threshold)
      : request_(request),
        plan_(plan),
        priced_(price(plan, *request.model, *request.profile, metric, request.budget.context, request.device,
                      codec_choice(request.device))) {
    pick_metric(*request.profile, "output");
    const size_t layers = plan.layers.size();
    for (size_t l = 0; l < layers; ++l) {
      std::vector<Candidate> output[2];
      std::vector<std::pair<int, size_t>> chosen[2];
      for (const size_t side : {0, 1}) {
        output[side] = candidates(*request.model, *request.profile, "output", static_cast<int>(l),
                                  side == 0 ? Side::kKey : Side::kValue, plan.recent, codec_choice(request.device));
        chosen[side] = by_width(output[side], widths);
        auto& index = config_.emplace_back();
        for (const auto& [bits, c] : chosen[side])
          index.emplace_back(bits, find_config(priced_.sides[2 * l + side], output[side][c].config, metric));
      }
      std::vector<WidthPair> pairs;
      for (const auto& [k, kc] : chosen[0]) {
        for (const auto& [v, vc] : chosen[1]) pairs.push_back({k, v, std::sqrt(output[0][kc].cost + output[1][vc].cost)});
      }
      kept_.push_back(pareto_pairs(std::move(pairs)));
      if (kept_.back().empty())
        throw Error(Status::kMismatch, "the profile has no codec of the widths that kvtuner chooses from");
    }
    groups_ = cluster_layers(kept_, threshold);
  }

  const std::vector<std::vector<size_t>>& groups() const { return groups_; }

  // Index of each side's codec when every group has its pair.
  std::vector<size_t> sides(const Assignment& assignment) const {
    std::vector<size_t> chosen(config_.size());
    for (size_t g = 0; g < groups_.size(); ++g) {
      for (const size_t l : groups_[g]) {
        const WidthPair& pair = kept_[l][assignment[g]];
        for (const auto& [bits, c] : config_[2 * l]) {
          if (bits == pair.key_bits) chosen[2 * l] = c;
        }
        for (const auto& [bits, c] : config_[2 * l + 1]) {
          if (bits == pair.value_bits) chosen[2 * l + 1] = c;
        }
      }
    }
    return chosen;
  }

  int64_t bytes(const Assignment& assignment) const {
    const std::vector<size_t> chosen = sides(assignment);
    int64_t total = priced_.fixed_bytes;
    for (size_t i = 0; i < chosen.size(); ++i) total += priced_.items[i][chosen[i]].bytes;
    return total;
  }

  double apply(const Assignment& assignment, Plan& plan) const { return priced_.apply(sides(assignment), plan); }

  FrontTask task(int64_t budget, int population, uint64_t seed) {
    FrontTask task;
    for (const auto& group : groups_) task.choices.push_back(kept_[group.front()].size());
    const Assignment smallest(groups_.size(), 0);
    if (bytes(smallest) > budget) refuse_budget(budget, bytes(smallest), priced_, request_.budget.context);
    task.size = [this](const Assignment& a) { return static_cast<double>(bytes(a)); };
    task.largest_size = static_cast<double>(budget);
    task.population = population;
    task.seed = seed;
    if (request_.meter == nullptr) {
      task.evaluations = kPredictedTrials;
      task.loss = [this](const Assignment& a) { return apply(a, plan_); };
    } else {
      task.evaluations = request_.measurements;
      task.loss = [this](const Assignment& a) { return measured(a); };
    }
    return task;
  }

  int measurements() const { return measurements_; }

 private:
  double measured(const Assignment& assignment) {
    if (request_.progress && !request_.progress(measurements_, request_.measurements, "measuring plans"))
      throw Error(Status::kCancelled, "stopped while measuring plans");
    apply(assignment, plan_);
    const std::vector<double> losses = request_.meter->divergence(plan_);
    ++measurements_;
    return mean(losses);
  }

  const PlannerRequest& request_;
  Plan plan_;  // rewritten by every trial
  PricedChoices priced_;
  std::vector<std::vector<std::pair<int, size_t>>> config_;  // [side]: width to index of the codec
  std::vector<std::vector<WidthPair>> kept_;                 // [layer]
  std::vector<std::vector<size_t>> groups_;
  int measurements_ = 0;
};

Plan make(const PlannerRequest& request) {
  const PlannerOptions options("kvtuner", request.options);
  Plan plan = empty_plan(request, "kvtuner");
  read_fp16_part(options, request.profile->fp16, plan);
  read_recent(options, plan);
  const std::string metric =
      pick_metric(*request.profile, options.choice("metric", "best", {"best", "kl", "fisher", "output"}));
  if (metric.empty()) {
    throw Error(Status::kInvalidArgument,
                "planner kvtuner needs measured errors, and the profile has only gradient scores; run kvmix profile "
                "--sensitivity output or kl");
  }
  const std::vector<int> widths = options.choice("widths", "2,4,8", {"2,4,8", "all"}) == "all"
                                      ? std::vector<int>(kRecipeBits.begin(), kRecipeBits.end())
                                      : std::vector<int>{2, 4, 8};
  Tuner tuner(request, plan, metric, widths, options.number("threshold", 0.15, 0, 10));
  const auto budget = static_cast<int64_t>(budget_bytes(request.budget, *request.model));
  const std::vector<FrontPoint> front =
      search_front(tuner.task(budget, options.integer("population", 50, 2, 10000),
                              static_cast<uint64_t>(options.integer("search-seed", 0, 0, 1 << 30))));
  const FrontPoint& best = front.back();  // the largest is the least loss
  plan.predicted = Plan::Prediction{metric, tuner.apply(best.choice, plan)};
  char note[256];
  std::snprintf(note, sizeof note, "%.3f bits per element at %lld tokens; %zu groups of layers; predicted %s %.5g",
                predict_bits_per_element(cache_config(plan, *request.model), request.budget.context),
                static_cast<long long>(request.budget.context), tuner.groups().size(), metric.c_str(), plan.predicted->cost);
  plan.note = note;
  if (request.meter != nullptr) {
    const std::vector<double> held_out = request.meter->held_out(plan);
    if (request.meter->in_nats()) {
      std::snprintf(note, sizeof note, "; %d plans measured, this one %.5f, on text not searched with %.5f",
                    tuner.measurements(), best.loss, mean(held_out));
    } else {
      std::snprintf(note, sizeof note, "; %d plans measured, this one answers %.1f %% of the tasks, of those held out %.1f %%",
                    tuner.measurements(), 100 * (1 - best.loss), 100 * (1 - mean(held_out)));
    }
    plan.note += note;
  }
  return plan;
}

}  // namespace

extern const Planner kKvtunerPlanner;
const Planner kKvtunerPlanner = {{"kvtuner",
                                  "KVTuner: pairs of widths shared by similar layers, by multi-objective search",
                                  {{"metric", "what predicts a plan's loss: best, kl, fisher or output (best the profile has)"},
                                   {"widths", "2,4,8 as the paper, or all (2,4,8)"},
                                   {"threshold", "layers whose log10 errors differ by no more share a pair (0.15)"},
                                   {"population", "of the search (50)"},
                                   {"search-seed", "seed of the search (0)"},
                                   kSinksOption,
                                   kLocalSinksOption,
                                   kWindowOption,
                                   kRecentOption},
                                  true,
                                  true,
                                  true},
                                 make};

}  // namespace kvmix
