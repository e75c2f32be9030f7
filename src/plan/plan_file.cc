// Plans as JSON (docs/file-formats.md).
#include <algorithm>
#include <cmath>
#include <filesystem>

#include "base/file.h"
#include "cache/layout.h"
#include "codec/row.h"
#include "codec/spelling.h"
#include "kvmix/plan.h"
#include "plan/json_reader.h"
#include "plan/transform_json.h"

namespace kvmix {
namespace {

constexpr const char* kFormat = "kvmix-plan";
constexpr int kVersion = 1;
constexpr size_t kMostLayers = 1024;
constexpr size_t kLargestFile = size_t{1} << 30;

using ordered_json = nlohmann::ordered_json;

ordered_json side_json(const SideConfig& side) {
  ordered_json j;
  const CodecSpec& c = side.codec;
  if (c.is_uniform()) {
    j["bits"] = c.bits;
    if (!c.is_f16()) {
      j["axis"] = c.axis == Axis::kChannel ? "channel" : "token";
      j["group"] = c.group;
      j["fit"] = fit_name(c.fit);
      j["zero_point"] = c.zero_point;
    }
  } else {
    j["codec"] = to_string(c);
  }
  write_transform(side.transform, j);
  return j;
}

CodecSpec parse_uniform(JsonObject& object) {
  CodecSpec c;
  const auto one = [&object](const char* key, const auto& accepted) {
    const auto value = static_cast<int>(object.integer(key, *std::min_element(accepted.begin(), accepted.end()),
                                                       *std::max_element(accepted.begin(), accepted.end())));
    if (std::find(accepted.begin(), accepted.end(), value) == accepted.end()) object.fail(key, "expected " + one_of(accepted));
    return value;
  };
  c.bits = one("bits", kCodecBits);
  if (c.is_f16()) return c;
  const std::string axis = object.text("axis"), fit = object.text("fit");
  if (axis != "channel" && axis != "token") object.fail("axis", "expected \"channel\" or \"token\"");
  const std::optional<Fit> named = fit_named(fit);
  if (!named) object.fail("fit", "expected \"minmax\", \"fitted\" or \"unbiased\"");
  c.axis = axis == "channel" ? Axis::kChannel : Axis::kToken;
  c.fit = *named;
  c.group = one("group", kCodecGroups);
  c.zero_point = object.boolean("zero_point");
  return c;
}

CodecSpec parse_spelling(JsonObject& object, const char* key) {
  try {
    return parse_codec(object.text(key, 64));
  } catch (const Error& e) {
    object.fail(key, e.what());
  }
}

// `rank`: of a plan with latents, else null; left alone where the layer has none.
SideConfig parse_side(JsonObject object, int* rank) {
  SideConfig side;
  if (rank != nullptr && object.has("rank")) *rank = static_cast<int>(object.integer("rank", 1, 65536));
  side.codec = object.has("codec") ? parse_spelling(object, "codec") : parse_uniform(object);
  side.transform = read_transform(object);
  object.finish();
  if (rank != nullptr && *rank > 0 && side.transform != TransformSpec{})
    object.fail("rank", "latents take no row maps; leave \"hadamard\", \"center\" and their like out");
  return side;
}

ordered_json policy_json(const PolicySpec& spec) {
  ordered_json j;
  j["policy"] = spec.name;
  for (const auto& [name, value] : spec.values) std::visit([&, key = name](const auto& v) { j[key] = v; }, value);
  return j;
}

// Names and ranges are the policy's to check.
PolicySpec parse_policy(JsonObject& plan, const char* key, void (*check)(const PolicySpec& spec)) {
  JsonObject object = plan.object(key);
  PolicySpec spec{object.text("policy", 64), {}};
  for (const auto& [name, value] : object.items()) {
    if (name == "policy") continue;
    if (value.is_string()) {
      spec.values[name] = object.text(name, 64);
    } else {
      spec.values[name] = object.number(name, -1e300, 1e300);
    }
  }
  try {
    check(spec);
  } catch (const Error& e) {
    plan.fail(key, e.what());
  }
  return spec;
}

}  // namespace

std::string to_json(const Plan& plan) {
  ordered_json j;
  j["format"] = kFormat;
  j["version"] = kVersion;
  j["model"] = plan.model;
  j["fingerprint"] = plan.fingerprint;
  j["planner"] = plan.planner;
  j["note"] = plan.note;
  if (plan.predicted) j["predicted"] = {{"metric", plan.predicted->metric}, {"cost", plan.predicted->cost}};
  j["sinks"] = plan.sinks;
  if (plan.local_sinks) j["local_sinks"] = *plan.local_sinks;
  j["window"] = {
      {"tokens", plan.window.tokens}, {"ratio_key", plan.window.ratio_key}, {"ratio_value", plan.window.ratio_value}};
  if (!plan.recent.is_f16()) j["recent"] = to_string(plan.recent);
  if (plan.tokens) j["tokens"] = policy_json(*plan.tokens);
  if (plan.channels) j["channels"] = policy_json(*plan.channels);
  if (plan.rank)
    j["rank"] = {{"factors", plan.rank->factors}, {"checksum", plan.rank->checksum}, {"method", plan.rank->method}};
  // A layer a line, so that a person can read and compare plans.
  const std::string marker = "@layers@";
  j["layers"] = marker;
  std::string layers = "[";
  for (size_t l = 0; l < plan.layers.size(); ++l) {
    ordered_json layer;
    layer["key"] = side_json(plan.layers[l].key);
    layer["value"] = side_json(plan.layers[l].value);
    if (plan.layers[l].key_rank > 0) layer["key"]["rank"] = plan.layers[l].key_rank;
    if (plan.layers[l].value_rank > 0) layer["value"]["rank"] = plan.layers[l].value_rank;
    layers += (l == 0 ? "\n    " : ",\n    ") + layer.dump();
  }
  layers += "\n  ]";
  std::string text = j.dump(2, ' ', false, nlohmann::json::error_handler_t::replace);
  const std::string quoted = "\"" + marker + "\"";
  text.replace(text.rfind(quoted), quoted.size(), layers);
  return text + "\n";
}

Plan parse_plan(const std::string& json, const std::string& name) {
  const nlohmann::json root = parse_json(json, name);
  JsonObject object(root, name, "");
  if (object.text("format") != kFormat) object.fail("format", std::string("expected \"") + kFormat + "\"; this is not a plan");
  if (object.integer("version", 0, 1000000) != kVersion)
    object.fail("version", "this build reads version " + std::to_string(kVersion) + "; make it again with kvmix plan");
  Plan plan;
  plan.model = object.text("model");
  plan.fingerprint = object.text("fingerprint");
  plan.planner = object.text("planner");
  plan.note = object.text("note", 65536);
  if (object.has("predicted")) {
    JsonObject predicted = object.object("predicted");
    plan.predicted = Plan::Prediction{predicted.text("metric", 64), predicted.number("cost", 0, 1e300)};
    predicted.finish();
  }
  plan.sinks = static_cast<int>(object.integer("sinks", 0, 4096));
  if (object.has("local_sinks")) plan.local_sinks = static_cast<int>(object.integer("local_sinks", 0, 4096));
  JsonObject window = object.object("window");
  plan.window.tokens = static_cast<int>(window.integer("tokens", 0, 1 << 20));
  plan.window.ratio_key = static_cast<float>(window.number("ratio_key", 0, 0.95));
  plan.window.ratio_value = static_cast<float>(window.number("ratio_value", 0, 0.95));
  window.finish();
  if (object.has("recent")) {
    plan.recent = parse_spelling(object, "recent");
    if (!plan.recent.is_f16() && !takes_rows(plan.recent)) object.fail("recent", "expected " + recent_codecs());
  }
  if (object.has("tokens")) plan.tokens = parse_policy(object, "tokens", check_policy);
  if (object.has("channels")) plan.channels = parse_policy(object, "channels", check_channels);
  if (object.has("rank")) {
    JsonObject rank = object.object("rank");
    plan.rank = RankSpec{rank.text("factors", 4096), rank.text("checksum", 64), rank.text("method", 64)};
    rank.finish();
    if (plan.tokens || plan.channels)
      object.fail("rank", "a policy needs keys and values themselves; leave \"tokens\" and \"channels\" out, or \"rank\"");
  }
  const nlohmann::json& layers = object.array("layers", 1, kMostLayers);
  for (size_t l = 0; l < layers.size(); ++l) {
    JsonObject layer(layers[l], name, "layers[" + std::to_string(l) + "]");
    Plan::Layer parsed;
    parsed.key = parse_side(layer.object("key"), plan.rank ? &parsed.key_rank : nullptr);
    parsed.value = parse_side(layer.object("value"), plan.rank ? &parsed.value_rank : nullptr);
    if ((parsed.key_rank > 0) != (parsed.value_rank > 0))
      layer.fail(parsed.key_rank > 0 ? "value" : "key", "the other side has a rank; give both one, or neither");
    layer.finish();
    plan.layers.push_back(std::move(parsed));
  }
  object.finish();
  return plan;
}

Plan read_plan(const std::string& path) {
  Plan plan = parse_plan(read_file(path, kLargestFile), path);
  if (plan.rank) plan.rank->factors = (std::filesystem::path(path).parent_path() / plan.rank->factors).string();
  return plan;
}

void write_plan(const Plan& given, const std::string& path) {
  Plan plan = given;
  if (plan.rank) {
    const auto folder = std::filesystem::absolute(path).parent_path();
    plan.rank->factors = std::filesystem::absolute(plan.rank->factors).lexically_proximate(folder).string();
  }
  const std::string text = to_json(plan);
  AtomicFile file(path);
  file.write(text.data(), text.size());
  file.commit();
}

std::string other_model(const std::string& name, const std::string& fingerprint, const ModelShape& model) {
  if (name == model.name)
    return "another model of the same name (" + name + ", fingerprint " + fingerprint + "; this one's is " + model.fingerprint +
           ")";
  return "another model (" + name + ", fingerprint " + fingerprint + "; this one is " + model.name + ", " + model.fingerprint +
         ")";
}

void check_plan(const Plan& plan, const ModelShape& model, bool force, const std::string& name) {
  if (plan.fingerprint != model.fingerprint && !force) {
    throw Error(Status::kMismatch, name + " was made for " + other_model(plan.model, plan.fingerprint, model) +
                                       ": make a plan for this one with kvmix plan, or force it (--force)");
  }
  if (plan.layers.size() != model.layers.size()) {
    throw Error(Status::kMismatch, name + " has " + std::to_string(plan.layers.size()) + " layers, the model " +
                                       std::to_string(model.layers.size()) + ": make a plan for this model with kvmix plan");
  }
  const std::vector<LayerConfig> layers = cache_config(plan, model).layers;
  for (size_t l = 0; l < layers.size(); ++l) {
    try {
      check_ranks(layers[l], name + ": layer " + std::to_string(l));
    } catch (const Error& e) {
      throw Error(Status::kMismatch, e.what() + std::string(": make the plan again with kvmix plan --factors"));
    }
  }
}

Fp16Part fp16_part(const Plan& plan) {
  if (plan.window.ratio_key > 0 || plan.window.ratio_value > 0)
    throw Error(Status::kUnsupported, "a plan whose window is a ratio cannot be measured layer by layer; use a fixed window");
  return {plan.sinks, plan.local_sinks.value_or(plan.sinks), plan.window.tokens};
}

void set_fp16_part(const Fp16Part& part, Plan& plan) {
  plan.sinks = part.sinks;
  plan.local_sinks = part.local_sinks == part.sinks ? std::nullopt : std::optional(part.local_sinks);
  plan.window = {part.window, 0, 0};
}

CacheConfig cache_config(const Plan& plan, const ModelShape& model) {
  CacheConfig config;
  config.tokens = plan.tokens;
  config.channels = plan.channels;
  for (size_t l = 0; l < plan.layers.size(); ++l) {
    const ModelShape::Layer& shape = model.layers.at(l);
    LayerConfig layer;
    layer.q_heads = shape.q_heads;
    layer.kv_heads = shape.kv_heads;
    layer.head_dim = shape.head_dim;
    layer.scale = shape.scale;
    layer.softcap = shape.softcap;
    layer.sliding_window = shape.sliding_window;
    layer.sinks = shape.sliding_window > 0 ? plan.local_sinks.value_or(plan.sinks) : plan.sinks;
    layer.window = plan.window;
    layer.recent = plan.recent;
    layer.key = plan.layers[l].key;
    layer.value = plan.layers[l].value;
    layer.key_rank = plan.layers[l].key_rank;
    layer.value_rank = plan.layers[l].value_rank;
    config.layers.push_back(std::move(layer));
  }
  return config;
}

Plan f16_plan(const ModelShape& model) {
  Plan plan;
  plan.fingerprint = model.fingerprint;
  plan.model = model.name;
  plan.planner = "f16";
  plan.note = "everything fp16";
  plan.sinks = 0;
  plan.layers.resize(model.layers.size());
  return plan;
}

}  // namespace kvmix
