// The same widths for every layer.
#include <algorithm>

#include "codec/spelling.h"
#include "plan/planner.h"

namespace kvmix {
namespace {

Plan make(const PlannerRequest& request) {
  const PlannerOptions options("uniform", request.options);
  Plan plan = empty_plan(request, "uniform");
  const int key_bits = options.bits("k-bits", 4), value_bits = options.bits("v-bits", 4);
  read_fp16_part(options, usual_fp16_part(*request.model), plan);
  read_recent(options, plan);
  const bool rotate_keys = options.choice("key-hadamard", "off", {"on", "off"}) == "on";
  const bool rotate_values = options.choice("value-hadamard", "on", {"on", "off"}) == "on";
  const int group = options.integer("group", 0, 0, kCodecGroups.back());
  if (group != 0 && std::find(kCodecGroups.begin(), kCodecGroups.end(), group) == kCodecGroups.end()) {
    throw Error(Status::kInvalidArgument, "planner uniform: option group must be " + one_of(kCodecGroups));
  }
  const std::string fit = options.choice("codec-fit", "recipe", {"recipe", "minmax", "fitted", "unbiased"});
  for (size_t l = 0; l < plan.layers.size(); ++l) {
    Plan::Layer& layer = plan.layers[l];
    layer.key = recipe_key(key_bits, rotate_keys);
    if (!layer.key.codec.is_f16()) take_off_bias(request.model->layers[l], layer.key.transform);
    layer.value = recipe_value(value_bits);
    layer.value.transform.hadamard = rotate_values && !layer.value.codec.is_f16();
    for (SideConfig* side : {&layer.key, &layer.value}) {
      if (side->codec.is_f16()) continue;
      if (group != 0) side->codec.group = group;
      side->codec.fit = fit_named(fit).value_or(side->codec.fit);  // the recipe's own where none is named
    }
  }
  plan.note = "keys " + to_string(plan.layers.front().key.codec) + ", values " + to_string(plan.layers.front().value.codec);
  return plan;
}

}  // namespace

extern const Planner kUniformPlanner;
const Planner kUniformPlanner = {{"uniform",
                                  "the same widths for every layer",
                                  {{"k-bits", "key width: " + one_of(kCodecBits) + " (4)"},
                                   {"v-bits", "value width (4)"},
                                   {"key-hadamard", "rotate keys: on or off (off)"},
                                   {"value-hadamard", "rotate values: on or off (on)"},
                                   {"group", one_of(kCodecGroups) + " for both sides (keys 128, values 64)"},
                                   {"codec-fit", "minmax, fitted or unbiased, both sides (keys fitted, values minmax)"},
                                   {"sinks", "first tokens kept fp16 (16)"},
                                   {"local-sinks", "the same in layers with a sliding window (0)"},
                                   {"window", "newest tokens not packed (64; at most a 16th of the narrowest sliding window)"},
                                   kRecentOption},
                                  false,
                                  false,
                                  false},
                                 make};

}  // namespace kvmix
