#include "plan_view.h"

#include <fmt/core.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "console.h"
#include "text.h"

namespace kvmix::app {
namespace {

constexpr int kBarColumns = 8;

std::string score_bar(const std::vector<double>& scores, size_t layer) {
  const double most = *std::max_element(scores.begin(), scores.end());
  return most > 0 ? bar(scores[layer] / most, kBarColumns) : "";
}

std::string width_bar(const SideConfig& side) { return bar(std::min(side.codec.bits, 8) / 8.0, 8); }

// a, b, ..., z, ba, bb, ...
std::string letters(size_t i) {
  const std::string last(1, static_cast<char>('a' + i % 26));
  return i < 26 ? last : letters(i / 26) + last;
}

std::string describe(const SideConfig& side, int rank) {
  std::string text = to_string(side.codec);
  if (rank > 0) text += " of " + std::to_string(rank) + " latents";
  if (!side.transform.center.empty()) text += " centred";
  for (const TransformSpec::Field& field : side.transform.more) text += " " + field.name;
  if (side.transform.hadamard) text += " hadamard";
  if (!side.transform.scales.empty()) text += " scaled";
  if (!side.transform.feedback.empty()) text += " feedback";
  if (!side.transform.matrix.empty()) text += " matrix";
  return text;
}

struct Cost {
  int64_t context;
  size_t bytes, f16_bytes;
  double bits;
  double smaller() const { return static_cast<double>(f16_bytes) / static_cast<double>(bytes); }
};

// Of one sequence, at lengths up to the model's context.
std::vector<Cost> costs_of(const Plan& plan, const ModelShape& model) {
  const CacheConfig config = cache_config(plan, model);
  const CacheConfig f16 = cache_config(f16_plan(model), model);
  std::vector<Cost> costs;
  for (int64_t context = 1024; context <= 32768; context *= 2) {
    if (context > std::max<int64_t>(model.context_tokens, 1024)) break;
    costs.push_back(
        {context, predict_bytes(config, context), predict_bytes(f16, context), predict_bits_per_element(config, context)});
  }
  return costs;
}

}  // namespace

double mean_bits(const Plan& plan, Side side) {
  double sum = 0;
  for (const auto& layer : plan.layers) sum += (side == Side::kKey ? layer.key : layer.value).codec.bits;
  return plan.layers.empty() ? 0 : sum / static_cast<double>(plan.layers.size());
}

std::string policies_text(const Plan& plan, const ModelShape* model) {
  std::string text;
  if (plan.tokens) text = "tokens by " + to_string(*plan.tokens);
  if (plan.channels) {
    text += (text.empty() ? "" : ", ") + std::string("key channels by ") + to_string(*plan.channels);
    std::vector<std::string> kept;  // heads of most models are alike
    for (size_t l = 0; model != nullptr && l < model->layers.size(); ++l) {
      const auto& layer = model->layers[l];
      if (layer.sliding_window > 0) continue;
      std::string one = fmt::format("{} of {}", stored_channels(*plan.channels, layer.head_dim), layer.head_dim);
      if (std::find(kept.begin(), kept.end(), one) == kept.end()) kept.push_back(std::move(one));
    }
    if (!kept.empty()) text += fmt::format(" ({})", fmt::join(kept, ", "));
  }
  return text.empty() ? "all" : text;
}

void print_plan_table(const Plan& plan, const Profile* profile) {
  const bool scores = profile != nullptr && profile->key_score.size() == plan.layers.size() &&
                      profile->value_score.size() == plan.layers.size();
  std::vector<std::string> header = {"layer"};
  if (scores) header.insert(header.end(), {"K score", "", "V score", ""});
  header.insert(header.end(), {"K", "bits", "", "V", "bits", ""});
  Table table(header);
  for (const size_t column : scores ? std::vector<size_t>{2, 4, 6, 7, 9, 10} : std::vector<size_t>{2, 3, 5, 6})
    table.left(column);
  // Codecs are long and few: each gets a letter.
  std::vector<std::string> codecs;
  const auto letter = [&](const SideConfig& side, int rank) {
    const std::string name = describe(side, rank);
    const auto at = std::find(codecs.begin(), codecs.end(), name);
    const auto i = static_cast<size_t>(at - codecs.begin());
    if (at == codecs.end()) codecs.push_back(name);
    return letters(i);
  };
  for (size_t l = 0; l < plan.layers.size(); ++l) {
    const auto& layer = plan.layers[l];
    std::vector<std::string> row = {std::to_string(l)};
    if (scores) {
      row.insert(row.end(), {fmt::format("{:.3g}", profile->key_score[l]), score_bar(profile->key_score, l),
                             fmt::format("{:.3g}", profile->value_score[l]), score_bar(profile->value_score, l)});
    }
    row.insert(row.end(),
               {std::to_string(layer.key.codec.bits), width_bar(layer.key), letter(layer.key, layer.key_rank),
                std::to_string(layer.value.codec.bits), width_bar(layer.value), letter(layer.value, layer.value_rank)});
    table.add(row);
  }
  table.print();
  fmt::print("\n");
  for (size_t i = 0; i < codecs.size(); ++i) fmt::print("{:<2} {}\n", letters(i), codecs[i]);
}

double kept_latents(const Plan& plan, const ModelShape& model, Side side) {
  double kept = 0, all = 0;
  for (size_t l = 0; l < plan.layers.size(); ++l) {
    const int rank = side == Side::kKey ? plan.layers[l].key_rank : plan.layers[l].value_rank,
              rows = model.layers[l].kv_heads * model.layers[l].head_dim;
    kept += rank > 0 ? rank : rows;
    all += rows;
  }
  return kept / all;
}

double kept_share(const FactorsInfo& factors) {
  double kept = 0, all = 0;
  for (const FactorsInfo::Layer& l : factors.layers) {
    kept += l.key_rank + l.value_rank;
    all += l.key_channels + l.value_channels;
  }
  return kept / all;
}

void print_factors_table(const FactorsInfo& factors) {
  Table table({"layer", "K latents", "of", "groups", "V latents", "of", "groups"});
  for (size_t l = 0; l < factors.layers.size(); ++l) {
    const FactorsInfo::Layer& f = factors.layers[l];
    table.add({std::to_string(l), std::to_string(f.key_rank), std::to_string(f.key_channels), std::to_string(f.key_groups),
               std::to_string(f.value_rank), std::to_string(f.value_channels), std::to_string(f.value_groups)});
  }
  table.print();
}

nlohmann::json factors_json(const FactorsInfo& factors) {
  nlohmann::json json{{"factors", factors.path},    {"method", factors.method},           {"model", factors.model},
                      {"note", factors.note},       {"fingerprint", factors.fingerprint}, {"checksum", factors.checksum},
                      {"keep", kept_share(factors)}};
  for (const FactorsInfo::Layer& l : factors.layers) {
    json["layers"].push_back({{"key_rank", l.key_rank},
                              {"key_channels", l.key_channels},
                              {"key_groups", l.key_groups},
                              {"value_rank", l.value_rank},
                              {"value_channels", l.value_channels},
                              {"value_groups", l.value_groups}});
  }
  return json;
}

void print_score_table(const Profile& profile) {
  Table table({"layer", "K score", "", "V score", ""});
  table.left(2);
  table.left(4);
  for (size_t l = 0; l < std::min(profile.key_score.size(), profile.value_score.size()); ++l) {
    table.add({std::to_string(l), fmt::format("{:.4g}", profile.key_score[l]), score_bar(profile.key_score, l),
               fmt::format("{:.4g}", profile.value_score[l]), score_bar(profile.value_score, l)});
  }
  table.print();
}

void print_plan_costs(const Plan& plan, const ModelShape& model) {
  Table table({"context", "bytes of one sequence", "bits per element", "f16 cache", "smaller"});
  for (const Cost& c : costs_of(plan, model)) {
    table.add({std::to_string(c.context), human_bytes(static_cast<double>(c.bytes)), fmt::format("{:.2f}", c.bits),
               human_bytes(static_cast<double>(c.f16_bytes)), fmt::format("{:.2f}x", c.smaller())});
  }
  table.print();
}

nlohmann::json plan_costs_json(const Plan& plan, const ModelShape& model) {
  nlohmann::json json = nlohmann::json::array();
  for (const Cost& c : costs_of(plan, model)) {
    json.push_back({{"context", c.context},
                    {"bytes", c.bytes},
                    {"bits_per_element", c.bits},
                    {"f16_bytes", c.f16_bytes},
                    {"compression", c.smaller()}});
  }
  return json;
}

}  // namespace kvmix::app
