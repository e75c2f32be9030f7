#include "score/divergence.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define KVMIX_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define KVMIX_CLONES
#endif

namespace kvmix {
namespace {

constexpr size_t kBlock = 1024;  // summed in float, then added up in double

// exp(x) for x <= 0 to 2e-7 relative: 2^n times a polynomial on half an octave either side.
inline float exp_negative(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
  const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

KVMIX_CLONES float block_exp_sum(const float* x, size_t n, float top) {
  float lanes[16] = {};
  size_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (size_t j = 0; j < 16; ++j) lanes[j] += exp_negative(x[i + j] - top);
  }
  float sum = 0;
  for (const float lane : lanes) sum += lane;
  for (; i < n; ++i) sum += exp_negative(x[i] - top);
  return sum;
}

KVMIX_CLONES void block_probabilities(const float* x, size_t n, float log_sum, float* p) {
  for (size_t i = 0; i < n; ++i) p[i] = exp_negative(std::min(x[i] - log_sum, 0.0f));
}

KVMIX_CLONES float block_cross(const float* p, const float* a, const float* b, size_t n, float shift) {
  float lanes[16] = {};
  size_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (size_t j = 0; j < 16; ++j) lanes[j] += p[i + j] * (a[i + j] - b[i + j] - shift);
  }
  float sum = 0;
  for (const float lane : lanes) sum += lane;
  for (; i < n; ++i) sum += p[i] * (a[i] - b[i] - shift);
  return sum;
}

}  // namespace

double log_sum_exp(std::span<const float> x) {
  const float top = *std::max_element(x.begin(), x.end());
  double sum = 0;
  for (size_t i = 0; i < x.size(); i += kBlock)
    sum += static_cast<double>(block_exp_sum(&x[i], std::min(kBlock, x.size() - i), top));
  return static_cast<double>(top) + std::log(sum);
}

void set_reference(std::span<const float> logits, ReferenceRow& row) {
  row.logits.assign(logits.begin(), logits.end());
  row.probabilities.resize(logits.size());
  row.log_sum = log_sum_exp(logits);
  row.top = static_cast<int>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  block_probabilities(logits.data(), logits.size(), static_cast<float>(row.log_sum), row.probabilities.data());
}

RowScore score_row(const ReferenceRow& reference, std::span<const float> logits, int target) {
  const double log_sum = log_sum_exp(logits);
  RowScore score;
  // Both log-probabilities are shifted alike first, so that small divergences survive float sums.
  const double shift = reference.log_sum - log_sum;
  for (size_t i = 0; i < logits.size(); i += kBlock) {
    score.kl += static_cast<double>(block_cross(&reference.probabilities[i], &reference.logits[i], &logits[i],
                                                std::min(kBlock, logits.size() - i), static_cast<float>(shift)));
  }
  score.nll = log_sum - static_cast<double>(logits[static_cast<size_t>(target)]);
  score.same_top = reference.top == std::max_element(logits.begin(), logits.end()) - logits.begin();
  return score;
}

}  // namespace kvmix
