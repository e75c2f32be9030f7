// The same choice as kvpress, the field's collection of these methods: its kept sets on one tiny model's attention.
#include <fstream>
#include <nlohmann/json.hpp>

#include "policy/layer_state.h"
#include "policy/pyramidkv.h"

namespace kvmix {
namespace {

nlohmann::json vectors() {
  std::ifstream in(KVMIX_KVPRESS_JSON);
  return nlohmann::json::parse(in);
}

PolicySpec spec(const nlohmann::json& json) {
  PolicySpec spec{json["policy"], {}};
  for (const auto& [name, value] : json["parameters"].items()) {
    if (value.is_string()) {
      spec.values[name] = value.get<std::string>();
    } else {
      spec.values[name] = value.get<double>();
    }
  }
  return spec;
}

std::vector<int64_t> set_of(const std::string& digits) {
  std::vector<int64_t> set;
  for (size_t d = 0; d < digits.size(); ++d) {
    const int four = std::stoi(digits.substr(d, 1), nullptr, 16);
    for (int bit = 0; bit < 4; ++bit) {
      if ((four >> (3 - bit) & 1) != 0) set.push_back(static_cast<int64_t>(4 * d) + bit);
    }
  }
  return set;
}

TEST(Kvpress, KeepsTheSameTokens) {
  const nlohmann::json all = vectors();
  const int64_t n = all["length"];
  const int heads_per_kv = all["heads_per_kv"];
  const auto layers = static_cast<int>(all["layers"].size());
  EXPECT_EQ(all["cases"].size(), 24u);
  std::set<std::string> names;
  for (const nlohmann::json& c : all["cases"]) {
    const auto policy = make_policy(spec(c));
    names.insert(c["policy"]);
    for (int l = 0; l < layers; ++l) {
      const nlohmann::json& layer = all["layers"][l];
      const auto kv_heads = static_cast<int>(layer["mass"].size());
      LayerState state(n, kv_heads, heads_per_kv);
      state.shape.layer = state.shape.ordinal = l;
      state.shape.layers = state.shape.ordinals = layers;
      state.window_rows = all["window"];
      for (int h = 0; h < kv_heads; ++h) {
        state.heads[h].mass = layer["mass"][h].get<std::vector<float>>();
        for (int64_t i = 0; i < n; ++i) state.heads[h].queries[i] = static_cast<int32_t>(n - i);
        state.heads[h].window.clear();
        for (int q = 0; q < heads_per_kv; ++q) {
          const auto row = layer["window"][h * heads_per_kv + q].get<std::vector<float>>();
          state.heads[h].window.insert(state.heads[h].window.end(), row.begin(), row.end());
        }
      }
      state.run(*policy);
      for (int h = 0; h < kv_heads; ++h) {
        EXPECT_EQ(state.kept(h), set_of(c["kept"][l][h])) << to_string(spec(c)) << ", layer " << l << ", head " << h;
      }
    }
  }
  EXPECT_EQ(names, (std::set<std::string>{"adakv", "h2o", "pyramidkv", "snapkv", "streaming"}));
}

TEST(Kvpress, PyramidsOfRealSizes) {
  const nlohmann::json all = vectors();
  EXPECT_EQ(all["budgets"].size(), 5u);
  for (const nlohmann::json& c : all["budgets"]) {
    const Pyramid pyramid{.rule = Pyramid::Rule::kReal, .beta = c["beta"], .window = c["window"]};
    const int64_t n = c["length"];
    const auto tokens = c["tokens"].get<std::vector<int64_t>>();
    const auto layers = static_cast<int>(tokens.size());
    for (int l = 0; l < layers; ++l) {
      EXPECT_EQ(pyramid.tokens(c["keep"].get<double>() * static_cast<double>(n), n, l, layers), tokens[l])
          << n << " layer " << l;
    }
  }
}

}  // namespace
}  // namespace kvmix
