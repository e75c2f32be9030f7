// The default planner: a byte budget spent exactly (multiple-choice knapsack) over layer x side x codec, by what each choice
// was measured to cost; without measured sensitivities by the gradient scores and the usual loss of a width.
#include <algorithm>
#include <cmath>
#include <set>

#include "cache/state.h"
#include "plan/allocate.h"
#include "plan/planner.h"

namespace kvmix {
namespace {

constexpr int kWidths[] = {1, 2, 3, 4, 6, 8};

// Squared error of a width relative to 2 bits, medians measured on small models.
double relative_error(int bits) {
  switch (bits) {
    case 1:
      return 3.4;
    case 2:
      return 1.0;
    case 3:
      return 0.23;
    default:
      return 0.05 * std::pow(4.0, 4 - bits);
  }
}

struct Candidate {
  SideConfig config;
  double cost;
};

std::string pick_metric(const Profile& profile, const std::string& wanted) {
  std::set<std::string> have;
  for (const auto& s : profile.sensitivities) have.insert(s.metric);
  if (wanted == "gradient") return "";
  if (wanted != "best") {
    if (have.contains(wanted)) return wanted;
    throw Error(Status::kInvalidArgument,
                "the profile has no \"" + wanted + "\" sensitivities; measure them with kvmix profile --sensitivity " + wanted);
  }
  for (const char* metric : {"kl", "fisher-page", "fisher", "output"}) {
    if (have.contains(metric)) return metric;
  }
  return "";
}

std::vector<Candidate> candidates(const Profile& profile, const std::string& metric, int layer, Side side) {
  std::vector<Candidate> out;
  if (metric.empty()) {
    const double score = (side == Side::kKey ? profile.key_score : profile.value_score)[static_cast<size_t>(layer)];
    for (const int bits : kWidths) {
      out.push_back({side == Side::kKey ? recipe_key(bits, false) : recipe_value(bits), score * relative_error(bits)});
    }
  } else {
    for (const auto& s : profile.sensitivities) {
      if (s.metric != metric || s.layer != layer || s.side != side) continue;
      Candidate c{{parse_codec(s.codec), {}}, std::max(s.cost, 0.0)};
      c.config.transform.hadamard = s.hadamard;
      out.push_back(std::move(c));
    }
    if (out.empty()) {
      throw Error(Status::kMismatch, "the profile has no \"" + metric + "\" sensitivity of layer " + std::to_string(layer) +
                                         (side == Side::kKey ? " keys" : " values") +
                                         "; the measurement is incomplete, run kvmix profile again");
    }
  }
  out.push_back({SideConfig{}, 0.0});  // fp16
  return out;
}

Plan make(const PlannerRequest& request) {
  const PlannerOptions options("kvmix", request.options);
  Plan plan = empty_plan(request, "kvmix");
  plan.sinks = options.integer("sinks", 16, 0, 4096);
  plan.window.tokens = options.integer("window", 128, 0, 1 << 20);
  const std::string metric = pick_metric(
      *request.profile, options.choice("metric", "best", {"best", "kl", "fisher", "fisher-page", "output", "gradient"}));
  const int64_t context = request.budget.context;

  // What does not depend on the codecs: sinks, window, tables. Sealed pages are priced per choice.
  const CacheConfig base = cache_config(plan, *request.model);
  auto fixed = static_cast<int64_t>(predict_bytes(base, context));
  std::vector<std::vector<Candidate>> all;
  std::vector<std::vector<Choice>> items;
  for (size_t l = 0; l < plan.layers.size(); ++l) {
    const LayerConfig& layer = base.layers[l];
    const PagePrediction pages = predict_pages(layer, context);
    const int64_t sealed = (pages.sealed - pages.freed) * layer.kv_heads;
    for (const Side side : {Side::kKey, Side::kValue}) {
      fixed -= sealed * static_cast<int64_t>(tile_bytes(CodecSpec{}, layer.head_dim));
      all.push_back(candidates(*request.profile, metric, static_cast<int>(l), side));
      std::vector<Choice> choices;
      for (const Candidate& c : all.back())
        choices.push_back({sealed * static_cast<int64_t>(tile_bytes(c.config.codec, layer.head_dim)), c.cost});
      items.push_back(std::move(choices));
    }
  }
  const auto budget = static_cast<int64_t>(budget_bytes(request.budget, *request.model));
  const std::vector<size_t> chosen = allocate(items, budget - fixed);
  if (chosen.empty()) {
    const double elements = live_elements(base, context);
    const int64_t least = fixed + least_bytes(items);
    char text[256];
    std::snprintf(text, sizeof text,
                  "the budget of %.2f MiB per sequence cannot be met: at %lld tokens the smallest plan takes %.2f MiB (%.2f "
                  "bits per element)",
                  static_cast<double>(budget) / (1 << 20), static_cast<long long>(context),
                  static_cast<double>(least) / (1 << 20), static_cast<double>(least) * 8 / elements);
    throw Error(Status::kInvalidArgument, text);
  }
  double cost = 0;
  for (size_t l = 0; l < plan.layers.size(); ++l) {
    plan.layers[l].key = all[2 * l][chosen[2 * l]].config;
    plan.layers[l].value = all[2 * l + 1][chosen[2 * l + 1]].config;
    cost += all[2 * l][chosen[2 * l]].cost + all[2 * l + 1][chosen[2 * l + 1]].cost;
  }
  char note[256];
  std::snprintf(note, sizeof note, "%.3f bits per element at %lld tokens, by %s; predicted cost %.5g",
                predict_bits_per_element(cache_config(plan, *request.model), context), static_cast<long long>(context),
                metric.empty() ? "gradient scores" : metric.c_str(), cost);
  plan.note = note;
  return plan;
}

}  // namespace

extern const Planner kKvmixPlanner;
const Planner kKvmixPlanner = {{"kvmix",
                                "a byte budget spent exactly where it was measured to matter",
                                {{"metric", "best, kl, fisher, fisher-page, output or gradient (best the profile has)"},
                                 {"sinks", "first tokens kept fp16 (16)"},
                                 {"window", "newest tokens kept fp16 (128)"}},
                                true,
                                true},
                               make};

}  // namespace kvmix
