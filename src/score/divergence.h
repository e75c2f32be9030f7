// Divergence of next-token distributions, fast enough for large vocabularies.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace kvmix {

// log of the sum of exp(logit).
double log_sum_exp(std::span<const float> logits);

// A row of reference logits with what comparisons with it need.
struct ReferenceRow {
  std::vector<float> logits, probabilities;
  double log_sum = 0;
  int top = 0;
};
void set_reference(std::span<const float> logits, ReferenceRow& row);

struct RowScore {
  double kl = 0, nll = 0;
  bool same_top = false;
};
// KL(reference || logits) in nats, and the negative log-likelihood of `target` under the logits.
RowScore score_row(const ReferenceRow& reference, std::span<const float> logits, int target);

}  // namespace kvmix
