// Many-variable search for the best losses at all sizes: NSGA-II (Deb et al. 2002) with constraint dominance.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace kvmix {

using Assignment = std::vector<std::size_t>;  // a choice for each variable

struct FrontTask {
  std::vector<std::size_t> choices;  // how many each variable has; smaller indices should make smaller sizes
  std::function<double(const Assignment&)> size;
  double largest_size = 0;                        // of a feasible assignment
  std::function<double(const Assignment&)> loss;  // asked once for each feasible assignment that is met
  int evaluations = 100;                          // of loss, at most; where all assignments are fewer, all are tried
  int population = 50;
  uint64_t seed = 0;
};

struct FrontPoint {
  Assignment choice;
  double size = 0, loss = 0;
};

// Of all assignments met, those that are feasible and that none is at least as good as in both respects and better in one;
// smallest first. Of equals the one met first. The same task gives the same points. Empty if nothing feasible was met; the
// assignment of zeros is always met.
std::vector<FrontPoint> search_front(const FrontTask& task);

}  // namespace kvmix
