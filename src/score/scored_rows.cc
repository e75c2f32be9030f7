#include "score/scored_rows.h"

#include <algorithm>

#include "base/parallel.h"

namespace kvmix {
namespace {

constexpr int kScoredRows = 512;                        // of a window's second half,
constexpr int64_t kReferenceLogits = int64_t{1} << 26;  // and fewer where the vocabulary is so large
constexpr size_t kRowsTogether = 64;                    // whose logits are there at a time

}  // namespace

ScoredRows::ScoredRows(Layerwise& runner, size_t tokens, std::span<const float> hidden, int threads) : threads_(threads) {
  const auto n = static_cast<int>(tokens), half = n / 2;
  const int most = std::clamp(static_cast<int>(kReferenceLogits / runner.vocab()), 1, kScoredRows);
  const int step = std::max(1, (n - half + most - 1) / most);
  for (int t = half; t < n; t += step) rows_.push_back(t);
  reference_.resize(rows_.size());
  by_blocks(runner, hidden,
            [&](size_t row, std::span<const float> logits) { reference_[row].assign(logits.begin(), logits.end()); });
}

template <class Visit>
void ScoredRows::by_blocks(Layerwise& runner, std::span<const float> hidden, const Visit& visit) const {
  for (size_t first = 0; first < rows_.size(); first += kRowsTogether) {
    const auto rows = std::span(rows_).subspan(first, std::min(kRowsTogether, rows_.size() - first));
    const std::span<const float> logits = runner.logits(hidden, rows);
    const size_t vocab = logits.size() / rows.size();
    parallel_for(threads_, rows.size(), [&](size_t r) { visit(first + r, logits.subspan(r * vocab, vocab)); });
  }
}

std::vector<double> ScoredRows::divergence(Layerwise& runner, std::span<const float> hidden) const {
  std::vector<double> kl(rows_.size());
  by_blocks(runner, hidden, [&](size_t row, std::span<const float> logits) {
    ReferenceRow reference;
    set_reference(reference_[row], reference);
    kl[row] = score_row(reference, logits, 0).kl;
  });
  return kl;
}

}  // namespace kvmix
