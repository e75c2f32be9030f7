// The paper's allocation (KVmix, arXiv 2506.08018; method b.2 to b.4): the layers with the largest gradient norms get more
// bits.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "plan/planner.h"

namespace kvmix {
namespace {

// Layers of the top fraction by score; ties go to the lower index, the count rounds half up.
std::vector<bool> top_layers(const std::vector<double>& scores, double fraction) {
  std::vector<size_t> order(scores.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return scores[a] > scores[b]; });
  const auto count = static_cast<size_t>(std::floor(fraction * static_cast<double>(scores.size()) + 0.5));
  std::vector<bool> top(scores.size(), false);
  for (size_t i = 0; i < std::min(count, scores.size()); ++i) top[order[i]] = true;
  return top;
}

// The same number of layers, drawn at random: what the scores are worth is the difference to this (method d.5).
void shuffle(std::vector<bool>& top, uint64_t seed, uint64_t side) {
  uint64_t state = seed * 2 + side;
  for (size_t i = top.size(); i > 1; --i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const size_t j = static_cast<size_t>(state >> 33) % i;
    const bool kept = top[i - 1];
    top[i - 1] = top[j];
    top[j] = kept;
  }
}

float ratio_of(int bits) { return bits == 1 ? 0.1f : bits >= 4 ? 0.3f : 0.2f; }

Plan make(const PlannerRequest& request) {
  const PlannerOptions options("kvmix-paper", request.options);
  check_scores(*request.profile);
  Plan plan = empty_plan(request, "kvmix-paper");
  const double key_fraction = options.number("k-fraction", 0.2, 0, 1), value_fraction = options.number("v-fraction", 0.2, 0, 1);
  const int key_high = options.bits("k-high", 3), key_low = options.bits("k-low", 2);
  const int value_high = options.bits("v-high", 4), value_low = options.bits("v-low", 2);
  const int group = options.integer("group", 32, 32, 128);
  if (group != 32 && group != 64 && group != 128)
    throw Error(Status::kInvalidArgument, "planner kvmix-paper: option group must be 32, 64 or 128");
  plan.sinks = options.integer("sinks", 0, 0, 4096);
  std::vector<bool> key_top = top_layers(request.profile->key_score, key_fraction);
  std::vector<bool> value_top = top_layers(request.profile->value_score, value_fraction);
  const int seed = options.integer("shuffle", 0, 0, 1 << 30);
  if (seed > 0) {
    shuffle(key_top, static_cast<uint64_t>(seed), 0);
    shuffle(value_top, static_cast<uint64_t>(seed), 1);
  }
  for (size_t l = 0; l < plan.layers.size(); ++l) {
    plan.layers[l].key.codec = {key_top[l] ? key_high : key_low, Axis::kChannel, group, Fit::kMinMax, true};
    plan.layers[l].value.codec = {value_top[l] ? value_high : value_low, Axis::kToken, group, Fit::kMinMax, true};
  }
  const std::string window = options.choice("window", "ratio", {"ratio", "fixed", "none"});
  if (window != "fixed") plan.window.tokens = 0;
  if (window == "ratio") {
    // One rule for the plan: the ratio of the width that most layers have.
    plan.window.ratio_key = ratio_of(key_fraction > 0.5 ? key_high : key_low);
    plan.window.ratio_value = ratio_of(value_fraction > 0.5 ? value_high : value_low);
  }
  plan.note = (seed > 0 ? "random layers, as many as the top " : "top ") + std::to_string(key_fraction) +
              " of layers by gradient norm: keys " + std::to_string(key_high) + "/" + std::to_string(key_low) +
              " bits, values " + std::to_string(value_high) + "/" + std::to_string(value_low) + ", group " +
              std::to_string(group);
  return plan;
}

}  // namespace

extern const Planner kKvmixPaperPlanner;
const Planner kKvmixPaperPlanner = {{"kvmix-paper",
                                     "the paper: top layers by gradient norm get more bits",
                                     {{"k-fraction", "share of layers with the high key width (0.2)"},
                                      {"v-fraction", "share of layers with the high value width (0.2)"},
                                      {"k-high", "key width of the top layers (3)"},
                                      {"k-low", "key width of the others (2)"},
                                      {"v-high", "value width of the top layers (4)"},
                                      {"v-low", "value width of the others (2)"},
                                      {"group", "32 as the paper, 64 or 128 (32)"},
                                      {"sinks", "first tokens kept fp16 (0, as the paper)"},
                                      {"shuffle", "a seed above 0 gives the high widths to random layers: the control (0)"},
                                      {"window", "ratio as the paper, fixed at 128, or none (ratio)"}},
                                     true,
                                     false,
                                     false},
                                    make};

}  // namespace kvmix
