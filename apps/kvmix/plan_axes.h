// One budget over several axes: in how many bits, how many tokens stay, which channels of keys, how many latents.
#pragma once

#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "command.h"
#include "kvmix/engine.h"
#include "kvmix/plan.h"

namespace kvmix::app {

// Beside bits, which every plan spends on.
struct Axes {
  bool tokens = false, channels = false, ranks = false;
  bool any() const { return tokens || channels || ranks; }
};
// Of a list such as "tokens,bits". Throws UsageError.
Axes parse_axes(const std::string& list);

struct AxesTask {
  std::string planner;
  PlannerRequest request;  // without a meter; with factors where `axes` has ranks
  Axes axes;
  // Windows that candidates are compared on, and others that the choice is checked on; each window's first half is the prompt.
  std::vector<std::vector<Token>> searched, held_out;
  int threads = 0;
  int needles = 0;  // passkeys per depth; 0: text alone decides
};

// A plan of the budget's bytes, as it was measured.
struct AxesCandidate {
  Plan plan = {};
  // What it takes beside bits: "all", "snapkv keep=0.5"; "all", "think keep=0.5"; "none", "palu, price 0.25".
  std::string tokens = "all", channels = "all", ranks = "none";
  double bytes = 0;
  double kl = 0, kl_error = 0, top1 = 0;  // on the searched text
  double found = 0;                       // part of the passkeys
  std::string lost = {};                       // why there is no such plan; empty if there is
};

struct AxesChoice {
  std::vector<AxesCandidate> candidates;
  size_t chosen = 0;
  // On the held-out text: the choice, and the plan of bits alone (the same where that is the choice).
  double held_out = 0, held_out_bits = 0;
  // Divergence without a quarter of keys' latents, and of values'; with the axis ranks.
  double key_probe = NAN, value_probe = NAN;
  std::string why;
};

// Every candidate takes as many of the budget's bytes as the planner can spend beside its policy. The one with the least
// divergence is chosen among those that find as many passkeys as bits alone, but for a tenth; if held-out text does not bear it
// out, bits alone are. Fewer tokens and fewer channels are tried together where each is better than bits alone. Ranks and bits
// share the budget layer by layer, at the price that leaving out a quarter of all latents was measured to have, a quarter of it
// and four times it. Throws as make_plan, and Error if no candidate meets the budget.
AxesChoice choose_axes(const std::shared_ptr<const Model>& model, const AxesTask& task, const Progress& progress);

// Of the axes tokens and bits: for every choice of tokens the planner's curve, measured: [choice][size].
std::vector<std::vector<AxesCandidate>> axes_curves(const std::shared_ptr<const Model>& model, const AxesTask& task, int points,
                                                    const Progress& progress);

}  // namespace kvmix::app
