// KVarN's tile recipe in every layer: the baseline of that name.
#include <algorithm>
#include <array>

#include "codec/spelling.h"
#include "kvmix/codec.h"
#include "plan/planner.h"

namespace kvmix {
namespace {

constexpr std::array kBits = {2, 3, 4, 5, 6, 8};
// First tokens in fp16; there is no window beyond the tile that is not full.
constexpr Fp16Part kRecipe = {.sinks = 128, .local_sinks = 0, .window = 0};

SideConfig side_of(int bits, const char* axis, const std::string& fit) {
  SideConfig side;
  side.codec = parse_codec("kvarn" + std::to_string(bits) + axis + fit);
  side.transform.hadamard = true;
  return side;
}

int width(const PlannerOptions& options, const char* name, int fallback) {
  const int bits = options.bits(name, fallback);
  if (std::find(kBits.begin(), kBits.end(), bits) == kBits.end()) {
    throw Error(Status::kInvalidArgument, std::string("planner kvarn: option ") + name + " must be " + one_of(kBits));
  }
  return bits;
}

Plan make(const PlannerRequest& request) {
  const PlannerOptions options("kvarn", request.options);
  Plan plan = empty_plan(request, "kvarn");
  const int key_bits = width(options, "k-bits", 4), value_bits = width(options, "v-bits", 2);
  const std::string fit = options.choice("codec-fit", "minmax", {"minmax", "fitted"});
  read_fp16_part(options, kRecipe, plan);
  if (options.choice("recent", "f16", {"8", "f16"}) == "8") plan.recent = kRecentRows;
  for (size_t l = 0; l < plan.layers.size(); ++l) {
    Plan::Layer& layer = plan.layers[l];
    layer.key = side_of(key_bits, ".channel.", fit);
    take_off_bias(request.model->layers[l], layer.key.transform);  // ours: the recipe rotates keys as they are
    layer.value = side_of(value_bits, ".token.", fit);
  }
  plan.note = "keys " + to_string(plan.layers.front().key.codec) + ", values " + to_string(plan.layers.front().value.codec);
  return plan;
}

}  // namespace

extern const Planner kKvarnPlanner;
const Planner kKvarnPlanner = {{"kvarn",
                                "KVarN's recipe (arXiv 2606.03458) in every layer",
                                {{"k-bits", "key width: " + one_of(kBits) + " (4)"},
                                 {"v-bits", "value width (2)"},
                                 {"codec-fit", "minmax, as published, or fitted (minmax)"},
                                 {"sinks", "first tokens kept fp16 (128)"},
                                 {"local-sinks", "the same in layers with a sliding window (0)"},
                                 {"window", "newest tokens not packed, besides those of a tile that is not full (0)"},
                                 {"recent", "rows not sealed yet: 8 (bits) or f16 (f16)"}},
                                false,
                                false,
                                false},
                               make};

}  // namespace kvmix
