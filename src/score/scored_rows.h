// What the exact model says in the second half of a window, to measure changes against.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "score/divergence.h"
#include "score/layerwise.h"

namespace kvmix {

class ScoredRows {
 public:
  // `hidden` is the residual stream after the last layer of the exact model.
  ScoredRows(Layerwise& runner, size_t tokens, std::span<const float> hidden, int threads);
  // KL divergence in nats, at each scored position, of a model whose stream ends in `hidden`.
  std::vector<double> divergence(Layerwise& runner, std::span<const float> hidden) const;

 private:
  // visit(row, logits) for every scored row, on all threads.
  template <class Visit>
  void by_blocks(Layerwise& runner, std::span<const float> hidden, const Visit& visit) const;

  int threads_;
  std::vector<int> rows_;
  std::vector<std::vector<float>> reference_;  // logits
};

}  // namespace kvmix
