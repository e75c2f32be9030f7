// Spending a byte budget: one choice per item so that the total cost is least.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvmix {

struct Choice {
  int64_t bytes;
  double cost;
};

// Exact multiple-choice knapsack by dynamic programming over bytes in units of their greatest common divisor (rounded up to
// keep the table small; the rounding is to the safe side). Returns the index chosen for every item, or an empty vector if even
// the smallest choices exceed the budget.
std::vector<std::size_t> allocate(const std::vector<std::vector<Choice>>& items, int64_t budget_bytes);
// Bytes of the smallest choices together.
int64_t least_bytes(const std::vector<std::vector<Choice>>& items);

}  // namespace kvmix
