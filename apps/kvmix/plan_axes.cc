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
constexpr size_t kFinalists = 2;  // that are measured on all windows, beside bits alone

// Which tokens a plan may keep: all, the same number in every head, or a layer's divided between its heads.
std::vector<std::optional<PolicySpec>> token_choices() {
  std::vector<std::optional<PolicySpec>> choices = {std::nullopt};
  for (const char* policy : {"snapkv", "adakv"}) {
    for (const double keep : {0.5, 0.25, 0.125}) choices.push_back(PolicySpec{policy, {{"keep", keep}}});
  }
  return choices;
}

std::string tokens_text(const std::optional<PolicySpec>& tokens) { return tokens ? to_string(*tokens) : "all"; }

double bytes_of(const Plan& plan, const PlannerRequest& request) {
  const Budget& budget = request.budget;
  const CacheConfig config = cache_config(plan, *request.model);
  const size_t bytes = predict_bytes(config, budget.context);
  return static_cast<double>(bytes + (budget.slack ? predict_slack_bytes(config, budget.context, budget.sequences) /
                                                         static_cast<size_t>(budget.sequences)
                                                   : 0));
}

std::vector<EvalSubject> subjects_of(const std::vector<AxesCandidate*>& candidates) {
  std::vector<EvalSubject> subjects;
  subjects.reserve(candidates.size());
  for (const AxesCandidate* c : candidates) subjects.push_back({c->tokens, c->plan, ""});
  return subjects;
}

EvalOptions text_options(const AxesTask& task) {
  EvalOptions options;
  options.threads = task.threads;
  options.scored = static_cast<int64_t>(task.searched.front().size()) / 4;
  return options;
}

Plan fitted(const AxesTask& task, const std::optional<PolicySpec>& tokens) {
  return tokens ? plan_with_tokens(task.planner, task.request, *tokens) : make_plan(task.planner, task.request);
}

// Measures on windows [from, to) and takes it in beside what was measured before.
void measure_text(const std::shared_ptr<const Model>& model, const AxesTask& task,
                  const std::vector<AxesCandidate*>& candidates, size_t from, size_t to, const Progress& progress) {
  if (from == to || candidates.empty()) return;
  const std::span<const std::vector<Token>> windows(task.searched);
  const std::vector<EvalRow> rows =
      evaluate_tokens(model, windows.subspan(from, to - from), subjects_of(candidates), text_options(task), progress);
  for (size_t i = 0; i < candidates.size(); ++i) {
    AxesCandidate& c = *candidates[i];
    const EvalRow& row = rows[i + 1];  // the first is the reference
    const auto before = static_cast<double>(c.windows), more = static_cast<double>(to - from), all = before + more;
    c.kl = (c.kl * before + row.kl_mean * more) / all;
    c.kl_error = std::hypot(c.kl_error * before, row.kl_stderr * more) / all;
    c.top1 = (c.top1 * before + row.top1 * more) / all;
    c.windows += to - from;
  }
}
void measure_needles(const std::shared_ptr<const Model>& model, const AxesTask& task,
                     const std::vector<AxesCandidate*>& candidates, const Progress& progress) {
  if (task.needles == 0 || candidates.empty()) return;
  const std::vector<EvalSubject> subjects = subjects_of(candidates);
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

// The planner knows all tokens only: what it is given is more than the budget.
Plan plan_with_tokens(const std::string& planner, const PlannerRequest& given, const PolicySpec& tokens) {
  if (given.budget.bits <= 0 && given.budget.bytes == 0) {
    Plan plan = make_plan(planner, given);
    plan.tokens = tokens;
    plan.note += "; tokens " + to_string(tokens);
    return plan;
  }
  PlannerRequest request = given;
  const Budget& budget = given.budget;
  const Plan full = f16_plan(*given.model);
  const double elements = live_elements(cache_config(full, *given.model), budget.context);
  const double target = budget.bits > 0 ? budget.bits * elements / 8 : static_cast<double>(budget.bytes) / budget.sequences;
  request.budget = {.context = budget.context};
  double low = 0, high = 16.5;  // bits of all tokens
  std::optional<Plan> best;
  for (int i = 0; i < kBisections; ++i) {
    request.budget.bits = (low + high) / 2;
    try {
      Plan plan = make_plan(planner, request);
      plan.tokens = tokens;
      if (bytes_of(plan, given) <= target) {
        best = std::move(plan);
        low = request.budget.bits;
      } else {
        high = request.budget.bits;
      }
    } catch (const BudgetError&) {
      low = request.budget.bits;
    }
  }
  if (!best) throw BudgetError("no plan with " + to_string(tokens) + " is as small as the budget", static_cast<size_t>(target));
  best->note += "; tokens " + to_string(tokens);
  return *best;
}

AxesChoice choose_axes(const std::shared_ptr<const Model>& model, const AxesTask& task, const Progress& progress) {
  AxesChoice choice;
  std::string smallest;
  for (const auto& tokens : token_choices()) {
    AxesCandidate& candidate = choice.candidates.emplace_back();
    candidate.tokens = tokens_text(tokens);
    try {
      candidate.plan = fitted(task, tokens);
      candidate.bytes = bytes_of(candidate.plan, task.request);
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
  measure_text(model, task, made, 0, 1, progress);
  // A first window tells which are worth the others.
  std::vector<AxesCandidate*> worth = made;
  std::stable_sort(worth.begin(), worth.end(), [](const auto* a, const auto* b) { return a->kl < b->kl; });
  worth.resize(std::min(worth.size(), kFinalists));
  AxesCandidate* const all_tokens = &choice.candidates.front();
  if (all_tokens->lost.empty() && std::find(worth.begin(), worth.end(), all_tokens) == worth.end()) worth.push_back(all_tokens);
  measure_text(model, task, worth, 1, task.searched.size(), progress);
  measure_needles(model, task, worth, progress);

  const AxesCandidate* bits_alone = choice.candidates.front().lost.empty() ? &choice.candidates.front() : nullptr;
  const double least_found = bits_alone != nullptr ? bits_alone->found - kNeedleTolerance : 0;
  const AxesCandidate* best = nullptr;
  for (const AxesCandidate* c : worth) {
    if (task.needles > 0 && c->found < least_found) continue;
    if (best == nullptr || c->kl < best->kl) best = c;
  }
  if (best == nullptr) best = worth.front();
  std::vector<EvalSubject> checked = {{best->tokens, best->plan, ""}};
  if (bits_alone != nullptr && bits_alone != best) checked.push_back({bits_alone->tokens, bits_alone->plan, ""});
  const std::vector<EvalRow> rows = evaluate_tokens(model, task.held_out, checked, text_options(task), progress);
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
      candidate.bytes = bytes_of(candidate.plan, task.request);
    }
  }
  // One choice of tokens at a time: every row keeps a cache.
  for (std::vector<AxesCandidate>& line : curves) {
    std::vector<AxesCandidate*> rows;
    rows.reserve(line.size());
    for (AxesCandidate& c : line) rows.push_back(&c);
    measure_text(model, task, rows, 0, task.searched.size(), progress);
  }
  return curves;
}

}  // namespace kvmix::app
