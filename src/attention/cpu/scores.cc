#include "attention/scores.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace kvmix {
namespace {

// The keys that a query at `position` sees come first.
size_t visible(const ScoreKeys& head, int64_t position) {
  return static_cast<size_t>(std::upper_bound(head.positions.begin(), head.positions.end(), position) - head.positions.begin());
}

float mean_at(std::span<const float> rows, size_t n, size_t i) {
  float sum = 0;
  for (size_t at = i; at < rows.size(); at += n) sum += rows[at];
  const size_t heads = rows.size() / n;
  return sum / static_cast<float>(heads);
}

float max_at(std::span<const float> rows, size_t n, size_t i) {
  float most = rows[i];
  for (size_t at = i; at < rows.size(); at += n) most = std::max(most, rows[at]);
  return most;
}

}  // namespace

void score_row(const ScoreKeys& head, const float* q, int64_t position, std::span<float> out) {
  const size_t n = head.positions.size(), seen = visible(head, position), width = static_cast<size_t>(head.head_dim);
  std::fill(out.begin(), out.end(), 0.0f);
  if (seen == 0) return;
  for (int h = 0; h < head.heads_per_kv; ++h) {
    const float* query = q + h * width;
    float* row = out.data() + h * n;
    for (size_t i = 0; i < seen; ++i) {
      float dot = 0;
      for (size_t d = 0; d < width; ++d) dot += query[d] * head.keys[i * width + d];
      row[i] = dot;
    }
    weigh({row, seen}, head.scale, head.softcap);
  }
}

void weigh(std::span<float> dots, float scale, float softcap) {
  float most = -std::numeric_limits<float>::infinity();
  for (float& x : dots) {
    x *= scale;
    if (softcap > 0) x = softcap * std::tanh(x / softcap);
    most = std::max(most, x);
  }
  double sum = 0;  // thousands of small terms
  for (float& x : dots) {
    x = std::exp(x - most);
    sum += x;
  }
  const auto part = static_cast<float>(1 / sum);
  for (float& x : dots) x *= part;
}

void add_to_window(std::span<const float> row, std::span<float> window) {
  for (size_t i = 0; i < row.size(); ++i) window[i] += row[i];
}

void add_mean_mass(std::span<const float> row, std::span<float> mass) {
  for (size_t i = 0; i < mass.size(); ++i) mass[i] += mean_at(row, mass.size(), i);
}

void add_max_mass(std::span<const float> row, std::span<float> mass) {
  for (size_t i = 0; i < mass.size(); ++i) mass[i] += max_at(row, mass.size(), i);
}

void count_query(const ScoreKeys& head, int64_t position, std::span<int32_t> counted) {
  const size_t seen = visible(head, position);
  for (size_t i = 0; i < seen; ++i) ++counted[i];
}

void mean_of_window(std::span<const float> window, std::span<float> out) {
  for (size_t i = 0; i < out.size(); ++i) out[i] = mean_at(window, out.size(), i);
}

void max_of_window(std::span<const float> window, std::span<float> out) {
  for (size_t i = 0; i < out.size(); ++i) out[i] = max_at(window, out.size(), i);
}

}  // namespace kvmix
