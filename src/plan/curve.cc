// The plans of a planner over all budgets.
#include <cmath>

#include "plan/planner.h"

namespace kvmix {

std::vector<Plan> make_curve(const std::string& planner, PlannerRequest request, int points) {
  for (const PlannerInfo& info : planners()) {
    if (info.name == planner && !info.needs_budget)
      throw Error(Status::kInvalidArgument, "planner " + planner + " takes no budget, so it has no curve");
  }
  if (points < 2) throw Error(Status::kInvalidArgument, "a curve has at least 2 points");
  const int64_t context = request.budget.context;
  const auto bytes_of = [&](const Plan& plan) { return predict_bytes(cache_config(plan, *request.model), context); };
  const auto plan_of = [&](size_t bytes) {
    request.budget = {.bytes = bytes, .context = context};
    return make_plan(planner, request);
  };
  size_t least = 1;
  try {
    plan_of(least);
  } catch (const BudgetError& e) {
    least = e.least_bytes();
  }
  std::vector<Plan> curve{plan_of(least)};
  const Plan largest = plan_of(2 * bytes_of(f16_plan(*request.model)));
  least = bytes_of(curve.front());
  const double range = static_cast<double>(bytes_of(largest)) / static_cast<double>(least);
  for (int p = 1; p < points; ++p) {
    const double budget = static_cast<double>(least) * std::pow(range, static_cast<double>(p) / (points - 1));
    Plan plan = p + 1 == points ? largest : plan_of(static_cast<size_t>(budget));
    if (bytes_of(plan) > bytes_of(curve.back())) curve.push_back(std::move(plan));
  }
  return curve;
}

}  // namespace kvmix
