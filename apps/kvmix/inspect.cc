// kvmix inspect: a model, plan, profile, factors file or saved cache in words.
#include <fmt/core.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>

#include "command.h"
#include "console.h"
#include "kvmix/cache.h"
#include "kvmix/error.h"
#include "models.h"
#include "plan_view.h"
#include "profile_view.h"
#include "text.h"

namespace kvmix::app {
namespace {

struct Arguments {
  std::string file, model;
  bool force = false;
};

enum class Kind { kModel, kFactors, kPlan, kProfile, kCache };

Kind kind_of(const std::string& path) {
  if (!std::filesystem::exists(path)) throw Error(Status::kNotFound, path + ": no such file; check the path");
  if (std::filesystem::is_directory(path)) throw Error(Status::kInvalidArgument, path + " is a directory; name a file");
  std::ifstream file(path, std::ios::binary);
  std::string head(4096, '\0');
  file.read(head.data(), static_cast<std::streamsize>(head.size()));
  head.resize(static_cast<size_t>(file.gcount()));
  // What a GGUF is stands in its first entry.
  if (head.starts_with("GGUF")) return head.find("kvmix-factors") != std::string::npos ? Kind::kFactors : Kind::kModel;
  const size_t first = head.find_first_not_of(" \t\r\n");
  if (head.starts_with("KVMIX")) return Kind::kCache;
  if (first == std::string::npos || head[first] != '{')
    throw Error(Status::kCorrupt, path + " is no GGUF model, plan, profile, factors file or saved cache; name one of these");
  // Both readers check everything; the planner's name is what only a plan has.
  return head.find("\"kvmix-profile\"") != std::string::npos ? Kind::kProfile : Kind::kPlan;
}

void inspect_model(const std::string& path, bool json) {
  const auto model = Model::load(path);
  const ModelShape& shape = model->shape();
  const CacheConfig f16 = cache_config(f16_plan(shape), shape);
  constexpr int64_t kContexts[] = {1024, 4096, 8192};
  if (json) {
    nlohmann::json f16_sizes = nlohmann::json::array();
    for (const int64_t n : kContexts) f16_sizes.push_back({{"tokens", n}, {"bytes", predict_bytes(f16, n)}});
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
                {"f16_cache", f16_sizes}});
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
  for (const int64_t n : kContexts) fmt::print("{} at {} tokens  ", human_bytes(static_cast<double>(predict_bytes(f16, n))), n);
  fmt::print("\n");
}

// What a sequence costs: sinks, open pages and sealed pages, each of all layers and heads.
struct Formula {
  size_t sink_bytes = 0, open_page_bytes = 0, sealed_page_bytes = 0;
};

Formula formula_of(const Plan& plan, const ModelShape& shape) {
  Formula f;
  for (const LayerConfig& l : cache_config(plan, shape).layers) {
    const auto lists = static_cast<size_t>(l.lists());
    for (const Side side : {Side::kKey, Side::kValue}) {
      const CodecSpec& codec = (side == Side::kKey ? l.key : l.value).codec;
      const int width = l.stored_width(side);
      f.sealed_page_bytes += lists * tile_bytes(codec, width);
      f.open_page_bytes += lists * tile_bytes(open_codec(l.recent, codec), width);
      f.sink_bytes += lists * tile_bytes(CodecSpec{}, width) / kPageTokens * static_cast<size_t>(l.sinks);
    }
  }
  return f;
}

void inspect_plan(const Arguments& arguments, bool json) {
  const Plan plan = read_plan(arguments.file);
  std::shared_ptr<const Model> model;
  if (!arguments.model.empty()) {
    model = load_model(arguments.model);
    check_plan(plan, model->shape(), arguments.force, arguments.file);
  }
  if (json) {
    nlohmann::json value{{"kind", "plan"},
                         {"plan", nlohmann::json::parse(to_json(plan))},
                         {"mean_key_bits", mean_bits(plan, Side::kKey)},
                         {"mean_value_bits", mean_bits(plan, Side::kValue)}};
    if (model) {
      const Formula f = formula_of(plan, model->shape());
      value["formula"] = {{"sink_bytes", f.sink_bytes},
                          {"open_page_bytes", f.open_page_bytes},
                          {"sealed_page_bytes", f.sealed_page_bytes},
                          {"page_tokens", kPageTokens}};
      value["sizes"] = plan_costs_json(plan, model->shape());
    }
    print_json(value);
    return;
  }
  fmt::print("plan          for {} by {}\n", plan.model, plan.planner);
  fmt::print("fingerprint   {}\n", plan.fingerprint);
  if (!plan.note.empty()) fmt::print("note          {}\n", plan.note);
  const std::string recent = to_string(plan.recent);
  if (plan.window.ratio_key > 0 || plan.window.ratio_value > 0) {
    fmt::print("not packed    {} sinks (f16), window {} of keys and {} of values of that tail ({})\n", plan.sinks,
               plan.window.ratio_key, plan.window.ratio_value, recent);
  } else {
    fmt::print("not packed    {} sinks (f16), window of {} to {} newest tokens ({})\n", plan.sinks, plan.window.tokens,
               plan.window.tokens + kPageTokens, recent);
    if (plan.local_sinks) fmt::print("              {} sinks in layers with a sliding window\n", *plan.local_sinks);
  }
  fmt::print("keeps         {}\n", policies_text(plan, model ? &model->shape() : nullptr));
  if (plan.rank)
    fmt::print("latents       by {}, {} (checksum {})\n", plan.rank->method, plan.rank->factors, plan.rank->checksum);
  fmt::print("code bits     keys {:.3f}, values {:.3f} on average over layers\n\n", mean_bits(plan, Side::kKey),
             mean_bits(plan, Side::kValue));
  print_plan_table(plan, nullptr);
  if (!model) {
    fmt::print("\nWith --model its sizes are shown too.\n");
    return;
  }
  const Formula f = formula_of(plan, model->shape());
  fmt::print(
      "\nformula       {} B of sinks + open pages x {} B + sealed pages x {} B + tables;\n              a page is {} "
      "tokens of all layers\n",
      f.sink_bytes, f.open_page_bytes, f.sealed_page_bytes, kPageTokens);
  print_plan_costs(plan, model->shape());
}

void inspect_factors_file(const std::string& path, bool json) {
  const FactorsInfo info = inspect_factors(path);
  if (json) {
    nlohmann::json value = factors_json(info);
    value["kind"] = "factors";
    print_json(value);
    return;
  }
  fmt::print("factors       for {} by {}\n", info.model, info.method);
  fmt::print("fingerprint   {}\n", info.fingerprint);
  fmt::print("checksum      {}, good\n", info.checksum);
  fmt::print("note          {}\n\n", info.note);
  print_factors_table(info);
}

void inspect_profile(const std::string& path, bool json) {
  const Profile profile = read_profile(path);
  if (json) {
    print_json({{"kind", "profile"},
                {"rank_correlation", rank_statistics_json(rank_statistics(profile))},
                {"two_bits_by_transform", transform_sums_json(transform_sums(profile))},
                {"profile", nlohmann::json::parse(to_json(profile))}});
    return;
  }
  fmt::print("profile       of {}: {} prompts, {} tokens, seed {}\n", profile.model, profile.prompts, profile.tokens,
             profile.seed);
  fmt::print("fingerprint   {}\n", profile.fingerprint);
  fmt::print("sensitivities {}\n", profile.sensitivities.size());
  print_rank_statistics(rank_statistics(profile));
  print_transform_sums(transform_sums(profile));
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
  CLI::App* command = add_command(context, "inspect", "A plan, profile, model, factors file or saved cache in words",
                                  "kvmix inspect plan.json --model smollm2");
  command->add_option("file", arguments->file, "The file, or a model's short name")->required();
  command->add_option("--model", arguments->model, "For a plan: the model whose sizes to compute");
  command->add_flag("--force", arguments->force, "Take a plan that was made for another model of the same shape");
  command->callback([&context, arguments] {
    context.action = [arguments](const Common& common) {
      const std::string path = model_path(arguments->file);
      arguments->file = path;
      switch (kind_of(path)) {
        case Kind::kModel:
          inspect_model(path, common.json);
          break;
        case Kind::kFactors:
          inspect_factors_file(path, common.json);
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
