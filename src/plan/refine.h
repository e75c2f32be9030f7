// Moving bytes between sides of a plan by what measuring whole plans says.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "kvmix/plan.h"
#include "plan/allocate.h"

namespace kvmix {

struct RefineTask {
  std::vector<std::vector<Choice>> items;  // costs in the measurement's unit
  int64_t spend_bytes = 0;                 // that the choices may take together
  int measurements = 0;                    // at most, the starting plan's included
  // Loss at each scored position of the plan that these choices make.
  std::function<std::vector<double>(const std::vector<std::size_t>&)> measure;
  Progress progress;  // may be empty
};

struct Refined {
  std::vector<std::size_t> chosen;
  int measurements = 0, swaps = 0;
  double before = 0, after = 0;  // mean measured loss
};

// Greedy: one item gets its next larger choice and, where bytes run out, another a smaller one. The swap with the best ratio of
// expected gain to expected loss is measured next, and kept if the loss falls by more than two standard errors of the
// difference over positions. What a measurement says beyond expectation corrects the expectations of the two moves it was made
// of. Throws kInvalidArgument for fewer than two measurements, kCancelled.
Refined refine(const RefineTask& task, const std::vector<std::size_t>& start);

}  // namespace kvmix
