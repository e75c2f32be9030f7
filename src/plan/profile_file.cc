// Profiles as JSON (docs/file-formats.md).
#include "base/file.h"
#include "kvmix/plan.h"
#include "plan/json_reader.h"
#include "plan/transform_json.h"

namespace kvmix {
namespace {

constexpr const char* kFormat = "kvmix-profile";
constexpr int kVersion = 6, kOldest = 5;  // 5 does not say how long windows were
constexpr size_t kMostTransforms = 16384;
constexpr size_t kMostLayers = 1024, kMostPrompts = 65536, kMostSensitivities = 1 << 20;
constexpr size_t kLargestFile = size_t{1} << 30;
constexpr double kHuge = 1e300;
constexpr float kLargestHalf = 65504.0f;

[[noreturn]] void refuse_number(double value, const std::string& what, size_t layer) {
  throw Error(Status::kInvalidArgument,
              "the profile's " + what + " of layer " + std::to_string(layer) + " is " + std::to_string(value) +
                  ", not a number that it can hold; the model or what measured it is damaged, so nothing is written");
}

// JSON has no word for numbers that are none.
void check_numbers(const Profile& profile) {
  const auto check = [](const std::vector<double>& scores, const char* what) {
    for (size_t l = 0; l < scores.size(); ++l) {
      if (!std::isfinite(scores[l])) refuse_number(scores[l], what, l);
    }
  };
  check(profile.key_score, "key score");
  check(profile.value_score, "value score");
  for (const auto& row : profile.key_score_by_prompt) check(row, "key score by prompt");
  for (const auto& row : profile.value_score_by_prompt) check(row, "value score by prompt");
  for (const Profile::Sensitivity& s : profile.sensitivities) {
    if (!std::isfinite(s.cost))
      refuse_number(s.cost,
                    "sensitivity (" + s.metric + ", " + (s.side == Side::kKey ? "key" : "value") + ", " + s.codec + ", " +
                        s.transform + ")",
                    static_cast<size_t>(s.layer));
  }
  const auto check_halves = [](const std::vector<float>& values, const std::string& what, size_t layer) {
    for (const float x : values) {
      if (!(std::abs(x) <= kLargestHalf)) refuse_number(static_cast<double>(x), what, layer);
    }
  };
  for (const Profile::Transform& t : profile.transforms) {
    check_halves(t.spec.scales, "transform " + t.name, static_cast<size_t>(t.layer));
    check_halves(t.spec.center, "transform " + t.name, static_cast<size_t>(t.layer));
    check_halves(t.spec.feedback, "transform " + t.name, static_cast<size_t>(t.layer));
    for (const TransformSpec::Field& field : t.spec.more)
      check_halves(field.values, "transform " + t.name, static_cast<size_t>(t.layer));
  }
  for (size_t l = 0; l < profile.key_mean.size(); ++l) check_halves(profile.key_mean[l], "mean key", l);
}

}  // namespace

std::string to_json(const Profile& profile) {
  check_numbers(profile);
  nlohmann::ordered_json j;
  j["format"] = kFormat;
  j["version"] = kVersion;
  j["model"] = profile.model;
  j["fingerprint"] = profile.fingerprint;
  j["seed"] = profile.seed;
  j["prompts"] = profile.prompts;
  j["tokens"] = profile.tokens;
  j["text"] = profile.text;
  j["sinks"] = profile.fp16.sinks;
  j["local_sinks"] = profile.fp16.local_sinks;
  j["window"] = profile.fp16.window;
  j["windows"] = profile.windows;
  j["window_tokens"] = profile.window_tokens;
  j["key_score"] = profile.key_score;
  j["value_score"] = profile.value_score;
  j["key_score_by_prompt"] = profile.key_score_by_prompt;
  j["value_score_by_prompt"] = profile.value_score_by_prompt;
  nlohmann::ordered_json sensitivities = nlohmann::ordered_json::array();
  for (const Profile::Sensitivity& s : profile.sensitivities) {
    sensitivities.push_back({{"metric", s.metric},
                             {"layer", s.layer},
                             {"side", s.side == Side::kKey ? "key" : "value"},
                             {"codec", s.codec},
                             {"transform", s.transform},
                             {"cost", s.cost}});
    if (s.recent) sensitivities.back()["recent"] = true;
  }
  j["sensitivities"] = std::move(sensitivities);
  nlohmann::ordered_json transforms = nlohmann::ordered_json::array();
  for (const Profile::Transform& t : profile.transforms) {
    transforms.push_back({{"name", t.name}, {"layer", t.layer}, {"side", t.side == Side::kKey ? "key" : "value"}});
    write_transform(t.spec, transforms.back());
  }
  j["transforms"] = std::move(transforms);
  j["key_mean"] = profile.key_mean;
  return j.dump(1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

Profile parse_profile(const std::string& json, const std::string& name) {
  const nlohmann::json root = parse_json(json, name);
  JsonObject object(root, name, "");
  if (object.text("format") != kFormat)
    object.fail("format", std::string("expected \"") + kFormat + "\"; this is not a profile");
  const int64_t version = object.integer("version", 0, 1000000);
  if (version < kOldest || version > kVersion) {
    object.fail("version", "this build reads versions " + std::to_string(kOldest) + " and " + std::to_string(kVersion) +
                               "; make it again with kvmix profile");
  }
  Profile profile;
  profile.model = object.text("model");
  profile.fingerprint = object.text("fingerprint");
  const nlohmann::json& seed = object.get("seed");
  if (!seed.is_number_unsigned()) object.fail("seed", "expected a whole number of at least 0");
  profile.seed = seed.get<uint64_t>();
  profile.prompts = static_cast<int>(object.integer("prompts", 0, static_cast<int64_t>(kMostPrompts)));
  profile.tokens = object.integer("tokens", 0, int64_t{1} << 50);
  const nlohmann::json& text = object.get("text");
  if (!text.is_number_unsigned()) object.fail("text", "expected a whole number of at least 0");
  profile.text = text.get<uint64_t>();
  profile.fp16.sinks = static_cast<int>(object.integer("sinks", 0, 4096));
  profile.fp16.local_sinks = static_cast<int>(object.integer("local_sinks", 0, 4096));
  profile.fp16.window = static_cast<int>(object.integer("window", 0, 1 << 20));
  const auto scores = [&](const char* key, size_t least, size_t most) {
    const nlohmann::json& list = object.array(key, least, most);
    for (size_t l = 0; l < list.size(); ++l) {
      if (!is_number_within(list[l], 0, kHuge)) {
        object.fail_entry(std::string(key) + "[" + std::to_string(l) + "]", list[l],
                          "layer " + std::to_string(l) + " has no score; measure the model again with kvmix profile");
      }
    }
    return list.get<std::vector<double>>();
  };
  profile.key_score = scores("key_score", 1, kMostLayers);
  const size_t layers = profile.key_score.size();
  profile.value_score = scores("value_score", layers, layers);
  const auto rows = [&](const char* key, double low, double high, size_t least, size_t most) {
    std::vector<std::vector<double>> out;
    for (const nlohmann::json& row : object.array(key, 0, kMostPrompts)) {
      if (!row.is_array() || row.size() < least || row.size() > most) {
        object.fail(key, "expected rows of " + std::to_string(least) + (most == least ? "" : " to " + std::to_string(most)) +
                             " numbers");
      }
      std::vector<double> values;
      for (size_t i = 0; i < row.size(); ++i) {
        if (!is_number_within(row[i], low, high))
          object.fail_entry(std::string(key) + "[" + std::to_string(out.size()) + "][" + std::to_string(i) + "]", row[i],
                            "expected a finite number");
        values.push_back(row[i].get<double>());
      }
      out.push_back(std::move(values));
    }
    return out;
  };
  profile.key_score_by_prompt = rows("key_score_by_prompt", 0, kHuge, layers, layers);
  profile.value_score_by_prompt = rows("value_score_by_prompt", 0, kHuge, layers, layers);
  const auto side_of = [](JsonObject& entry) {
    const std::string side = entry.text("side", 16);
    if (side != "key" && side != "value") entry.fail("side", "expected \"key\" or \"value\"");
    return side == "key" ? Side::kKey : Side::kValue;
  };
  for (const double count : object.numbers("windows", 0, layers, 0, 65536)) profile.windows.push_back(static_cast<int>(count));
  if (!profile.windows.empty() && profile.windows.size() != layers) object.fail("windows", "expected a number for each layer");
  if (version > 5) profile.window_tokens = object.integer("window_tokens", 0, int64_t{1} << 50);
  const nlohmann::json& sensitivities = object.array("sensitivities", 0, kMostSensitivities);
  for (size_t i = 0; i < sensitivities.size(); ++i) {
    JsonObject s(sensitivities[i], name, "sensitivities[" + std::to_string(i) + "]");
    Profile::Sensitivity parsed{};
    parsed.metric = s.text("metric", 64);
    parsed.layer = static_cast<int>(s.integer("layer", 0, static_cast<int64_t>(layers) - 1));
    parsed.side = side_of(s);
    parsed.codec = s.text("codec", 64);
    try {
      parse_codec(parsed.codec);
    } catch (const Error& e) {
      s.fail("codec", e.what());
    }
    parsed.transform = s.text("transform", 64);
    if (!is_number_within(s.get("cost"), -kHuge, kHuge)) {
      s.fail("cost", "the " + std::string(parsed.side == Side::kKey ? "keys" : "values") + " of layer " +
                         std::to_string(parsed.layer) + " have no measured cost; measure the model again with kvmix profile");
    }
    parsed.cost = s.number("cost", -kHuge, kHuge);
    parsed.recent = s.has("recent") && s.boolean("recent");
    s.finish();
    profile.sensitivities.push_back(std::move(parsed));
  }
  const nlohmann::json& transforms = object.array("transforms", 0, kMostTransforms);
  for (size_t i = 0; i < transforms.size(); ++i) {
    JsonObject t(transforms[i], name, "transforms[" + std::to_string(i) + "]");
    Profile::Transform parsed;
    parsed.name = t.text("name", 64);
    parsed.layer = static_cast<int>(t.integer("layer", 0, static_cast<int64_t>(layers) - 1));
    parsed.side = side_of(t);
    parsed.spec = read_transform(t);
    t.finish();
    profile.transforms.push_back(std::move(parsed));
  }
  for (const std::vector<double>& row : rows("key_mean", -kLargestHalf, kLargestHalf, 0, 65536))
    profile.key_mean.emplace_back(row.begin(), row.end());
  if (!profile.key_mean.empty() && profile.key_mean.size() != layers) object.fail("key_mean", "expected a row for each layer");
  object.finish();
  return profile;
}

void check_profile(const Profile& profile, const ModelShape& model, bool force, const std::string& name) {
  if (profile.fingerprint != model.fingerprint && !force) {
    throw Error(Status::kMismatch, name + " was measured on " + other_model(profile.model, profile.fingerprint, model) +
                                       ": measure this one with kvmix profile");
  }
  if (profile.key_score.size() != model.layers.size()) {
    throw Error(Status::kMismatch, name + " has " + std::to_string(profile.key_score.size()) + " layers, the model " +
                                       std::to_string(model.layers.size()) + ": measure this model with kvmix profile");
  }
}

Profile read_profile(const std::string& path) { return parse_profile(read_file(path, kLargestFile), path); }

void write_profile(const Profile& profile, const std::string& path) {
  const std::string text = to_json(profile);
  AtomicFile file(path);
  file.write(text.data(), text.size());
  file.commit();
}

}  // namespace kvmix
