// What a profile says about itself: how steady its ranks are, and what transforms bring.
#pragma once

#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>

#include "kvmix/plan.h"

namespace kvmix::app {

// Spearman's rank correlations.
struct RankStatistics {
  struct BySide {
    double keys = 0, values = 0;
  };
  struct WithKl {
    double keys = 0, values = 0, together = 0;
  };
  std::optional<BySide> halves;           // of the prompts, by gradient scores; with two prompts or more
  std::map<std::string, WithKl> with_kl;  // metric, "gradient" for the scores: at the two-bit choice that kl measured
};

RankStatistics rank_statistics(const Profile& profile);
void print_rank_statistics(const RankStatistics& statistics);
nlohmann::json rank_statistics_json(const RankStatistics& statistics);

// Costs at two bits summed over layers: (side and codec, transform) -> metric -> sum.
using TransformSums = std::map<std::pair<std::string, std::string>, std::map<std::string, double>>;

TransformSums transform_sums(const Profile& profile);
void print_transform_sums(const TransformSums& sums);
nlohmann::json transform_sums_json(const TransformSums& sums);

}  // namespace kvmix::app
