// Profiles as JSON (docs/file-formats.md).
#include "base/file.h"
#include "kvmix/plan.h"
#include "plan/half_text.h"
#include "plan/json_reader.h"

namespace kvmix {
namespace {

constexpr const char* kFormat = "kvmix-profile";
constexpr int kVersion = 4;
constexpr size_t kMostTransforms = 16384, kMostValues = size_t{1} << 22;
constexpr size_t kMostLayers = 1024, kMostPrompts = 65536, kMostSensitivities = 1 << 20;
constexpr size_t kLargestFile = size_t{1} << 30;
constexpr double kHuge = 1e300;

}  // namespace

std::string to_json(const Profile& profile) {
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
  }
  j["sensitivities"] = sensitivities;
  nlohmann::ordered_json transforms = nlohmann::ordered_json::array();
  for (const Profile::Transform& t : profile.transforms) {
    transforms.push_back({{"name", t.name},
                          {"layer", t.layer},
                          {"side", t.side == Side::kKey ? "key" : "value"},
                          {"hadamard", t.spec.hadamard},
                          {"scales", half_text(t.spec.scales)},
                          {"feedback", half_text(t.spec.feedback)}});
  }
  j["transforms"] = transforms;
  j["key_mean"] = profile.key_mean;
  return j.dump(1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

Profile parse_profile(const std::string& json, const std::string& name) {
  const nlohmann::json root = parse_json(json, name);
  JsonObject object(root, name, "");
  if (object.text("format") != kFormat)
    object.fail("format", std::string("expected \"") + kFormat + "\"; this is not a profile");
  if (object.integer("version", 0, 1000000) != kVersion)
    object.fail("version", "this build reads version " + std::to_string(kVersion) + "; make it again with kvmix profile");
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
  profile.key_score = object.numbers("key_score", 1, kMostLayers, 0, kHuge);
  const size_t layers = profile.key_score.size();
  profile.value_score = object.numbers("value_score", layers, layers, 0, kHuge);
  const auto rows = [&](const char* key, double low, double high, size_t least, size_t most) {
    std::vector<std::vector<double>> out;
    for (const nlohmann::json& row : object.array(key, 0, kMostPrompts)) {
      if (!row.is_array() || row.size() < least || row.size() > most) {
        object.fail(key, "expected rows of " + std::to_string(least) + (most == least ? "" : " to " + std::to_string(most)) +
                             " numbers");
      }
      std::vector<double> values;
      for (const nlohmann::json& v : row) {
        if (!v.is_number() || !std::isfinite(v.get<double>()) || v.get<double>() < low || v.get<double>() > high) {
          object.fail(key, "expected finite numbers");
        }
        values.push_back(v.get<double>());
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
    parsed.cost = s.number("cost", -kHuge, kHuge);
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
    parsed.spec.hadamard = t.boolean("hadamard");
    parsed.spec.scales = read_half_text(t, "scales", kMostValues);
    parsed.spec.feedback = read_half_text(t, "feedback", kMostValues);
    t.finish();
    profile.transforms.push_back(std::move(parsed));
  }
  for (const std::vector<double>& row : rows("key_mean", -65504, 65504, 1, 65536))
    profile.key_mean.emplace_back(row.begin(), row.end());
  if (!profile.key_mean.empty() && profile.key_mean.size() != layers) object.fail("key_mean", "expected a row for each layer");
  object.finish();
  return profile;
}

Profile read_profile(const std::string& path) { return parse_profile(read_file(path, kLargestFile), path); }

void write_profile(const Profile& profile, const std::string& path) {
  const std::string text = to_json(profile);
  AtomicFile file(path);
  file.write(text.data(), text.size());
  file.commit();
}

}  // namespace kvmix
