// DBudgetKV's loss, apart for tests.
#pragma once

#include <span>
#include <vector>

namespace kvmix {

// loss[j], j = 0 .. n - sinks - 1: by what part the norm of the attention falls when the j oldest tokens behind the sinks go.
// Rows [heads][n]; the norm is the mean over heads of each row's L2 norm, over all that is left or over all of it but the
// sinks. Rises from 0; all 0 where the norm is 0.
std::vector<double> norm_losses(std::span<const double> rows, size_t n, size_t sinks, bool sinks_count);

}  // namespace kvmix
