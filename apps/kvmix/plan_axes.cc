#include "plan_axes.h"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <optional>

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

std::string tokens_text(const std::optional<PolicySpec>& tokens) { return tokens ? to_string(*tokens) : "all"; }

double bytes_of(const Plan& plan, const AxesTask& task) {
  const Budget& budget = task.request.budget;
  const CacheConfig config = cache_config(plan, *task.request.model);
  const size_t bytes = predict_bytes(config, budget.context);
  return static_cast<double>(bytes + (budget.slack ? predict_slack_bytes(config, budget.context, budget.sequences) /
                                                         static_cast<size_t>(budget.sequences)
                                                   : 0));
}

// The largest plan with these tokens that the budget holds. The planner knows all tokens only: what it is given is more.
Plan fitted(const AxesTask& task, const std::optional<PolicySpec>& tokens) {
  PlannerRequest request = task.request;
  if (!tokens) return make_plan(task.planner, request);
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
  if (!best)
    throw BudgetError("no plan with " + tokens_text(tokens) + " is as small as the budget", static_cast<size_t>(target));
  best->note += "; tokens " + tokens_text(tokens);
  return *best;
}

std::vector<EvalSubject> subjects_of(const std::vector<AxesCandidate*>& candidates) {
  std::vector<EvalSubject> subjects;
  subjects.reserve(candidates.size());
  for (const AxesCandidate* c : candidates) subjects.push_back({c->tokens, c->plan, ""});
  return subjects;
}

void measure(const std::shared_ptr<const Model>& model, const AxesTask& task, const std::vector<AxesCandidate*>& candidates,
             const Progress& progress) {
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

}  // namespace

AxesChoice choose_axes(const std::shared_ptr<const Model>& model, const AxesTask& task, const Progress& progress) {
  AxesChoice choice;
  std::string smallest;
  for (const auto& tokens : token_choices()) {
    AxesCandidate& candidate = choice.candidates.emplace_back();
    candidate.tokens = tokens_text(tokens);
    try {
      candidate.plan = fitted(task, tokens);
      candidate.bytes = bytes_of(candidate.plan, task);
    } catch (const BudgetError& error) {
      candidate.lost = error.what();
      smallest = error.what();
    }
  }
  std::vector<AxesCandidate*> made;
  for (AxesCandidate& c : choice.candidates) {
    if (c.lost.empty()) made.push_back(&c);
  }
  if (made.empty()) throw Error(Status::kInvalidArgument, "no choice of tokens and bits meets the budget: " + smallest);
  measure(model, task, made, progress);

  const AxesCandidate* bits_alone = choice.candidates.front().lost.empty() ? &choice.candidates.front() : nullptr;
  const double least_found = bits_alone != nullptr ? bits_alone->found - kNeedleTolerance : 0;
  const AxesCandidate* best = nullptr;
  for (const AxesCandidate* c : made) {
    if (task.needles > 0 && c->found < least_found) continue;
    if (best == nullptr || c->kl < best->kl) best = c;
  }
  if (best == nullptr) best = made.front();
  EvalOptions options;
  options.threads = task.threads;
  std::vector<EvalSubject> checked = {{best->tokens, best->plan, ""}};
  if (bits_alone != nullptr && bits_alone != best) checked.push_back({bits_alone->tokens, bits_alone->plan, ""});
  const std::vector<EvalRow> rows = evaluate_tokens(model, task.held_out, checked, options, progress);
  choice.held_out = rows[1].kl_mean;
  choice.held_out_bits = checked.size() > 1 ? rows[2].kl_mean : bits_alone == best ? rows[1].kl_mean : NAN;
  if (best == bits_alone) {
    choice.why = "no choice of fewer tokens diverges less";
  } else if (bits_alone == nullptr) {
    choice.why = "all tokens do not fit at any width";
  } else if (choice.held_out <= choice.held_out_bits) {
    choice.why = "it diverges least, and less than bits alone on held-out text too";
  } else {
    choice.why = best->tokens + " diverged least, but on held-out text more than bits alone";
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
      candidate.tokens = tokens_text(tokens);
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
