#include "plan/candidates.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>

#include "backend/cuda/layer_format.h"
#include "cache/layout.h"
#include "codec/trellis.h"
#include "kvmix/error.h"
#include "plan/planner.h"

namespace kvmix {
namespace {

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

}  // namespace

std::string pick_metric(const Profile& profile, const std::string& wanted) {
  std::map<std::string, size_t> have;
  for (const auto& s : profile.sensitivities) ++have[s.metric];
  if (wanted == "gradient") return "";
  if (wanted != "best") {
    if (have.contains(wanted)) return wanted;
    throw Error(Status::kInvalidArgument,
                "the profile has no \"" + wanted + "\" sensitivities; measure them with kvmix profile --sensitivity " + wanted);
  }
  // An interrupted measurement of kl has less of it than of fisher, which every profile with kl has too.
  if (have.contains("kl") && have["kl"] >= have["fisher"]) return "kl";
  for (const char* metric : {"fisher", "output"}) {
    if (have.contains(metric)) return metric;
  }
  return "";
}

std::vector<Candidate> candidates(const ModelShape& model, const Profile& profile, const std::string& metric, int layer,
                                  Side side, const CodecSpec& recent, const CodecChoice& choice) {
  std::vector<Candidate> out;
  if (metric.empty()) {
    check_scores(profile);
    const double score = (side == Side::kKey ? profile.key_score : profile.value_score)[static_cast<size_t>(layer)];
    for (const int bits : kRecipeBits) {
      out.push_back({side == Side::kKey ? recipe_key(bits, false) : recipe_value(bits), score * relative_error(bits)});
      if (side == Side::kKey) take_off_bias(model.layers[static_cast<size_t>(layer)], out.back().config.transform);
    }
  } else {
    const auto incomplete = [&](const std::string& what) {
      throw Error(Status::kMismatch, "the profile has no \"" + metric + "\" sensitivity of layer " + std::to_string(layer) +
                                         (side == Side::kKey ? " keys" : " values") + what +
                                         "; the measurement is incomplete, run kvmix profile again");
    };
    const auto concerns = [&](const Profile::Sensitivity& s) {
      return s.metric == metric && s.layer == layer && s.side == side;
    };
    std::map<std::string, double> recent_costs;  // by transform
    for (const auto& s : profile.sensitivities) {
      if (s.recent && concerns(s) && parse_codec(s.codec) == recent) recent_costs[s.transform] = std::max(s.cost, 0.0);
    }
    // One bit errs more than two, in every row; a measurement that hardly says so was lucky in its windows (on Qwen2.5 one
    // bit of keys without bias seemed to cost what two do, and took two fifths of what a plan of 3.7 bits lost).
    std::map<std::pair<std::string, std::string>, double> least;  // of one bit, by codec and transform
    for (const auto& s : profile.sensitivities) {
      if (s.recent || !concerns(s)) continue;
      CodecSpec codec = parse_codec(s.codec);
      if (codec.bits != 2 || !codec.is_uniform()) continue;
      codec.bits = 1;
      least[{to_string(codec), s.transform}] = s.cost * relative_error(1) / relative_error(2);
    }
    for (const auto& s : profile.sensitivities) {
      if (s.recent || !concerns(s)) continue;
      Candidate c{{parse_codec(s.codec), {}}, std::max(s.cost, 0.0)};
      if (const auto floor = least.find({s.codec, s.transform}); floor != least.end()) c.cost = std::max(c.cost, floor->second);
      if (side == Side::kKey && c.config.codec.fit == Fit::kUnbiased && !choice.both_fits) continue;
      if (is_trellis(c.config.codec) && !choice.trellis) continue;
      if (!recent.is_f16()) {
        const auto cost = recent_costs.find(s.transform);
        if (cost == recent_costs.end()) incomplete(" in recent rows (" + to_string(recent) + ", " + s.transform + ")");
        c.cost += cost->second;
      }
      c.config.transform = named_transform(model, profile, layer, side, s.transform);
      out.push_back(std::move(c));
    }
    if (out.empty()) incomplete("");
  }
  out.push_back({SideConfig{}, 0.0});  // fp16, whose recent rows are too
  return out;
}

PricedChoices price(const Plan& plan, const ModelShape& model, const Profile& profile, const std::string& metric,
                    int64_t context, const std::string& device, const CodecChoice& choice) {
  PricedChoices priced;
  const CacheConfig base = cache_config(plan, model);
  priced.fixed_bytes = static_cast<int64_t>(predict_bytes(base, context));
  priced.elements = live_elements(base, context);
  for (size_t l = 0; l < plan.layers.size(); ++l) {
    const LayerConfig& layer = base.layers[l];
    const auto takes = [&](Side side, const Candidate& c) {
      LayerConfig with = layer;
      (side == Side::kKey ? with.key : with.value) = c.config;
      try {
        cuda::layer_format(with, "");
        return true;
      } catch (const Error&) {
        return false;
      }
    };
    const PagePrediction pages = predict_pages(layer, context);
    const int64_t sealed = (pages.sealed - pages.freed) * layer.kv_heads;
    const int64_t open = (pages.pages - pages.sealed) * layer.kv_heads;
    for (const Side side : {Side::kKey, Side::kValue}) {
      const auto bytes = [&](const CodecSpec& codec) { return static_cast<int64_t>(tile_bytes(codec, layer.head_dim)); };
      priced.fixed_bytes -= (sealed + open) * bytes(CodecSpec{});
      priced.sides.push_back(candidates(model, profile, metric, static_cast<int>(l), side, plan.recent, choice));
      if (device == "cuda") std::erase_if(priced.sides.back(), [&](const Candidate& c) { return !takes(side, c); });
      std::vector<Choice> choices;
      for (const Candidate& c : priced.sides.back())
        choices.push_back({sealed * bytes(c.config.codec) + open * bytes(open_codec(plan.recent, c.config.codec)), c.cost});
      priced.items.push_back(std::move(choices));
    }
  }
  return priced;
}

double PricedChoices::apply(const std::vector<size_t>& chosen, Plan& plan) const {
  double cost = 0;
  for (size_t i = 0; i < sides.size(); ++i) {
    const Candidate& c = sides[i][chosen[i]];
    (i % 2 == 0 ? plan.layers[i / 2].key : plan.layers[i / 2].value) = c.config;
    cost += c.cost;
  }
  return cost;
}

void refuse_budget(int64_t budget_bytes, int64_t least_bytes, const PricedChoices& priced, int64_t context) {
  char text[256];
  std::snprintf(text, sizeof text,
                "the budget of %.2f MiB per sequence cannot be met: at %lld tokens the smallest plan takes %.2f MiB (%.2f "
                "bits per element)",
                static_cast<double>(budget_bytes) / (1 << 20), static_cast<long long>(context),
                static_cast<double>(least_bytes) / (1 << 20), static_cast<double>(least_bytes) * 8 / priced.elements);
  throw BudgetError(text, static_cast<size_t>(least_bytes));
}

}  // namespace kvmix
