// Profiles from anybody: one that is read is written and read again as it was, and planners make a plan of it or say what it
// lacks.
#include <algorithm>
#include <stdexcept>

#include "fuzz/target.h"
#include "kvmix/plan.h"

namespace kvmix {
namespace {

constexpr size_t kMostLayers = 4;  // of a profile that is planned with

void plan_with(const Profile& profile) {
  ModelShape shape;
  shape.fingerprint = profile.fingerprint;
  shape.layers.assign(profile.key_score.size(), {2, 1, 32, 0, 0.2f, 0});
  PlannerRequest request;
  request.model = &shape;
  request.profile = &profile;
  request.budget.bits = 4;
  request.budget.context = 1024;
  for (const char* planner : {"kvmix-paper", "kvmix"}) {
    try {
      const Plan plan = make_plan(planner, request);
      parse_plan(to_json(plan), "planned");
      predict_bytes(cache_config(plan, shape), request.budget.context);
    } catch (const Error& e) {
      // What a planner makes must be readable; anything else may be wrong with a profile.
      if (e.status() == Status::kCorrupt || e.status() == Status::kInternal) throw std::logic_error(e.what());
    }
  }
}

bool accepts(const std::string& input) {
  Profile profile;
  std::string text;
  try {
    profile = parse_profile(input, "profile");
    text = to_json(profile);
  } catch (const Error&) {
    return false;
  }
  if (to_json(parse_profile(text, "written")) != text) throw std::logic_error("a profile is not read as it was written");
  if (profile.key_score.size() <= kMostLayers) plan_with(profile);
  return true;
}

std::vector<fuzz::Seed> seeds() {
  Profile scores;
  scores.model = scores.fingerprint = "m";
  scores.prompts = 1;
  scores.tokens = 512;
  scores.key_score = {1.5, 2.25};
  scores.value_score = {0.5, 3};
  scores.key_score_by_prompt = {{1.5, 2.25}};
  scores.value_score_by_prompt = {{0.5, 3}};
  Profile measured = scores;
  for (int layer = 0; layer < 2; ++layer) {
    for (const Side side : {Side::kKey, Side::kValue}) {
      for (int bits = 2; bits <= 4; ++bits) {
        const std::string codec =
            "int" + std::to_string(bits) + (side == Side::kKey ? ".channel.g128.fitted.zero" : ".token.g64.minmax.zero");
        for (const char* transform : {"plain", "hadamard"})
          measured.sensitivities.push_back({"kl", layer, side, codec, transform, 1.0 / (bits + layer)});
      }
    }
    measured.sensitivities.push_back({"fisher", layer, Side::kKey, "int8.token.g64.minmax.zero", "plain", 0.001, true});
    measured.windows.push_back(1);
    measured.key_mean.push_back(std::vector<float>(32, 0.5f));
  }
  TransformSpec spec;
  spec.hadamard = true;
  spec.scales.assign(32, 0.5f);
  spec.center.assign(32, 0.25f);
  measured.transforms.push_back({"scaled", 0, Side::kKey, spec});
  return {fuzz::whole(to_json(scores)), fuzz::whole(to_json(measured))};
}

const fuzz::Registered registered({"profile", seeds, accepts, 6000});

}  // namespace
}  // namespace kvmix
