// kvmix inspect: a model, plan, profile or saved cache in words.
#include <fmt/core.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>

#include "command.h"
#include "console.h"
#include "kvmix/cache.h"
#include "kvmix/error.h"
#include "models.h"
#include "plan_view.h"
#include "text.h"

namespace kvmix::app {
namespace {

struct Arguments {
  std::string file, model;
};

// Spearman's rank correlation; ties share their mean rank.
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

enum class Kind { kModel, kPlan, kProfile, kCache };

Kind kind_of(const std::string& path) {
  if (!std::filesystem::exists(path)) throw Error(Status::kNotFound, path + ": no such file; check the path");
  if (std::filesystem::is_directory(path)) throw Error(Status::kInvalidArgument, path + " is a directory; name a file");
  std::ifstream file(path, std::ios::binary);
  std::string head(4096, '\0');
  file.read(head.data(), static_cast<std::streamsize>(head.size()));
  head.resize(static_cast<size_t>(file.gcount()));
  if (head.starts_with("GGUF")) return Kind::kModel;
  const size_t first = head.find_first_not_of(" \t\r\n");
  if (first == std::string::npos || head[first] != '{') return Kind::kCache;
  // Both readers check everything; the planner's name is what only a plan has.
  return head.find("\"kvmix-profile\"") != std::string::npos ? Kind::kProfile : Kind::kPlan;
}

void inspect_model(const std::string& path, bool json) {
  const auto model = Model::load(path);
  const ModelShape& shape = model->shape();
  const CacheConfig f16 = cache_config(f16_plan(shape), shape);
  if (json) {
    nlohmann::json layers = nlohmann::json::array();
    for (const auto& l : shape.layers) {
      layers.push_back({{"q_heads", l.q_heads},
                        {"kv_heads", l.kv_heads},
                        {"head_dim", l.head_dim},
                        {"sliding_window", l.sliding_window},
                        {"scale", l.scale},
                        {"softcap", l.softcap}});
    }
    print_json({{"kind", "model"},
                {"name", shape.name},
                {"architecture", shape.architecture},
                {"fingerprint", shape.fingerprint},
                {"context_tokens", shape.context_tokens},
                {"vocab_size", model->vocab_size()},
                {"weight_bytes", model->weight_bytes()},
                {"layers", layers},
                {"f16_bytes_per_token", predict_bytes(f16, 4096) / 4096}});
    return;
  }
  fmt::print("model         {} ({})\n", shape.name, shape.architecture);
  fmt::print("fingerprint   {}\n", shape.fingerprint);
  fmt::print("weights       {}\n", human_bytes(static_cast<double>(model->weight_bytes())));
  fmt::print("vocabulary    {}\n", model->vocab_size());
  fmt::print("context       {} tokens\n", shape.context_tokens);
  size_t sliding = 0;
  for (const auto& l : shape.layers) sliding += l.sliding_window > 0 ? 1 : 0;
  const auto& l0 = shape.layers.front();
  fmt::print("layers        {}, {} of them with a sliding window\n", shape.layers.size(), sliding);
  fmt::print("heads         {} query, {} key/value, dimension {}\n", l0.q_heads, l0.kv_heads, l0.head_dim);
  fmt::print("f16 cache     ");
  for (const int64_t n : {1024, 4096, 8192})
    fmt::print("{} at {} tokens  ", human_bytes(static_cast<double>(predict_bytes(f16, n))), n);
  fmt::print("\n");
}

void print_formula(const Plan& plan, const ModelShape& shape) {
  const CacheConfig config = cache_config(plan, shape);
  size_t packed = 0, open = 0;
  for (const LayerConfig& l : config.layers) {
    const auto heads = static_cast<size_t>(l.kv_heads);
    packed += heads * (tile_bytes(l.key.codec, l.head_dim) + tile_bytes(l.value.codec, l.head_dim));
    open += heads * 2 * tile_bytes(CodecSpec{}, l.head_dim);
  }
  const double per_token = static_cast<double>(open) / kPageTokens;
  fmt::print(
      "formula       {} sinks x {:.0f} B + f16 pages x {} B + sealed pages x {} B + tables; a page is {} tokens of all "
      "layers\n",
      plan.sinks, per_token, open, packed, kPageTokens);
}

void inspect_plan(const Arguments& arguments, bool json) {
  const Plan plan = read_plan(arguments.file);
  if (json) {
    nlohmann::json value = nlohmann::json::parse(to_json(plan));
    print_json({{"kind", "plan"},
                {"plan", value},
                {"mean_key_bits", mean_bits(plan, Side::kKey)},
                {"mean_value_bits", mean_bits(plan, Side::kValue)}});
    return;
  }
  fmt::print("plan          for {} by {}\n", plan.model, plan.planner);
  fmt::print("fingerprint   {}\n", plan.fingerprint);
  if (!plan.note.empty()) fmt::print("note          {}\n", plan.note);
  if (plan.window.ratio_key > 0 || plan.window.ratio_value > 0) {
    fmt::print("f16           {} sinks, window {} of keys and {} of values of the f16 tail\n", plan.sinks,
               plan.window.ratio_key, plan.window.ratio_value);
  } else {
    fmt::print("f16           {} sinks, window of {} to {} newest tokens\n", plan.sinks, plan.window.tokens,
               plan.window.tokens + kPageTokens);
  }
  fmt::print("code bits     keys {:.3f}, values {:.3f} on average over layers\n\n", mean_bits(plan, Side::kKey),
             mean_bits(plan, Side::kValue));
  print_plan_table(plan, nullptr);
  if (arguments.model.empty()) {
    fmt::print("\nWith --model its sizes are shown too.\n");
    return;
  }
  const auto model = load_model(arguments.model);
  check_plan(plan, model->shape(), false);
  fmt::print("\n");
  print_formula(plan, model->shape());
  print_plan_costs(plan, model->shape());
}

// Do two halves of the prompts rank the layers alike, and do the sensitivities rank alike what they measured?
void print_rank_statistics(const Profile& profile) {
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
    fmt::print("gradients     two halves of the prompts rank the layers alike: Spearman {:.3f} keys, {:.3f} values\n",
               stability(profile.key_score_by_prompt), stability(profile.value_score_by_prompt));
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
  if (kl == costs.end()) return;
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
    fmt::print("{:<13} Spearman with kl at 2 bits: {:.3f} keys, {:.3f} values, {:.3f} together\n", metric, spearman(a[0], b[0]),
               spearman(a[1], b[1]), spearman(a[2], b[2]));
  }
}

// What transforms bring: costs of one codec summed over layers, for each transform that it was tried with.
void print_transforms(const Profile& profile) {
  std::map<std::pair<std::string, std::string>, std::map<std::string, double>> sums;  // codec of a side, transform -> by metric
  for (const auto& s : profile.sensitivities) {
    if (parse_codec(s.codec).bits != 2) continue;
    sums[{(s.side == Side::kKey ? "keys " : "values ") + s.codec, s.transform}][s.metric] += s.cost;
  }
  if (sums.empty()) return;
  fmt::print("\n{:<40} {:<16} {:>13} {:>8} {:>8}\n", "two bits, summed over layers", "transform", "output error", "fisher",
             "kl");
  for (const auto& [choice, costs] : sums) {
    const auto shown = [&by_metric = costs](const char* metric) {
      const auto at = by_metric.find(metric);
      return at == by_metric.end() ? std::string("-") : fmt::format("{:.4f}", at->second);
    };
    fmt::print("{:<40} {:<16} {:>13} {:>8} {:>8}\n", choice.first, choice.second, shown("output"), shown("fisher"),
               shown("kl"));
  }
}

void inspect_profile(const std::string& path, bool json) {
  const Profile profile = read_profile(path);
  if (json) {
    print_json({{"kind", "profile"}, {"profile", nlohmann::json::parse(to_json(profile))}});
    return;
  }
  fmt::print("profile       of {}: {} prompts, {} tokens, seed {}\n", profile.model, profile.prompts, profile.tokens,
             profile.seed);
  fmt::print("fingerprint   {}\n", profile.fingerprint);
  fmt::print("sensitivities {}\n", profile.sensitivities.size());
  print_rank_statistics(profile);
  print_transforms(profile);
  fmt::print("\n");
  print_score_table(profile);
}

std::string counted(const std::vector<std::string>& names) {
  std::string text;
  for (size_t i = 0; i < names.size();) {
    size_t same = i;
    while (same < names.size() && names[same] == names[i]) ++same;
    text += fmt::format("{}{} x {}", i == 0 ? "" : ", ", same - i, names[i]);
    i = same;
  }
  return text;
}

void inspect_cache(const std::string& path, bool json) {
  const SavedCacheInfo info = inspect_saved_cache(path);
  if (json) {
    print_json({{"kind", "cache"},
                {"version", info.version},
                {"fingerprint", info.fingerprint},
                {"tokens", info.tokens},
                {"layers", info.layers},
                {"file_bytes", info.file_bytes},
                {"key_codecs", info.key_codecs},
                {"value_codecs", info.value_codecs}});
    return;
  }
  fmt::print("saved cache   version {}, checksum good\n", info.version);
  fmt::print("fingerprint   {}\n", info.fingerprint);
  fmt::print("holds         {} tokens of {} layers in {}\n", info.tokens, info.layers,
             human_bytes(static_cast<double>(info.file_bytes)));
  fmt::print("keys          {}\n", counted(info.key_codecs));
  fmt::print("values        {}\n", counted(info.value_codecs));
}

}  // namespace

void add_inspect(CommandContext& context) {
  auto arguments = std::make_shared<Arguments>();
  CLI::App* command = add_command(context, "inspect", "A plan, profile, model or saved cache in words",
                                  "kvmix inspect plan.json --model smollm2");
  command->add_option("file", arguments->file, "The file, or a model's short name")->required();
  command->add_option("--model", arguments->model, "For a plan: the model whose sizes to compute");
  command->callback([&context, arguments] {
    context.action = [arguments](const Common& common) {
      const std::string path = model_path(arguments->file);
      arguments->file = path;
      switch (kind_of(path)) {
        case Kind::kModel:
          inspect_model(path, common.json);
          break;
        case Kind::kPlan:
          inspect_plan(*arguments, common.json);
          break;
        case Kind::kProfile:
          inspect_profile(path, common.json);
          break;
        case Kind::kCache:
          inspect_cache(path, common.json);
          break;
      }
      return kExitOk;
    };
  });
}

}  // namespace kvmix::app
