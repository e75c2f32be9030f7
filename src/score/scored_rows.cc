#include "score/scored_rows.h"

#include <algorithm>

#include "base/parallel.h"

namespace kvmix {
namespace {

constexpr int kScoredRows = 512;                        // of a window's second half,
constexpr int64_t kReferenceLogits = int64_t{1} << 26;  // and fewer where the vocabulary is so large

}  // namespace

ScoredRows::ScoredRows(Layerwise& runner, size_t tokens, std::span<const float> hidden, int threads) : threads_(threads) {
  const auto n = static_cast<int>(tokens), half = n / 2;
  const int most = std::clamp(static_cast<int>(kReferenceLogits / runner.vocab()), 1, kScoredRows);
  const int step = std::max(1, (n - half + most - 1) / most);
  for (int t = half; t < n; t += step) rows_.push_back(t);
  const std::span<const float> logits = runner.logits(hidden, rows_);
  reference_.resize(rows_.size());
  const size_t vocab = logits.size() / rows_.size();
  parallel_for(threads_, rows_.size(), [&](size_t r) { set_reference(logits.subspan(r * vocab, vocab), reference_[r]); });
}

std::vector<double> ScoredRows::divergence(Layerwise& runner, std::span<const float> hidden) const {
  const std::span<const float> logits = runner.logits(hidden, rows_);
  const size_t vocab = logits.size() / rows_.size();
  std::vector<double> kl(rows_.size());
  parallel_for(threads_, rows_.size(),
               [&](size_t r) { kl[r] = score_row(reference_[r], logits.subspan(r * vocab, vocab), 0).kl; });
  return kl;
}

}  // namespace kvmix
