#include "plan/steady.h"

#include <cmath>
#include <map>
#include <vector>

namespace kvmix {
namespace {

constexpr double kDrawn = 0.5;  // plans lose about as much by 1, and more by 0 (docs/quality.md)
constexpr int kRounds = 20;     // by when nothing changes any more

// What the entries that share a group have in common.
struct Effects {
  std::vector<size_t> of_entry;  // the group of each
  std::vector<double> effect;    // of each group

  // The mean of what `other` leaves of the logarithms.
  void fit(const std::vector<double>& logs, const Effects& other) {
    std::vector<double> sum(effect.size()), count(effect.size());
    for (size_t i = 0; i < logs.size(); ++i) sum[of_entry[i]] += logs[i] - other.at(i), ++count[of_entry[i]];
    for (size_t g = 0; g < effect.size(); ++g) effect[g] = sum[g] / count[g];
  }
  double at(size_t entry) const { return effect[of_entry[entry]]; }
};

template <class Key>
Effects grouped(const std::vector<Key>& keys) {
  std::map<Key, size_t> groups;
  Effects effects;
  for (const Key& key : keys) effects.of_entry.push_back(groups.try_emplace(key, groups.size()).first->second);
  effects.effect.resize(groups.size());
  return effects;
}

}  // namespace

Profile steadied(const Profile& profile, const std::string& metric) {
  Profile out = profile;
  for (const Side side : {Side::kKey, Side::kValue}) {
    std::vector<Profile::Sensitivity*> entries;
    std::vector<std::pair<std::string, int>> layers;
    std::vector<std::pair<std::string, std::string>> codecs;
    std::vector<double> logs;
    for (Profile::Sensitivity& s : out.sensitivities) {
      if (s.metric != metric || s.side != side || s.recent || !(s.cost > 0)) continue;
      entries.push_back(&s);
      layers.emplace_back(s.transform, s.layer);
      codecs.emplace_back(s.transform, s.codec);
      logs.push_back(std::log(s.cost));
    }
    Effects of_layer = grouped(layers), of_codec = grouped(codecs);
    for (int round = 0; round < kRounds; ++round) of_codec.fit(logs, of_layer), of_layer.fit(logs, of_codec);
    for (size_t i = 0; i < entries.size(); ++i) {
      const double fitted = of_layer.at(i) + of_codec.at(i);
      entries[i]->cost = std::exp(logs[i] + kDrawn * (fitted - logs[i]));
    }
  }
  return out;
}

}  // namespace kvmix
