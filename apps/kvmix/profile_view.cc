#include "profile_view.h"

#include <fmt/core.h>

#include <cmath>
#include <vector>

#include "console.h"

namespace kvmix::app {
namespace {

// Ties share their mean rank.
double spearman(const std::vector<double>& a, const std::vector<double>& b) {
  const auto ranks = [](const std::vector<double>& x) {
    std::vector<double> rank(x.size());
    for (size_t i = 0; i < x.size(); ++i) {
      for (const double other : x) rank[i] += other < x[i] ? 1.0 : other == x[i] ? 0.5 : 0.0;
    }
    return rank;
  };
  const std::vector<double> ra = ranks(a), rb = ranks(b);
  const double mean = static_cast<double>(a.size()) / 2;
  double cross = 0, aa = 0, bb = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    cross += (ra[i] - mean) * (rb[i] - mean);
    aa += (ra[i] - mean) * (ra[i] - mean);
    bb += (rb[i] - mean) * (rb[i] - mean);
  }
  return aa > 0 && bb > 0 ? cross / std::sqrt(aa * bb) : 0.0;
}

}  // namespace

RankStatistics rank_statistics(const Profile& profile) {
  RankStatistics statistics;
  const size_t prompts = profile.key_score_by_prompt.size(), layers = profile.key_score.size();
  if (prompts >= 2) {
    const auto half = [&](const std::vector<std::vector<double>>& by_prompt, size_t first, size_t last) {
      std::vector<double> mean(layers, 0.0);
      for (size_t p = first; p < last; ++p) {
        for (size_t l = 0; l < layers; ++l) mean[l] += by_prompt[p][l];
      }
      return mean;
    };
    const auto stability = [&](const std::vector<std::vector<double>>& by_prompt) {
      return spearman(half(by_prompt, 0, prompts / 2), half(by_prompt, prompts / 2, prompts));
    };
    statistics.halves = {stability(profile.key_score_by_prompt), stability(profile.value_score_by_prompt)};
  }
  // At the two-bit choice of least output error: kl measured it, and others follow by ratios.
  using Place = std::pair<int, int>;  // layer and side
  struct Least {
    double output;
    std::string codec, transform;
  };
  std::map<Place, Least> measured_choice;
  const auto place_of = [](const Profile::Sensitivity& s) { return Place{s.layer, s.side == Side::kKey ? 0 : 1}; };
  for (const auto& s : profile.sensitivities) {
    if (s.metric != "output" || parse_codec(s.codec).bits != 2) continue;
    const auto [at, fresh] = measured_choice.try_emplace(place_of(s), Least{s.cost, s.codec, s.transform});
    if (!fresh && s.cost < at->second.output) at->second = {s.cost, s.codec, s.transform};
  }
  std::map<std::string, std::map<Place, double>> costs;
  for (const auto& s : profile.sensitivities) {
    const auto least = measured_choice.find(place_of(s));
    if (least == measured_choice.end() || least->second.codec != s.codec || least->second.transform != s.transform) continue;
    costs[s.metric][place_of(s)] = s.cost;
  }
  const auto kl = costs.find("kl");
  if (kl == costs.end()) return statistics;
  for (size_t l = 0; l < layers; ++l) {
    costs["gradient"][{static_cast<int>(l), 0}] = profile.key_score[l];
    costs["gradient"][{static_cast<int>(l), 1}] = profile.value_score[l];
  }
  for (const auto& [metric, list] : costs) {
    if (metric == "kl") continue;
    std::vector<double> a[3], b[3];  // keys, values, together
    for (const auto& [place, cost] : list) {
      const auto measured = kl->second.find(place);
      if (measured == kl->second.end()) continue;  // kl was stopped before it
      for (const int part : {place.second, 2}) {
        a[part].push_back(cost);
        b[part].push_back(measured->second);
      }
    }
    statistics.with_kl[metric] = {spearman(a[0], b[0]), spearman(a[1], b[1]), spearman(a[2], b[2])};
  }
  return statistics;
}

void print_rank_statistics(const RankStatistics& statistics) {
  if (statistics.halves) {
    fmt::print("gradients     halves of the prompts rank layers alike: Spearman {:.3f} keys, {:.3f} values\n",
               statistics.halves->keys, statistics.halves->values);
  }
  for (const auto& [metric, r] : statistics.with_kl) {
    fmt::print("{:<13} Spearman with kl at 2 bits: {:.3f} keys, {:.3f} values, {:.3f} together\n", metric, r.keys, r.values,
               r.together);
  }
}

nlohmann::json rank_statistics_json(const RankStatistics& statistics) {
  nlohmann::json json = nlohmann::json::object();
  if (statistics.halves) json["halves_of_prompts"] = {{"keys", statistics.halves->keys}, {"values", statistics.halves->values}};
  for (const auto& [metric, r] : statistics.with_kl) {
    json["with_kl_at_2_bits"][metric] = {{"keys", r.keys}, {"values", r.values}, {"together", r.together}};
  }
  return json;
}

TransformSums transform_sums(const Profile& profile) {
  TransformSums sums;
  for (const auto& s : profile.sensitivities) {
    if (!s.recent && parse_codec(s.codec).bits != 2) continue;
    const std::string of = std::string(s.side == Side::kKey ? "keys " : "values ") + (s.recent ? "recent " : "") + s.codec;
    sums[{of, s.transform}][s.metric] += s.cost;
  }
  return sums;
}

void print_transform_sums(const TransformSums& sums) {
  if (sums.empty()) return;
  std::vector<std::string> metrics;
  for (const char* metric : {"output", "fisher", "kl", "recall"}) {
    for (const auto& [choice, costs] : sums) {
      if (costs.count(metric) == 0) continue;
      metrics.emplace_back(metric);
      break;
    }
  }
  std::vector<std::string> header = {"two bits, over layers", "transform"};
  header.insert(header.end(), metrics.begin(), metrics.end());
  Table table(header);
  table.left(1);
  for (const auto& [choice, costs] : sums) {
    std::vector<std::string> row = {choice.first, choice.second};
    for (const std::string& metric : metrics) {
      const auto at = costs.find(metric);
      row.push_back(at == costs.end() ? "-" : fmt::format("{:.4f}", at->second));
    }
    table.add(row);
  }
  fmt::print("\n");
  table.print();
}

nlohmann::json transform_sums_json(const TransformSums& sums) {
  nlohmann::json json = nlohmann::json::array();
  for (const auto& [choice, costs] : sums) {
    const size_t space = choice.first.find(' ');
    json.push_back({{"side", choice.first.substr(0, space)},
                    {"codec", choice.first.substr(space + 1)},
                    {"transform", choice.second},
                    {"costs", costs}});
  }
  return json;
}

}  // namespace kvmix::app
