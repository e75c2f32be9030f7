// What policies share: scores of a head, pooling, the best k, shares that add up.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "policy/policy.h"

namespace kvmix {

enum class Pooling : uint8_t { kNone, kAverage, kMax };
// "none", "avg" or "max".
Pooling parse_pooling(const std::string& name);

// A number that can be compared: NaN counts as 0, infinities as the largest float.
double finite(float score);

// The stored tokens that a policy may drop: indices [first, last). Before them are sinks, behind them the window; `end` is the
// position after the newest token that the window covers.
struct Candidates {
  size_t first = 0, last = 0;
  size_t size() const { return last - first; }
};
Candidates candidates(const HeadView& head, const Protection& protection, int64_t end);
// The same as above for a view: its window ends behind the tokens about to be appended.
Candidates candidates(const PolicyView& view, size_t head, const Protection& protection);

// score[i] = mean over the KV head's query heads of their window sums.
void window_scores(const HeadView& head, int heads_per_kv, std::vector<double>& score);

// Odd kernel, stride 1: the average divides by the kernel with zeros past both ends; the maximum is of what is there.
void pool(std::span<const double> score, Pooling pooling, int kernel, std::vector<double>& out);

// Sets keep[i] for the `count` highest of score[first, last), ties by lower index.
void keep_best(std::span<const double> score, Candidates range, int64_t count, std::vector<int32_t>& order,
               std::vector<uint8_t>& keep);

// keep = 1 outside the candidates, 0 on them.
void keep_protected(size_t n, Candidates range, std::vector<uint8_t>& keep);
// All that is not kept, ascending.
void drop_rest(std::span<const uint8_t> keep, std::vector<int32_t>& drop);
// What most policies do at a prompt's end: keeps at most `capacity` tokens of a head, the protected ones and the best others.
void keep_capacity(size_t n, Candidates range, std::span<const double> score, int64_t capacity, PolicyScratch& scratch,
                   std::vector<int32_t>& drop);

// Whole shares with the sum `total`: each quota rounded down, then one more to the largest remainders (ties: lower index), none
// above its limit; what a limit leaves over goes to the others in the same order. The sum is less only if all are at their
// limit.
std::vector<int64_t> largest_remainder(std::span<const double> quotas, std::span<const int64_t> limits, int64_t total);

// The positions that any head of the layer stores, and each head's index of each of them (-1: dropped before). For policies
// that decide for all heads at once; the same for every head until heads have dropped different tokens.
struct Aligned {
  std::vector<int64_t> positions;
  std::vector<std::vector<int32_t>> index;  // [kv_heads][positions]
  size_t size() const { return positions.size(); }
};
Aligned align(const PolicyView& view);

}  // namespace kvmix
