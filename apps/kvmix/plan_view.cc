#include "plan_view.h"

#include <fmt/core.h>

#include <algorithm>

#include "console.h"
#include "text.h"

namespace kvmix::app {
namespace {

constexpr int kBarColumns = 12;

std::string score_bar(const std::vector<double>& scores, size_t layer) {
  const double most = *std::max_element(scores.begin(), scores.end());
  return most > 0 ? bar(scores[layer] / most, kBarColumns) : "";
}

std::string width_bar(const SideConfig& side) { return bar(std::min(side.codec.bits, 8) / 8.0, 8); }

std::string describe(const SideConfig& side) {
  std::string text = to_string(side.codec);
  if (!side.transform.center.empty()) text += " centred";
  if (side.transform.hadamard) text += " hadamard";
  if (!side.transform.scales.empty()) text += " scaled";
  if (!side.transform.feedback.empty()) text += " feedback";
  if (!side.transform.matrix.empty()) text += " matrix";
  return text;
}

}  // namespace

double mean_bits(const Plan& plan, Side side) {
  double sum = 0;
  for (const auto& layer : plan.layers) sum += (side == Side::kKey ? layer.key : layer.value).codec.bits;
  return plan.layers.empty() ? 0 : sum / static_cast<double>(plan.layers.size());
}

void print_plan_table(const Plan& plan, const Profile* profile) {
  const bool scores = profile != nullptr && profile->key_score.size() == plan.layers.size() &&
                      profile->value_score.size() == plan.layers.size();
  std::vector<std::string> header = {"layer"};
  if (scores) header.insert(header.end(), {"K score", "", "V score", ""});
  header.insert(header.end(), {"K bits", "", "key codec", "V bits", "", "value codec"});
  Table table(header);
  for (const size_t column : scores ? std::vector<size_t>{2, 4, 6, 7, 9, 10} : std::vector<size_t>{2, 3, 5, 6})
    table.left(column);
  for (size_t l = 0; l < plan.layers.size(); ++l) {
    const auto& layer = plan.layers[l];
    std::vector<std::string> row = {std::to_string(l)};
    if (scores) {
      row.insert(row.end(), {fmt::format("{:.3g}", profile->key_score[l]), score_bar(profile->key_score, l),
                             fmt::format("{:.3g}", profile->value_score[l]), score_bar(profile->value_score, l)});
    }
    row.insert(row.end(), {std::to_string(layer.key.codec.bits), width_bar(layer.key), describe(layer.key),
                           std::to_string(layer.value.codec.bits), width_bar(layer.value), describe(layer.value)});
    table.add(row);
  }
  table.print();
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
  const CacheConfig config = cache_config(plan, model);
  const CacheConfig f16 = cache_config(f16_plan(model), model);
  Table table({"context", "bytes of one sequence", "bits per element", "f16 cache", "smaller"});
  for (int64_t context = 1024; context <= 32768; context *= 2) {
    if (context > std::max<int64_t>(model.context_tokens, 1024)) break;
    const auto bytes = static_cast<double>(predict_bytes(config, context)),
               full = static_cast<double>(predict_bytes(f16, context));
    table.add({std::to_string(context), human_bytes(bytes), fmt::format("{:.2f}", predict_bits_per_element(config, context)),
               human_bytes(full), fmt::format("{:.2f}x", full / bytes)});
  }
  table.print();
}

}  // namespace kvmix::app
