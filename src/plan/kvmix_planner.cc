// The default planner: a byte budget spent exactly (multiple-choice knapsack) over layer x side x codec, by what each choice
// was measured to cost; without measured sensitivities by the gradient scores and the usual loss of a width. With a meter, the
// plan is then measured as a whole and bytes are moved where that says they help.
#include <algorithm>
#include <cstdio>

#include "base/mean.h"
#include "codec/trellis.h"
#include "plan/candidates.h"
#include "plan/planner.h"
#include "plan/rank_allocation.h"
#include "plan/refine.h"
#include "plan/steady.h"

namespace kvmix {
namespace {

// Swaps while measuring says so; keeps the outcome only if it is better on text that was not searched with. Returns a sentence.
std::string refine_plan(const PlannerRequest& request, const PricedChoices& priced, int64_t spend_bytes, Plan plan,
                        std::vector<size_t>& chosen) {
  RefineTask task;
  task.items = priced.items;
  task.spend_bytes = spend_bytes;
  task.measurements = request.measurements;
  task.progress = request.progress;
  task.measure = [&](const std::vector<size_t>& choice) {
    priced.apply(choice, plan);
    return request.meter->divergence(plan);
  };
  const Refined refined = refine(task, chosen);
  priced.apply(chosen, plan);
  const double before = mean(request.meter->held_out(plan));
  priced.apply(refined.chosen, plan);
  const double after = refined.swaps > 0 ? mean(request.meter->held_out(plan)) : before;
  const bool kept = after < before;
  if (kept) chosen = refined.chosen;
  char text[256];
  std::snprintf(text, sizeof text, "; %d plans measured, %d swaps: %.5f to %.5f, on text not searched with %.5f to %.5f%s",
                refined.measurements, refined.swaps, refined.before, refined.after, before, after,
                refined.swaps > 0 && !kept ? ", so not kept" : "");
  return text;
}

// What the knapsack makes of a budget.
struct Allocation {
  Plan plan;             // its frame and recent rows; codecs, and latents, as chosen
  PricedChoices priced;  // without latents
  std::vector<size_t> chosen;
  int64_t spend = 0;
  double cost = 0;
};

// Throws BudgetError.
Allocation allocation(const PlannerRequest& request, Plan plan, const std::string& metric, const CodecChoice& codecs) {
  const int64_t context = request.budget.context;
  Allocation made{std::move(plan), {}, {}, 0, 0};
  if (request.factors != nullptr) {
    made.cost = allocate_ranks(request, metric, made.plan);
    return made;
  }
  made.priced = price(made.plan, *request.model, *request.profile, metric, context, request.device, codecs);
  const auto budget = static_cast<int64_t>(budget_bytes(request.budget, *request.model));
  made.spend = budget - made.priced.fixed_bytes;
  made.chosen = allocate(made.priced.items, made.spend);
  if (made.chosen.empty())
    refuse_budget(budget, made.priced.fixed_bytes + least_bytes(made.priced.items), made.priced, context);
  made.cost = made.priced.apply(made.chosen, made.plan);
  return made;
}

// With recent rows of 8 bits, and with those of fp16 where that is predicted to cost less in all, bytes being equal.
Allocation best_allocation(const PlannerRequest& request, const Plan& frame, const std::string& metric,
                           const std::string& recent, const CodecChoice& codecs) {
  Plan plan = frame;
  plan.recent = recent == "f16" ? CodecSpec{} : kRecentRows;
  Allocation made = allocation(request, plan, metric, codecs);
  if (recent != "best" || metric.empty()) return made;  // gradient scores do not price recent rows
  plan.recent = {};
  try {
    Allocation f16 = allocation(request, plan, metric, codecs);
    return f16.cost < made.cost ? std::move(f16) : std::move(made);
  } catch (const BudgetError&) {
    return made;
  }
}

// What a tenth of a bit more for every element would save. A sentence.
std::string next_bits(const Allocation& made) {
  const auto more = static_cast<int64_t>(made.priced.elements * 0.1 / 8);
  const std::vector<size_t> chosen = allocate(made.priced.items, made.spend + more);
  double cost = 0, next = 0;
  for (size_t i = 0; i < chosen.size(); ++i) {
    cost += made.priced.sides[i][made.chosen[i]].cost;
    next += made.priced.sides[i][chosen[i]].cost;
  }
  char text[96];
  std::snprintf(text, sizeof text, "; .1 bits more: cost %.5g (%+.0f %%)", next, 100 * (next / std::max(cost, 1e-30) - 1));
  return text;
}

Plan make(const PlannerRequest& given) {
  const PlannerOptions options("kvmix", given.options);
  Plan frame = empty_plan(given, "kvmix");
  read_fp16_part(options, given.profile->fp16, frame);
  const std::string recent = options.choice("recent", "best", {"best", "8", "f16"});
  const std::string metric =
      pick_metric(*given.profile, options.choice("metric", "best", {"best", "kl", "fisher", "output", "gradient"}));
  const Profile profile = steadied(*given.profile, metric);
  PlannerRequest request = given;
  request.profile = &profile;
  if (request.meter != nullptr && (metric.empty() || metric == "output")) {
    throw Error(Status::kInvalidArgument, "measuring plans starts from losses in nats, and this goes by " +
                                              (metric.empty() ? "gradient scores" : metric) +
                                              "; measure kl or fisher with kvmix profile --sensitivity");
  }
  if (request.meter != nullptr && !request.meter->in_nats()) {
    throw Error(
        Status::kInvalidArgument,
        "planner kvmix moves bytes by divergence, not by answered tasks; use --planner kvtuner, or measure without tasks");
  }
  if (request.factors != nullptr && metric.empty()) {
    throw Error(Status::kInvalidArgument,
                "ranks are weighed against measured widths; measure some with kvmix profile --sensitivity fisher");
  }
  // The unbiased fit may lose more on text longer than what was measured (docs/quality.md).
  const std::string fits = options.choice("fits", "best", {"best", "one", "both"});
  const bool whole = request.profile->window_tokens >= request.budget.context;
  const std::string codes = options.choice("codes", "best", {"best", "all", "even"});
  CodecChoice codecs = codec_choice(request.device);
  codecs.both_fits = fits == "both" || (fits == "best" && whole);
  if (codes != "best") codecs.trellis = codes == "all";
  Allocation made = best_allocation(request, frame, metric, recent, codecs);
  std::string measured;
  if (request.meter != nullptr) measured = refine_plan(request, made.priced, made.spend, made.plan, made.chosen);
  Plan& plan = made.plan;
  const double cost = request.factors != nullptr ? made.cost : made.priced.apply(made.chosen, plan);
  if (!metric.empty()) plan.predicted = Plan::Prediction{metric, cost};
  const bool measured_trellis = std::any_of(request.profile->sensitivities.begin(), request.profile->sensitivities.end(),
                                            [](const auto& s) { return is_trellis(parse_codec(s.codec)); });
  const char* const kinds = metric.empty() || !measured_trellis ? ""
                            : codecs.trellis                    ? ", of all codes"
                                                                : ", of even codes (--codes all: trellises too)";
  char note[256];
  std::snprintf(note, sizeof note, "%.3f bits per element at %lld tokens, by %s%s; predicted cost %.5g",
                predict_bits_per_element(cache_config(plan, *request.model), request.budget.context),
                static_cast<long long>(request.budget.context), metric.empty() ? "gradient scores" : metric.c_str(), kinds,
                cost);
  plan.note = note + measured;
  if (!metric.empty() && request.factors == nullptr) plan.note += next_bits(made);
  return std::move(plan);
}

}  // namespace

extern const Planner kKvmixPlanner;
const Planner kKvmixPlanner = {
    {"kvmix",
     "a byte budget spent exactly where it was measured to matter",
     {{"metric", "best, kl, fisher, output or gradient (best the profile has)"},
      {"fits",
       "of keys: one (least squares), both (for each layer what costs less), or best: both where the profile's windows are as "
       "long "
       "as --context"},
      {"codes",
       "all, even: no trellises, which lose less and take longer to seal and to read, or best: all for the CPU, even for a "
       "GPU, "
       "where reading them takes most"},
      kSinksOption,
      kLocalSinksOption,
      kWindowOption,
      {"recent", "rows not sealed yet: 8 (bits), f16 (twice the bytes), or best (what predicts less)"}},
     true,
     true,
     true,
     true},
    make};

}  // namespace kvmix
