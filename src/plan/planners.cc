// The registry of planners and what they share.
#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>

#include "backend/cuda/layer_format.h"
#include "base/fp16.h"
#include "codec/spelling.h"
#include "plan/planner.h"
#include "rows/scale.h"

namespace kvmix {

extern const Planner kKvmixPlanner, kKvmixPaperPlanner, kKvtunerPlanner, kKvarnPlanner, kUniformPlanner;

namespace {

const std::array kPlanners = {
    &kKvmixPlanner, &kKvmixPaperPlanner, &kKvtunerPlanner, &kKvarnPlanner, &kUniformPlanner,
};

// Throws kUnsupported naming the layer that the device has no code for.
void check_on_cuda(const Plan& plan, const ModelShape& model) {
  const CacheConfig config = cache_config(plan, model);
  for (size_t l = 0; l < config.layers.size(); ++l) cuda::layer_format(config.layers[l], "layer " + std::to_string(l));
}

}  // namespace

std::span<const PlannerInfo> planners() {
  static const std::vector<PlannerInfo> kInfos = [] {
    std::vector<PlannerInfo> infos;
    infos.reserve(std::size(kPlanners));
    for (const Planner* p : kPlanners) infos.push_back(p->info);
    return infos;
  }();
  return kInfos;
}

namespace {

// The allocator's rounding, which depends on the plan, is taken off a budget that must hold it, until the plan fits.
Plan fitted_plan(const Planner& planner, PlannerRequest request) {
  const size_t promised = request.budget.bytes;
  for (int tries = 0;; ++tries) {
    Plan plan = planner.make(request);
    if (promised == 0 || !request.budget.slack || !planner.info.needs_budget) return plan;
    CacheConfig config = cache_config(plan, *request.model);
    config.device = request.device;
    const auto sequences = static_cast<size_t>(request.budget.sequences);
    const size_t bytes = predict_bytes(config, request.budget.context) * sequences +
                         predict_slack_bytes(config, request.budget.context, request.budget.sequences);
    if (bytes <= promised) return plan;
    if (tries == 8 || request.budget.bytes <= bytes - promised) {
      throw BudgetError("the budget of " + std::to_string(promised) +
                            " bytes cannot be met: with the allocator's rounding the plan takes " + std::to_string(bytes) +
                            "; give " + std::to_string(bytes),
                        bytes / sequences);
    }
    request.budget.bytes -= bytes - promised;
  }
}

}  // namespace

Plan make_plan(const std::string& name, const PlannerRequest& request) {
  std::string names;
  for (const Planner* planner : kPlanners) {
    names += (names.empty() ? "" : ", ") + planner->info.name;
    if (planner->info.name != name) continue;
    if (request.model == nullptr) throw Error(Status::kInvalidArgument, "a planner needs the model");
    for (const auto& given : request.options) {
      const auto& known = planner->info.options;
      if (std::none_of(known.begin(), known.end(), [&](const auto& o) { return o.first == given.first; })) {
        std::string accepted;
        for (const auto& [n, help] : known) accepted += (accepted.empty() ? "" : ", ") + n;
        throw Error(Status::kInvalidArgument, "planner " + name + " has no option \"" + given.first + "\"; it has " + accepted);
      }
    }
    if (planner->info.needs_profile && request.profile == nullptr) {
      throw Error(Status::kInvalidArgument, "planner " + name + " needs a profile; make one with kvmix profile");
    }
    if (request.profile != nullptr) check_profile(*request.profile, *request.model, false);
    if (planner->info.needs_budget && request.budget.bits <= 0 && request.budget.bytes == 0) {
      throw Error(Status::kInvalidArgument, "planner " + name + " needs a budget: average bits per element, or bytes");
    }
    if (request.meter != nullptr && !planner->info.measures) {
      throw Error(Status::kInvalidArgument, "planner " + name + " does not measure plans");
    }
    if (request.factors != nullptr && (!planner->info.ranks || request.meter != nullptr || request.device != "cpu")) {
      throw Error(Status::kInvalidArgument,
                  "planner " + name + " does not share a budget between bits and ranks" +
                      (planner->info.ranks ? " with a meter, or on another device than \"cpu\"" : ""));
    }
    if (request.device != "cpu" && request.device != "cuda")
      throw Error(Status::kInvalidArgument, "device \"" + request.device + "\" is unknown; expected \"cpu\" or \"cuda\"");
    Plan plan = fitted_plan(*planner, request);
    if (request.device == "cuda") check_on_cuda(plan, *request.model);
    return plan;
  }
  throw Error(Status::kInvalidArgument, "planner \"" + name + "\" is unknown; expected one of " + names);
}

void PlannerOptions::fail(const std::string& name, const std::string& expected) const {
  throw Error(Status::kInvalidArgument, std::string("planner ") + planner_ + ": option " + name + " is \"" + values_.at(name) +
                                            "\"; expected " + expected);
}

int PlannerOptions::integer(const std::string& name, int fallback, int low, int high) const {
  const auto it = values_.find(name);
  if (it == values_.end()) return fallback;
  int value = 0;
  const char* end = it->second.data() + it->second.size();
  const auto [at, error] = std::from_chars(it->second.data(), end, value);
  if (error != std::errc{} || at != end || value < low || value > high) {
    fail(name, "a whole number from " + std::to_string(low) + " to " + std::to_string(high));
  }
  return value;
}

double PlannerOptions::number(const std::string& name, double fallback, double low, double high) const {
  const auto it = values_.find(name);
  if (it == values_.end()) return fallback;
  double value = 0;
  const char* end = it->second.data() + it->second.size();
  const auto [at, error] = std::from_chars(it->second.data(), end, value);
  if (error != std::errc{} || at != end || !(value >= low && value <= high)) {
    fail(name, "a number from " + std::to_string(low) + " to " + std::to_string(high));
  }
  return value;
}

std::string PlannerOptions::choice(const std::string& name, const std::string& fallback,
                                   const std::vector<std::string>& accepted) const {
  const auto it = values_.find(name);
  if (it == values_.end()) return fallback;
  if (std::find(accepted.begin(), accepted.end(), it->second) == accepted.end()) {
    std::string all;
    for (const std::string& a : accepted) all += (all.empty() ? "" : ", ") + a;
    fail(name, "one of " + all);
  }
  return it->second;
}

int PlannerOptions::bits(const std::string& name, int fallback) const {
  const int value = integer(name, fallback, kCodecBits.front(), kCodecBits.back());
  if (std::find(kCodecBits.begin(), kCodecBits.end(), value) == kCodecBits.end()) fail(name, one_of(kCodecBits));
  return value;
}

Plan empty_plan(const PlannerRequest& request, const char* planner) {
  Plan plan;
  plan.fingerprint = request.model->fingerprint;
  plan.model = request.model->name;
  plan.planner = planner;
  plan.layers.resize(request.model->layers.size());
  return plan;
}

SideConfig recipe_key(int bits, bool hadamard) {
  SideConfig side;
  if (bits == kF16Bits) return side;
  side.codec = {bits, Axis::kChannel, 128, Fit::kLeastSquares, true};
  side.transform.hadamard = hadamard;
  return side;
}

SideConfig recipe_value(int bits) {
  SideConfig side;
  if (bits == kF16Bits) return side;
  side.codec = {bits, Axis::kToken, 64, bits == 1 ? Fit::kUnbiased : Fit::kMinMax, true};
  side.transform.hadamard = true;
  return side;
}

void check_scores(const Profile& profile) {
  if (profile.prompts > 0) return;
  throw Error(Status::kMismatch,
              "the profile has no gradient scores yet; its measurement was stopped, run kvmix profile again");
}

void take_off_bias(const ModelShape::Layer& layer, TransformSpec& transform) {
  const auto as_stored = [](double x) { return f16_to_f32(f32_to_f16(static_cast<float>(x))); };
  // Softmax does not see what all keys share, unless its scores are capped.
  if (layer.softcap == 0 && !layer.key_center.empty()) {
    transform.center.clear();
    for (const float x : layer.key_center) transform.center.push_back(as_stored(static_cast<double>(x)));
  }
  const std::vector<float>& sizes = layer.key_sizes;
  if (sizes.empty()) return;
  const auto dim = static_cast<size_t>(layer.head_dim);
  std::vector<float> scale;
  for (size_t head = 0; head < sizes.size(); head += dim) {
    double logs = 0;  // sizes are known up to a factor: around 1, fp16 holds what they scale
    for (size_t c = 0; c < dim; ++c) logs += std::log(static_cast<double>(sizes[head + c]));
    const double mean = std::exp(logs / static_cast<double>(dim));
    for (size_t c = 0; c < dim; ++c)
      scale.push_back(as_stored(std::clamp(mean / static_cast<double>(sizes[head + c]), 1e-3, 1e3)));
  }
  set_scale(transform, std::move(scale));
}

TransformSpec named_transform(const ModelShape& model, const Profile& profile, int layer, Side side, const std::string& name) {
  TransformSpec spec;
  if (name == "plain" || name == "hadamard") {
    spec.hadamard = name == "hadamard";
    if (side == Side::kKey) take_off_bias(model.layers.at(static_cast<size_t>(layer)), spec);
    return spec;
  }
  for (const Profile::Transform& t : profile.transforms) {
    if (t.layer == layer && t.side == side && t.name == name) return t.spec;
  }
  throw Error(Status::kMismatch, "the profile has no transform \"" + name + "\" of layer " + std::to_string(layer) +
                                     (side == Side::kKey ? " keys" : " values") + "; measure it again with kvmix profile");
}

Fp16Part usual_fp16_part(const ModelShape& model) {
  Fp16Part part;
  for (const ModelShape::Layer& layer : model.layers) {
    if (layer.sliding_window > 0) part.window = std::min(part.window, layer.sliding_window / 16);
  }
  return part;
}

void read_fp16_part(const PlannerOptions& options, const Fp16Part& usual, Plan& plan) {
  Fp16Part part;
  part.sinks = options.integer("sinks", usual.sinks, 0, 4096);
  part.local_sinks = options.integer("local-sinks", std::min(part.sinks, usual.local_sinks), 0, 4096);
  part.window = options.integer("window", usual.window, 0, 1 << 20);
  set_fp16_part(part, plan);
}

void read_recent(const PlannerOptions& options, Plan& plan) {
  if (options.choice("recent", "8", {"8", "f16"}) == "8") plan.recent = kRecentRows;
}

double budget_bytes(const Budget& budget, const ModelShape& model) {
  if (budget.context < 1 || budget.context > (int64_t{1} << 32))
    throw Error(Status::kInvalidArgument, "the budget's context must be at least 1 token");
  if (budget.sequences < 1) throw Error(Status::kInvalidArgument, "the budget's number of sequences must be at least 1");
  if (budget.bytes > 0) return static_cast<double>(budget.bytes) / budget.sequences;
  return budget.bits * live_elements(cache_config(f16_plan(model), model), budget.context) / 8;
}

}  // namespace kvmix
