// How much attention queries pay to each key, as token policies ask for it. The reference, in fp32, over keys that are not
// packed: what a faster pass must agree with. Rows are added one by one in the queries' order, so sums do not depend on how a
// prompt was cut into chunks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace kvmix {

// One KV head, its query heads and its n keys.
struct ScoreKeys {
  int heads_per_kv = 1, head_dim = 0;
  float scale = 1, softcap = 0;
  std::span<const float> keys;         // [n][head_dim], as attention sees them (rotated)
  std::span<const int64_t> positions;  // [n] ascending
};

// out[heads_per_kv][n]: the softmax weights of one query, q [heads_per_kv][head_dim] at `position`; 0 for later keys, and all 0
// if there are no others. (arXiv 1706.03762, 3.2.1; softcap as in Gemma 2, arXiv 2408.00118, section 2.)
void score_row(const ScoreKeys& head, const float* q, int64_t position, std::span<float> out);

// Dots of a query and the keys that it sees become its softmax weights, in place: scale, softcap, softmax.
void weigh(std::span<float> dots, float scale, float softcap);

// window[heads_per_kv][n] += a query's weights.
void add_to_window(std::span<const float> row, std::span<float> window);
// mass[n] += the mean, or the largest, of a query's weights over the query heads; counted[n] += 1 for each key that the query
// at `position` sees.
void add_mean_mass(std::span<const float> row, std::span<float> mass);
void add_max_mass(std::span<const float> row, std::span<float> mass);
void count_query(const ScoreKeys& head, int64_t position, std::span<int32_t> counted);

// out[n] = the mean, or the largest, over query heads of window[heads_per_kv][n].
void mean_of_window(std::span<const float> window, std::span<float> out);
void max_of_window(std::span<const float> window, std::span<float> out);

}  // namespace kvmix
