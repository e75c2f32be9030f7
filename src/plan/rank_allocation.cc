#include "plan/rank_allocation.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

#include "plan/candidates.h"
#include "plan/planner.h"

namespace kvmix {
namespace {

// Squared error of a number's codes relative to the rows' own, medians measured on small models.
constexpr double kErrorOfTwoBits = 0.12, kErrorOfOneBit = 3.4 * kErrorOfTwoBits;
constexpr int kRankSteps = 8;               // ranks that are tried: so many parts of all
constexpr std::size_t kMostOfALayer = 250;  // allocate holds as many choices

// Of one side: a rank (0: rows themselves) and a codec.
struct SideChoice {
  SideConfig config;
  int rank = 0;
  double bits = 0, cost = 0;  // bits: of a token's numbers, to compare choices of a side by
};
struct LayerChoice {
  Plan::Layer layer;
  Choice choice;
};

// Those that none is at most as large and better than, smallest first.
template <typename T, typename Size, typename Cost>
std::vector<T> frontier(std::vector<T> all, const Size& size, const Cost& cost) {
  std::sort(all.begin(), all.end(),
            [&](const T& a, const T& b) { return size(a) != size(b) ? size(a) < size(b) : cost(a) < cost(b); });
  std::vector<T> best;
  for (T& one : all) {
    if (best.empty() || cost(one) < cost(best.back())) best.push_back(std::move(one));
  }
  return best;
}

class RankAllocation {
 public:
  RankAllocation(const PlannerRequest& request, const std::string& metric, Plan& plan)
      : request_(request), metric_(metric), plan_(plan), base_(cache_config(plan, *request.model)) {
    const FactorsInfo& factors = *request_.factors;
    if (factors.layers.size() != plan_.layers.size())
      throw Error(Status::kMismatch, factors.path + " has " + std::to_string(factors.layers.size()) + " layers, the model " +
                                         std::to_string(plan_.layers.size()) + ": factorise it with kvmix factorise");
  }

  // All latents, but of `side` a quarter less where ranks can be so; what that costs at price 1.
  double probe(Side side) {
    const FactorsInfo& factors = *request_.factors;
    plan_.rank = RankSpec{factors.path, factors.checksum, factors.method};
    double cost = 0;
    for (size_t l = 0; l < plan_.layers.size(); ++l) {
      const FactorsInfo::Layer& f = factors.layers[l];
      Plan::Layer& layer = plan_.layers[l];
      layer.key_rank = f.key_rank;
      layer.value_rank = f.value_rank;
      const bool key = side == Side::kKey;
      int& rank = key ? layer.key_rank : layer.value_rank;
      const int by = step(l, side);
      rank = std::max(rank * 3 / 4 / by * by, std::min(rank, 2 * by));
      cost += all_of(l, side, plain_codecs(l, side)) *
              (key ? f.key_left : f.value_left)[static_cast<size_t>(rank / (key ? f.key_groups : f.value_groups))];
    }
    return cost;
  }

  double run() {
    const FactorsInfo& factors = *request_.factors;
    CacheConfig none = base_;
    none.layers.clear();
    const auto fixed = static_cast<int64_t>(predict_bytes(none, request_.budget.context));
    std::vector<std::vector<LayerChoice>> layers;
    std::vector<std::vector<Choice>> items;
    for (size_t l = 0; l < plan_.layers.size(); ++l) {
      layers.push_back(choices(l, none, fixed));
      std::vector<Choice>& item = items.emplace_back();
      for (const LayerChoice& c : layers.back()) item.push_back(c.choice);
    }
    const auto budget = static_cast<int64_t>(budget_bytes(request_.budget, *request_.model));
    const std::vector<size_t> chosen = allocate(items, budget - fixed);
    if (chosen.empty()) {
      const int64_t least = fixed + least_bytes(items);
      throw BudgetError("the budget of " + std::to_string(budget) +
                            " bytes a sequence cannot be met: with latents the smallest plan takes " + std::to_string(least),
                        static_cast<size_t>(least));
    }
    double cost = 0;
    bool latents = false;
    for (size_t l = 0; l < layers.size(); ++l) {
      const LayerChoice& c = layers[l][chosen[l]];
      plan_.layers[l] = c.layer;
      cost += c.choice.cost;
      latents = latents || c.layer.key_rank > 0;
    }
    if (latents) plan_.rank = RankSpec{factors.path, factors.checksum, factors.method};
    return cost;
  }

 private:
  // The codecs that were measured for a side, of rows themselves.
  std::vector<SideChoice> rows(size_t layer, Side side) const {
    std::vector<SideChoice> out;
    for (const Candidate& c : measured(layer, side))
      out.push_back({c.config, 0, bits_of(c.config.codec, base_.layers[layer].head_dim), c.cost});
    return out;
  }
  std::vector<Candidate> measured(size_t layer, Side side) const {
    return candidates(*request_.model, *request_.profile, metric_, static_cast<int>(layer), side, plan_.recent);
  }
  static double bits_of(const CodecSpec& codec, int width) {
    return static_cast<double>(tile_bytes(codec, width)) * 8 / static_cast<double>(kPageTokens) / width;
  }

