#include <algorithm>
#include <cmath>

#include "kvmix/engine.h"
#include "kvmix/error.h"

namespace kvmix {
namespace {

// SplitMix64: small, well mixed from any seed, the same everywhere.
uint64_t next_random(uint64_t& state) {
  state += 0x9e3779b97f4a7c15u;
  uint64_t z = state;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

}  // namespace

Sampler::Sampler(const SamplingOptions& options) : options_(options), state_(options.seed) {
  const auto fail = [](const char* what) { throw Error(Status::kInvalidArgument, what); };
  if (!(options.temperature >= 0.0f && options.temperature <= 100.0f)) fail("temperature must be 0 to 100");
  if (options.top_k < 0) fail("top-k must not be negative");
  if (!(options.top_p > 0.0f && options.top_p <= 1.0f)) fail("top-p must be above 0 and at most 1");
  if (!(options.min_p >= 0.0f && options.min_p <= 1.0f)) fail("min-p must be 0 to 1");
}

Token Sampler::sample(std::span<const float> logits) {
  if (logits.empty()) throw Error(Status::kInvalidArgument, "there are no logits to sample from");
  if (options_.temperature == 0.0f) {
    return static_cast<Token>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  }
  scratch_.clear();
  for (size_t i = 0; i < logits.size(); ++i) scratch_.emplace_back(logits[i], static_cast<Token>(i));
  const size_t kept = options_.top_k == 0 ? scratch_.size() : std::min(scratch_.size(), static_cast<size_t>(options_.top_k));
  const auto better = [](const auto& a, const auto& b) { return a.first != b.first ? a.first > b.first : a.second < b.second; };
  std::partial_sort(scratch_.begin(), scratch_.begin() + static_cast<ptrdiff_t>(kept), scratch_.end(), better);
  scratch_.resize(kept);

  const float top = scratch_.front().first;
  double sum = 0;
  for (auto& [weight, token] : scratch_) {
    weight = std::exp((weight - top) / options_.temperature);
    sum += static_cast<double>(weight);
  }
  size_t end = 0;
  for (double mass = 0; end < scratch_.size(); ++end) {
    if (end > 0 && (mass >= static_cast<double>(options_.top_p) * sum || scratch_[end].first < options_.min_p)) break;
    mass += static_cast<double>(scratch_[end].first);
  }
  double kept_sum = 0;
  for (size_t i = 0; i < end; ++i) kept_sum += static_cast<double>(scratch_[i].first);
  double r = static_cast<double>(next_random(state_) >> 11) * 0x1.0p-53 * kept_sum;
  for (size_t i = 0; i < end; ++i) {
    r -= static_cast<double>(scratch_[i].first);
    if (r < 0) return scratch_[i].second;
  }
  return scratch_[end - 1].second;
}

}  // namespace kvmix
