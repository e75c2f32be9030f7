// One budget over widths and ranks: of each layer, keys and values themselves, or latents in their place, and their codecs.
#pragma once

#include <string>

#include "kvmix/plan.h"

namespace kvmix {

// Fills `plan`, whose sinks, window and recent rows stand, and returns what it is predicted to cost in all, in the profile's
// metric. A side of r latents costs what its codec was measured to cost, on the part of the rows that r latents explain, and
// price * w on what they leave, w: what losing a side altogether would cost, by what it loses at 2 bits (palu.md d would have
// w the same for all). Throws BudgetError.
double allocate_ranks(const PlannerRequest& request, const std::string& metric, Plan& plan);

}  // namespace kvmix
