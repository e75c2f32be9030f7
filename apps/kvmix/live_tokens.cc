#include "live_tokens.h"

#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <cmath>

namespace kvmix::app {
namespace {

constexpr std::array kShades = {" ", "\u2591", "\u2592", "\u2593",
                                "\u2588"};  // none, up to a third, two thirds, less than all, all

std::string strip(const std::vector<int64_t>& positions, int64_t length, int columns) {
  std::string out;
  for (int c = 0; c < columns; ++c) {
    const int64_t first = length * c / columns, end = std::max(first + 1, length * (c + 1) / columns);
    const auto begin = std::lower_bound(positions.begin(), positions.end(), first);
    const auto here = static_cast<double>(std::lower_bound(begin, positions.end(), end) - begin);
    const double part = here / static_cast<double>(end - first);
    out += kShades[part >= 1 ? 4 : static_cast<size_t>(std::ceil(part * 3))];
  }
  return out;
}

nlohmann::json ranges(const std::vector<int64_t>& positions) {
  nlohmann::json out = nlohmann::json::array();
  for (size_t i = 0; i < positions.size();) {
    size_t end = i + 1;
    while (end < positions.size() && positions[end] == positions[end - 1] + 1) ++end;
    out.push_back({positions[i], positions[end - 1]});
    i = end;
  }
  return out;
}

}  // namespace

LiveTokens live_tokens(const std::shared_ptr<const Model>& model, const std::string& name, const Plan& plan,
                       std::span<const Token> text, int threads, bool force) {
  Engine engine(model, plan, {.threads = threads, .force_plan = force});
  const SequenceId id = engine.cache().create();
  engine.prefill(id, text);
  LiveTokens live{name, to_string(*plan.tokens), static_cast<int64_t>(text.size()), {}};
  const std::vector<LayerConfig>& layers = engine.cache().config().layers;
  for (size_t l = 0; l < layers.size(); ++l) {
    if (layers[l].sliding_window > 0) continue;
    auto kept = engine.cache().kept(id, static_cast<int>(l)), low = engine.cache().low_tier(id, static_cast<int>(l));
    low.resize(kept.size());
    for (size_t h = 0; h < kept.size(); ++h) {
      live.heads.push_back({static_cast<int>(l), static_cast<int>(h), std::move(kept[h]), std::move(low[h])});
    }
  }
  return live;
}

std::string live_table(const LiveTokens& live, int columns) {
  const bool tiers = std::any_of(live.heads.begin(), live.heads.end(), [](const LiveHead& h) { return !h.low.empty(); });
  std::string out = fmt::format("{}: {}, a prompt of {} tokens\nlayer head   kept{}  position 0{:>{}}\n", live.plan,
                                live.policy, live.length, tiers ? "    low" : "", live.length - 1, std::max(1, columns - 10));
  for (const LiveHead& head : live.heads) {
    const auto n = static_cast<double>(live.length);
    out += fmt::format("{:>5} {:>4} {:>4.0f} %", head.layer, head.head, 100 * static_cast<double>(head.positions.size()) / n);
    if (tiers) out += fmt::format(" {:>4.0f} %", 100 * static_cast<double>(head.low.size()) / n);
    out += "  " + strip(head.positions, live.length, columns) + "\n";
  }
  return out;
}

nlohmann::json live_json(const LiveTokens& live) {
  nlohmann::json heads = nlohmann::json::array();
  for (const LiveHead& head : live.heads) {
    heads.push_back(
        {{"layer", head.layer}, {"head", head.head}, {"kept", head.positions.size()}, {"positions", ranges(head.positions)}});
    if (!head.low.empty()) heads.back()["low_tier"] = ranges(head.low);
  }
  return {{"plan", live.plan}, {"policy", live.policy}, {"tokens", live.length}, {"heads", heads}};
}

}  // namespace kvmix::app
