// Costs of a profile without most of their noise.
#pragma once

#include <string>

#include "kvmix/plan.h"

namespace kvmix {

// The profile, the costs of sealed pages by `metric` drawn halfway, in logarithms, to what layers and codecs say of them by
// themselves: of a side, cost = (layer, transform) x (codec, transform), fitted by least squares. A measured cost is a mean
// over some hundred queries of numbers that are large for few of them, and a third off for keys, a fifth for values; planners,
// which take what seems to cost least, take what was measured too low. Costs of 0 and below stay.
Profile steadied(const Profile& profile, const std::string& metric);

}  // namespace kvmix