  int lists_of(size_t layer) const {
    LayerConfig latent = base_.layers[layer];
    latent.key_rank = latent.value_rank = 1;
    return latent.lists();
  }
  // Ranks are multiples of it.
  int step(size_t layer, Side side) const {
    const FactorsInfo::Layer& f = request_.factors->layers[layer];
    return std::lcm(LayerConfig::kLatentStep * lists_of(layer), side == Side::kKey ? f.key_groups : f.value_groups);
  }
  // What losing the side would cost, by its least widths.
  double all_of(size_t layer, Side side, const std::map<std::string, Candidate>& codecs) const {
    double most = -1;
    for (const auto& [name, c] : codecs) {
      if (c.config.codec.bits == 2) most = std::max(most, c.cost / kErrorOfTwoBits);
      if (c.config.codec.bits == 1) most = std::max(most, c.cost / kErrorOfOneBit);
    }
    if (most >= 0) return most;
    throw Error(Status::kMismatch, "the profile has no cost of 1 or 2 bits of layer " + std::to_string(layer) +
                                       (side == Side::kKey ? " keys" : " values") +
                                       ", which ranks are priced by; measure it again with kvmix profile");
  }
  // Latents take no row maps: of each codec the cheapest maps that are not calibrated stand for what it costs.
  std::map<std::string, Candidate> plain_codecs(size_t layer, Side side) const {
    std::map<std::string, Candidate> codecs;
    for (const Candidate& c : measured(layer, side)) {
      if (!c.config.transform.feedback.empty() || !c.config.transform.matrix.empty()) continue;
      const auto [at, added] = codecs.try_emplace(to_string(c.config.codec), c);
      if (!added && c.cost < at->second.cost) at->second = c;
    }
    return codecs;
  }
  std::vector<SideChoice> latents(size_t layer, Side side) const {
    const std::map<std::string, Candidate> codecs = plain_codecs(layer, side);
    const FactorsInfo::Layer& f = request_.factors->layers[layer];
    const bool key = side == Side::kKey;
    const int groups = key ? f.key_groups : f.value_groups, most = key ? f.key_rank : f.value_rank, by = step(layer, side);
    const double price = key ? request_.key_price : request_.value_price, all = all_of(layer, side, codecs);
    std::vector<SideChoice> out;
    int last = 0;
    for (int part = 1; part <= kRankSteps; ++part) {
      const int rank = part == kRankSteps ? most : most * part / kRankSteps / by * by;
      if (rank == last || rank < 2 * by || rank % by != 0) continue;
      last = rank;
      const double lost = (key ? f.key_left : f.value_left)[static_cast<size_t>(rank / groups)];
      if (lost > 0 && std::isinf(price)) continue;
      for (const auto& [name, c] : codecs) {
        out.push_back({{c.config.codec, {}},
                       rank,
                       bits_of(c.config.codec, rank / lists_of(layer)) * rank / base_.layers[layer].kv_heads,
                       c.cost * (1 - lost) + (lost > 0 ? price * all * lost : 0.0)});
      }
    }
    return out;
  }

  std::vector<LayerChoice> choices(size_t layer, CacheConfig& one, int64_t fixed) const {
    std::vector<LayerChoice> all;
    const auto add = [&](const std::vector<SideChoice>& keys, const std::vector<SideChoice>& values) {
      for (const SideChoice& k : keys) {
        for (const SideChoice& v : values) {
          LayerConfig config = base_.layers[layer];
          config.key = k.config;
          config.value = v.config;
          config.key_rank = k.rank;
          config.value_rank = v.rank;
          one.layers = {config};
          const auto bytes = static_cast<int64_t>(predict_bytes(one, request_.budget.context)) - fixed;
          all.push_back({{k.config, v.config, k.rank, v.rank}, {bytes, k.cost + v.cost}});
        }
      }
    };
    const auto best = [](std::vector<SideChoice> side) {
      return frontier(
          std::move(side), [](const SideChoice& c) { return c.bits; }, [](const SideChoice& c) { return c.cost; });
    };
    add(best(rows(layer, Side::kKey)), best(rows(layer, Side::kValue)));
    add(best(latents(layer, Side::kKey)), best(latents(layer, Side::kValue)));
    all = frontier(
        std::move(all), [](const LayerChoice& c) { return c.choice.bytes; },
        [](const LayerChoice& c) { return c.choice.cost; });
    // Where too many are left, those that gain least over their neighbour go.
    while (all.size() > kMostOfALayer) {
      size_t least = 1;
      for (size_t i = 1; i + 1 < all.size(); ++i) {
        if (all[i - 1].choice.cost - all[i].choice.cost < all[least - 1].choice.cost - all[least].choice.cost) least = i;
      }
      all.erase(all.begin() + static_cast<ptrdiff_t>(least));
    }
    return all;
  }

  const PlannerRequest& request_;
  const std::string& metric_;
  Plan& plan_;
  CacheConfig base_;
};

}  // namespace

double allocate_ranks(const PlannerRequest& request, const std::string& metric, Plan& plan) {
  return RankAllocation(request, metric, plan).run();
}

RankProbes rank_probes(const PlannerRequest& request) {
  if (request.model == nullptr || request.profile == nullptr || request.factors == nullptr)
    throw Error(Status::kInvalidArgument, "ranks are priced by a model's profile and its factors: give all three");
  const auto option = request.options.find("metric");
  const std::string metric = pick_metric(*request.profile, option == request.options.end() ? "best" : option->second);
  RankProbes probes{f16_plan(*request.model), f16_plan(*request.model), 0, 0};
  probes.key_cost = RankAllocation(request, metric, probes.key).probe(Side::kKey);
  probes.value_cost = RankAllocation(request, metric, probes.value).probe(Side::kValue);
  return probes;
}

}  // namespace kvmix
