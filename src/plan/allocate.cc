#include "plan/allocate.h"

#include <algorithm>
#include <cstddef>
#include <limits>
#include <numeric>

namespace kvmix {
namespace {

constexpr int64_t kMostUnits = 1 << 17;

int64_t smallest(const std::vector<Choice>& choices) {
  return std::min_element(choices.begin(), choices.end(), [](const Choice& a, const Choice& b) { return a.bytes < b.bytes; })
      ->bytes;
}

}  // namespace

int64_t least_bytes(const std::vector<std::vector<Choice>>& items) {
  int64_t total = 0;
  for (const auto& choices : items) total += smallest(choices);
  return total;
}

std::vector<size_t> allocate(const std::vector<std::vector<Choice>>& items, int64_t budget_bytes) {
  const int64_t least = least_bytes(items);
  if (least > budget_bytes) return {};
  // Only what a choice takes beyond its item's smallest one is spent.
  int64_t unit = 0, most = 0;
  for (const auto& choices : items) {
    const int64_t base = smallest(choices);
    int64_t largest = 0;
    for (const Choice& c : choices) {
      unit = std::gcd(unit, c.bytes - base);
      largest = std::max(largest, c.bytes - base);
    }
    most += largest;
  }
  const int64_t spend = std::min(budget_bytes - least, most);
  unit = std::max<int64_t>(std::max<int64_t>(unit, 1), (spend + kMostUnits - 1) / kMostUnits);
  const auto capacity = static_cast<size_t>(spend / unit);

  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  std::vector<double> best(capacity + 1, 0.0), next(capacity + 1);
  std::vector<std::vector<uint8_t>> taken(items.size(), std::vector<uint8_t>(capacity + 1));
  for (size_t i = 0; i < items.size(); ++i) {
    const int64_t base = smallest(items[i]);
    std::fill(next.begin(), next.end(), kInfinity);
    for (size_t c = 0; c < items[i].size(); ++c) {
      const auto units = static_cast<size_t>((items[i][c].bytes - base + unit - 1) / unit);
      const double cost = items[i][c].cost;
      for (size_t u = units; u <= capacity; ++u) {
        const double total = best[u - units] + cost;
        if (total < next[u]) {
          next[u] = total;
          taken[i][u] = static_cast<uint8_t>(c);
        }
      }
    }
    best.swap(next);
  }
  std::vector<size_t> chosen(items.size());
  size_t left = capacity;
  for (size_t i = items.size(); i-- > 0;) {
    chosen[i] = taken[i][left];
    left -= static_cast<size_t>((items[i][chosen[i]].bytes - smallest(items[i]) + unit - 1) / unit);
  }
  return chosen;
}

}  // namespace kvmix
