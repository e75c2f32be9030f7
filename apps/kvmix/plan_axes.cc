#include "plan_axes.h"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <sstream>

#include "kvmix/error.h"
#include "kvmix/eval.h"
#include "text.h"

namespace kvmix::app {
namespace {

constexpr double kNeedleTolerance = 0.1;
constexpr int64_t kNeedleContext = 1024;
constexpr int kBisections = 14;

// Which tokens a plan may keep: all, the same number in every head, or a layer's divided between its heads.
std::vector<std::optional<PolicySpec>> token_choices() {
  std::vector<std::optional<PolicySpec>> choices = {std::nullopt};
  for (const char* policy : {"snapkv", "adakv"}) {
    for (const double keep : {0.5, 0.25, 0.125}) choices.push_back(PolicySpec{policy, {{"keep", keep}}});
  }
  return choices;
}

std::vector<std::optional<PolicySpec>> channel_choices() {
  std::vector<std::optional<PolicySpec>> choices = {std::nullopt};
  for (const double keep : {0.75, 0.5}) choices.push_back(PolicySpec{"think", {{"keep", keep}}});
  return choices;
}

std::string text_of(const std::optional<PolicySpec>& policy) { return policy ? to_string(*policy) : "all"; }

std::string name_of(const AxesCandidate& c) { return "tokens " + c.tokens + ", channels " + c.channels + ", ranks " + c.ranks; }

double bytes_of(const Plan& plan, const AxesTask& task) {
  const Budget& budget = task.request.budget;
  const CacheConfig config = cache_config(plan, *task.request.model);
  const size_t bytes = predict_bytes(config, budget.context);
  return static_cast<double>(bytes + (budget.slack ? predict_slack_bytes(config, budget.context, budget.sequences) /
                                                         static_cast<size_t>(budget.sequences)
                                                   : 0));
}

// The largest plan with these policies that the budget holds. The planner knows all tokens and channels only: what it is given
// is more.
Plan fitted(const AxesTask& task, const std::optional<PolicySpec>& tokens, const std::optional<PolicySpec>& channels) {
  PlannerRequest request = task.request;
  request.factors = nullptr;
  if (!tokens && !channels) return make_plan(task.planner, request);
  const Budget& budget = task.request.budget;
  const Plan full = f16_plan(*task.request.model);
  const double elements = live_elements(cache_config(full, *task.request.model), budget.context);
  const double target = budget.bits > 0 ? budget.bits * elements / 8 : static_cast<double>(budget.bytes) / budget.sequences;
  request.budget = {.context = budget.context};
  double low = 0, high = 16.5;  // bits of all tokens
  std::optional<Plan> best;
  for (int i = 0; i < kBisections; ++i) {
    request.budget.bits = (low + high) / 2;
    try {
      Plan plan = make_plan(task.planner, request);
      plan.tokens = tokens;
      plan.channels = channels;
      if (channels) {  // whose rounding knows nothing of channels that go
        for (Plan::Layer& layer : plan.layers) layer.key.transform.feedback.clear();
      }
      if (bytes_of(plan, task) <= target) {
        best = std::move(plan);
        low = request.budget.bits;
      } else {
        high = request.budget.bits;
      }
    } catch (const BudgetError&) {
      low = request.budget.bits;
    }
  }
  const std::string policies =
      (tokens ? "; tokens " + to_string(*tokens) : "") + (channels ? "; channels " + to_string(*channels) : "");
  if (!best) throw BudgetError("no plan is as small as the budget" + policies, static_cast<size_t>(target));
  best->note += policies;
  return *best;
}

std::vector<EvalSubject> subjects_of(const std::vector<AxesCandidate*>& candidates) {
  std::vector<EvalSubject> subjects;
  subjects.reserve(candidates.size());
  for (const AxesCandidate* c : candidates) subjects.push_back({name_of(*c), c->plan, ""});
  return subjects;
}

// Divergence on the searched text and, if the task asks for needles, passkeys.
void measure(const std::shared_ptr<const Model>& model, const AxesTask& task, const std::vector<AxesCandidate*>& candidates,
             const Progress& progress) {
  if (candidates.empty()) return;
  const std::vector<EvalSubject> subjects = subjects_of(candidates);
  EvalOptions options;
  options.threads = task.threads;
  const std::vector<EvalRow> rows = evaluate_tokens(model, task.searched, subjects, options, progress);
  for (size_t i = 0; i < candidates.size(); ++i) {
    const EvalRow& row = rows[i + 1];  // the first is the reference
    candidates[i]->kl = row.kl_mean;
    candidates[i]->kl_error = row.kl_stderr;
    candidates[i]->top1 = row.top1;
  }
  if (task.needles == 0) return;
  NeedleOptions needle;
  needle.contexts = {std::min(kNeedleContext, model->shape().context_tokens)};
  needle.kinds = {"key", "keys"};
  needle.trials = task.needles;
  needle.threads = task.threads;
  std::vector<double> hits(candidates.size(), 0), trials(candidates.size(), 0);
  for (const NeedleCell& cell : evaluate_needle(model, subjects, needle, progress)) {
    for (size_t i = 0; i < candidates.size(); ++i) {
      if (cell.name != subjects[i].name) continue;
      hits[i] += cell.hits;
      trials[i] += cell.trials;
    }
  }
  for (size_t i = 0; i < candidates.size(); ++i) candidates[i]->found = trials[i] > 0 ? hits[i] / trials[i] : 0;
}

// Adds a candidate, made by `make`, or why there is none.
template <typename Make>
void add(const AxesTask& task, AxesCandidate candidate, std::vector<AxesCandidate>& all, const Make& make) {
  try {
    candidate.plan = make();
    candidate.bytes = bytes_of(candidate.plan, task);
  } catch (const BudgetError& error) {
    candidate.lost = error.what();
  }
  all.push_back(std::move(candidate));
}

void add_policies(const AxesTask& task, const std::optional<PolicySpec>& tokens, const std::optional<PolicySpec>& channels,
                  std::vector<AxesCandidate>& all) {
  add(task, {.tokens = text_of(tokens), .channels = text_of(channels)}, all, [&] { return fitted(task, tokens, channels); });
}

// Measures what was not yet.
void measure_from(const std::shared_ptr<const Model>& model, const AxesTask& task, size_t first,
                  std::vector<AxesCandidate>& all, const Progress& progress) {
  std::vector<AxesCandidate*> made;
  for (size_t i = first; i < all.size(); ++i) {
    if (all[i].lost.empty()) made.push_back(&all[i]);
  }
  measure(model, task, made, progress);
}

// Plans of bits and ranks, at prices that two plans of ranks alone were measured to have.
void add_ranks(const std::shared_ptr<const Model>& model, const AxesTask& task, const AxesCandidate& bits_alone,
               AxesChoice& choice, const Progress& progress) {
  const RankProbes probes = rank_probes(task.request);
  AxesTask text = task;
  text.needles = 0;
  std::vector<AxesCandidate> measured(2);
  measured[0].plan = probes.key;
  measured[1].plan = probes.value;
  measured[1].ranks = "of values";
  measure(model, text, {&measured[0], &measured[1]}, progress);
  choice.key_probe = measured[0].kl;
  choice.value_probe = measured[1].kl;
  // Widths are priced in the profile's metric: what it predicts of bits alone beside what was measured of them makes it one.
  const auto& predicted = bits_alone.plan.predicted;
  const double unit = predicted && predicted->cost > 0 && bits_alone.kl > 0 ? predicted->cost / bits_alone.kl : 1.0;
  for (const double factor : {4.0, 1.0, 0.25}) {
    PlannerRequest request = task.request;
    const auto price = [&](double kl, double cost) { return cost > 0 ? std::max(kl, 1e-6) * unit / cost * factor : factor; };
    request.key_price = price(choice.key_probe, probes.key_cost);
    request.value_price = price(choice.value_probe, probes.value_cost);
    add(task, {.ranks = fmt::format("{}, price x{:g}", request.factors->method, factor)}, choice.candidates,
        [&] { return make_plan(task.planner, request); });
  }
}

}  // namespace

Axes parse_axes(const std::string& list) {
  Axes axes;
  bool bits = false;
  std::istringstream in(list);
  for (std::string name; std::getline(in, name, ',');) {
    bool* known = name == "bits"       ? &bits
                  : name == "tokens"   ? &axes.tokens
                  : name == "channels" ? &axes.channels
                  : name == "rank"     ? &axes.ranks
                                       : nullptr;
    if (known == nullptr || *known)
      throw UsageError("--axes " + list + ": '" + name + "' is " + (known == nullptr ? "no axis" : "there twice") +
                       "; give bits and any of tokens, channels, rank");
    *known = true;
  }
  if (!bits) throw UsageError("--axes " + list + " has no bits, which every plan chooses; give bits too");
  return axes;
}

AxesChoice choose_axes(const std::shared_ptr<const Model>& model, const AxesTask& task, const Progress& progress) {
  AxesChoice choice;
  std::vector<AxesCandidate>& all = choice.candidates;
  add_policies(task, std::nullopt, std::nullopt, all);
  if (task.axes.tokens) {
    for (const auto& tokens : token_choices()) {
      if (tokens) add_policies(task, tokens, std::nullopt, all);
    }
  }
  if (task.axes.channels) {
    for (const auto& channels : channel_choices()) {
      if (channels) add_policies(task, std::nullopt, channels, all);
    }
  }
  measure_from(model, task, 0, all, progress);
  const bool bits_fit = all.front().lost.empty();
  // The best of an axis, if it is better than bits alone.
  const auto best_of = [&](const std::string AxesCandidate::*axis) -> const Plan* {
    const AxesCandidate* best = nullptr;
    for (const AxesCandidate& c : all) {
      if (c.*axis == "all" || !c.lost.empty() || (bits_fit && c.kl >= all.front().kl)) continue;
      if (best == nullptr || c.kl < best->kl) best = &c;
    }
    return best == nullptr ? nullptr : &best->plan;
  };
  const Plan *tokens = best_of(&AxesCandidate::tokens), *channels = best_of(&AxesCandidate::channels);
  const size_t first = all.size();
  std::optional<std::pair<PolicySpec, PolicySpec>> pair;
  if (tokens != nullptr && channels != nullptr) pair.emplace(*tokens->tokens, *channels->channels);
  if (pair) add_policies(task, pair->first, pair->second, all);
  if (task.axes.ranks) {
    const AxesCandidate bits_alone = all.front();
    add_ranks(model, task, bits_alone, choice, progress);
  }
  measure_from(model, task, first, all, progress);

  std::vector<AxesCandidate*> made;
  for (AxesCandidate& c : all) {
    if (c.lost.empty()) made.push_back(&c);
  }
  if (made.empty())
    throw Error(Status::kInvalidArgument, "no choice of " + std::string("the axes meets the budget: ") + all.back().lost);
  const AxesCandidate* bits_alone = bits_fit ? &all.front() : nullptr;
  const double least_found = bits_alone != nullptr ? bits_alone->found - kNeedleTolerance : 0;
  const AxesCandidate* best = nullptr;
  for (const AxesCandidate* c : made) {
    if (task.needles > 0 && c->found < least_found) continue;
    if (best == nullptr || c->kl < best->kl) best = c;
  }
  if (best == nullptr) best = made.front();
  EvalOptions options;
  options.threads = task.threads;
  std::vector<EvalSubject> checked = {{name_of(*best), best->plan, ""}};
  if (bits_alone != nullptr && bits_alone != best) checked.push_back({name_of(*bits_alone), bits_alone->plan, ""});
  const std::vector<EvalRow> rows = evaluate_tokens(model, task.held_out, checked, options, progress);
  choice.held_out = rows[1].kl_mean;
  choice.held_out_bits = checked.size() > 1 ? rows[2].kl_mean : bits_alone == best ? rows[1].kl_mean : NAN;
  if (best == bits_alone) {
    choice.why = "bits only: no other plan diverges less";
    const AxesCandidate* next = nullptr;
    for (const AxesCandidate* c : made) {
      if (c != best && (next == nullptr || c->kl < next->kl)) next = c;
    }
    if (next != nullptr)
      choice.why += next->kl < best->kl
                        ? fmt::format(" and finds as many passkeys ({}: KL {:.5f} to {:.5f}, passkeys {:.0f} % to {:.0f} %)",
                                      name_of(*next), next->kl, best->kl, 100 * next->found, 100 * best->found)
                        : fmt::format(" (the next, {}: KL {:.5f} to {:.5f})", name_of(*next), next->kl, best->kl);
  } else if (bits_alone == nullptr) {
    choice.why = name_of(*best) + ": bits alone do not fit at any width";
  } else if (choice.held_out <= choice.held_out_bits) {
    choice.why = name_of(*best) + ": it diverges least, and less than bits alone on held-out text too";
  } else {
    choice.why = "bits only: " + name_of(*best) + " diverged least, but on held-out text more than bits alone";
    best = bits_alone;
    choice.held_out = choice.held_out_bits;
  }
  choice.chosen = static_cast<size_t>(best - choice.candidates.data());
  return choice;
}

std::vector<std::vector<AxesCandidate>> axes_curves(const std::shared_ptr<const Model>& model, const AxesTask& task, int points,
                                                    const Progress& progress) {
  const std::vector<Plan> curve = make_curve(task.planner, task.request, points);
  std::vector<std::vector<AxesCandidate>> curves;
  for (const auto& tokens : token_choices()) {
    std::vector<AxesCandidate>& line = curves.emplace_back();
    for (const Plan& plan : curve) {
      AxesCandidate& candidate = line.emplace_back();
      candidate.plan = plan;
      candidate.plan.tokens = tokens;
      candidate.tokens = text_of(tokens);
      candidate.bytes = bytes_of(candidate.plan, task);
    }
  }
  // One choice of tokens at a time: every row keeps a cache.
  for (std::vector<AxesCandidate>& line : curves) {
    std::vector<AxesCandidate*> rows;
    rows.reserve(line.size());
    for (AxesCandidate& c : line) rows.push_back(&c);
    measure(model, task, rows, progress);
  }
  return curves;
}

}  // namespace kvmix::app
