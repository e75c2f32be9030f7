// PyramidKV (arXiv 2406.02069): SnapKV's votes, with budgets that fall linearly from the first layer to the last.
#include "policy/pyramidkv.h"

#include <algorithm>
#include <cmath>

#include "policy/window_vote.h"

namespace kvmix {

int64_t Pyramid::tokens(double capacity, int64_t n, int ordinal, int ordinals) const {
  const auto length = static_cast<double>(n);
  const double share = ordinals > 1 ? static_cast<double>(ordinal) / (ordinals - 1) : 0;
  if (rule == Rule::kReal) {
    double low = capacity / beta, high = 2 * capacity - low;
    if (high >= length - static_cast<double>(window)) {
      high = length - static_cast<double>(window);
      low = 2 * capacity - high;
    }
    const bool falls = length >= high && high >= low && low >= static_cast<double>(window);
    const double kept = falls && ordinals > 1 ? high - share * (high - low) : capacity;
    return std::clamp<int64_t>(static_cast<int64_t>(std::nearbyint(kept)), std::min<int64_t>(window, n), n);
  }
  const auto whole = static_cast<int64_t>(std::min(capacity, 1e15) + 1e-9);
  const int64_t old = whole - window;
  if (n <= whole) return n;
  if (n < 2 * old || ordinals == 1) return whole;
  int64_t low = old / beta, high = 2 * old - low;
  if (high >= n - window) {
    high = n - window;
    low = 2 * old - high;
  }
  return high - ordinal * ((high - low) / (ordinals - 1)) + window;
}

namespace {

class PyramidKv final : public VotePolicy {
 public:
  explicit PyramidKv(const PolicyValues& values)
      : VotePolicy(values),
        pyramid_{.rule = values.choice("arithmetic") == "whole" ? Pyramid::Rule::kWhole : Pyramid::Rule::kReal,
                 .beta = values.integer("beta"),
                 .window = vote_.window} {}

 protected:
  int64_t capacity(const LayerShape& shape, int64_t prompt_length) const override {
    const Protection kept = vote_.protection();
    const double mean = pyramid_.rule == Pyramid::Rule::kReal ? budget_.exact(shape, prompt_length)
                                                              : static_cast<double>(VotePolicy::capacity(shape, prompt_length));
    return std::max(pyramid_.tokens(mean, prompt_length, shape.ordinal, shape.ordinals), kept.sinks + kept.window);
  }

 private:
  Pyramid pyramid_;
};

}  // namespace

extern const PolicyEntry kPyramidkvPolicy;
const PolicyEntry kPyramidkvPolicy = {
    {"pyramidkv", "snapkv with larger budgets for lower layers", "arXiv 2406.02069",
     window_vote_parameters(
         32,
         {integer_parameter("beta", 20, 1, 1000, "steepness: the last layer's share of the mean budget is 1 / beta"),
          choice_parameter("arithmetic", {"whole", "real"},
                           "budgets in whole steps with the window on top, or real ones with the window inside (kvpress)")})},
    [](const PolicyValues& values) -> std::unique_ptr<Policy> { return std::make_unique<PyramidKv>(values); }};

}  // namespace kvmix
