// Plans and profiles as files: what is read, what is refused and how it is written.
#include <gtest/gtest.h>

#include <filesystem>
#include <random>

#include "kvmix/error.h"
#include "support/plan_fixture.h"

namespace kvmix {
namespace {

using testing::profile;
using testing::shape;

TEST(Plans, AreTiedToTheirModel) {
  const ModelShape model = shape(4);
  Plan plan = f16_plan(model);
  check_plan(plan, model, false);
  plan.fingerprint = "another";
  EXPECT_THROW(check_plan(plan, model, false), Error);
  check_plan(plan, model, true);
  plan.layers.pop_back();
  EXPECT_THROW(check_plan(plan, model, true), Error);
}

TEST(Plans, NameATokenPolicyAndHandItToTheCache) {
  const ModelShape model = shape(2);
  Plan plan = f16_plan(model);
  EXPECT_FALSE(cache_config(plan, model).tokens);
  plan.tokens = PolicySpec{"snapkv", {{"keep", 0.125}, {"window", 16.0}, {"pooling", "avg"}}};
  const Plan same = parse_plan(to_json(plan), "memory");
  EXPECT_EQ(same.tokens, plan.tokens);
  EXPECT_EQ(cache_config(same, model).tokens, plan.tokens);
  EXPECT_LT(predict_bytes(cache_config(plan, model), 8192), predict_bytes(cache_config(f16_plan(model), model), 8192) / 7);
}

TEST(Plans, NameAChannelPolicyAndHandItToTheCache) {
  const ModelShape model = shape(2);
  Plan plan = f16_plan(model);
  plan.channels = PolicySpec{"think", {{"keep", 0.5}}};
  const Plan same = parse_plan(to_json(plan), "memory");
  EXPECT_EQ(same.channels, plan.channels);
  EXPECT_EQ(cache_config(same, model).channels, plan.channels);
  const auto bytes = [&](const Plan& p) { return static_cast<double>(predict_bytes(cache_config(p, model), 8192)); };
  EXPECT_NEAR(bytes(plan), 0.75 * bytes(f16_plan(model)), 0.02 * bytes(f16_plan(model)));
  std::string bad = to_json(plan);
  bad.replace(bad.find("0.5"), 3, "1.5");
  try {
    parse_plan(bad, "plan.json");
    ADD_FAILURE() << "accepted";
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("channel policy think: keep is 1.5; expected a number from 1e-06 to 1"),
              std::string::npos)
        << e.what();
    EXPECT_NE(std::string(e.what()).find("channels"), std::string::npos) << e.what();
  }
}

TEST(Plans, NameFactorsAndTheirRanks) {
  const ModelShape model = shape(2);
  Plan plan = f16_plan(model);
  plan.rank = RankSpec{"factors.gguf", "123", "palu"};
  for (Plan::Layer& layer : plan.layers) {
    layer.key_rank = 64;
    layer.value_rank = 128;
  }
  const std::string good = to_json(plan);
  const Plan same = parse_plan(good, "memory");
  EXPECT_EQ(same.rank, plan.rank);
  EXPECT_EQ(to_json(same), good);
  check_plan(same, model, false);
  const CacheConfig config = cache_config(same, model);
  EXPECT_EQ(config.layers[1].key_rank, 64);
  EXPECT_EQ(config.layers[1].value_rank, 128);
  // A layer may store keys and values themselves, row maps and all.
  Plan partly = plan;
  partly.layers[0].key_rank = partly.layers[0].value_rank = 0;
  partly.layers[0].value.transform.hadamard = true;
  EXPECT_EQ(to_json(parse_plan(to_json(partly), "memory")), to_json(partly));
  EXPECT_FALSE(cache_config(partly, model).layers[0].latent());
  // 192 latents of 2 x 192 channels.
  const auto bytes = [&](const CacheConfig& c) { return static_cast<double>(predict_bytes(c, 8192)); };
  EXPECT_NEAR(bytes(config), 0.5 * bytes(cache_config(f16_plan(model), model)), 4096);

  const auto refused = [&](const std::string& from, const std::string& to, const std::string& expected) {
    std::string bad = good;
    const size_t at = bad.find(from);
    ASSERT_NE(at, std::string::npos) << from;
    bad.replace(at, from.size(), to);
    try {
      check_plan(parse_plan(bad, "plan.json"), model, false, "plan.json");
      ADD_FAILURE() << from << " -> " << to << " was accepted";
    } catch (const Error& e) {
      EXPECT_NE(std::string(e.what()).find(expected), std::string::npos) << e.what();
      EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos);
    }
  };
  refused("\"rank\":64", "\"rank\":0", "layers[0].key.rank is 0");
  refused("\"rank\":64", "\"rank\":1.5", "layers[0].key.rank");
  refused("\"rank\":64", "\"rank\":72", "layer 0: rank 72 of keys does not fit; expected a multiple of 16 from 32 to 192");
  refused("\"rank\":64", "\"rank\":208", "layer 0: rank 208 of keys");
  refused("\"rank\":128", "\"rank\":16", "layer 0: rank 16 of values");
  refused(",\"rank\":64", "", "the other side has a rank");
  refused("\"rank\":64", "\"rank\":64,\"hadamard\":true", "latents take no row maps");
  refused("\"checksum\"", "\"sum\"", "rank.checksum is missing");
  refused("\"method\"", "\"colour\": 1, \"method\"", "rank.colour is not a known field");
  refused("\"rank\": {", "\"channels\": {\"policy\": \"think\"}, \"rank\": {", "a policy needs keys and values themselves");
  refused("\"rank\": {", "\"tokens\": {\"policy\": \"snapkv\"}, \"rank\": {", "a policy needs keys and values themselves");
}

TEST(Files, WhatIsWrongIsNamed) {
  const ModelShape model = shape(2);
  PlannerRequest request;
  request.model = &model;
  const std::string good = to_json(make_plan("uniform", request));
  const auto refused = [&](std::string from, const std::string& to, const std::string& expected) {
    std::string bad = good;
    const size_t at = bad.find(from);
    ASSERT_NE(at, std::string::npos) << from;
    bad.replace(at, from.size(), to);
    try {
      parse_plan(bad, "plan.json");
      FAIL() << from << " -> " << to << " was accepted";
    } catch (const Error& e) {
      EXPECT_NE(std::string(e.what()).find(expected), std::string::npos) << e.what();
      EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos);
    }
  };
  refused("\"bits\":4", "\"bits\":7", "layers[0].key.bits");
  refused("\"bits\":4", "\"bits\":-1", "layers[0].key.bits");
  refused("\"group\":128", "\"group\":100", "group");
  refused("\"sinks\"", "\"sink\"", "sink");
  refused("\"sinks\"", "\"predicted\": {\"metric\": \"kl\"}, \"sinks\"", "predicted.cost");
  refused("kvmix-plan", "kvmix-profile", "format");
  refused("\"sinks\"", "\"tokens\": {\"keep\": 0.5}, \"sinks\"", "tokens.policy");
  refused("\"sinks\"", "\"tokens\": {\"policy\": \"magic\"}, \"sinks\"", "\"magic\" is unknown");
  refused("\"sinks\"", "\"tokens\": {\"policy\": \"snapkv\", \"keep\": 2}, \"sinks\"", "keep is 2");
  refused("\"sinks\"", "\"tokens\": {\"policy\": \"snapkv\", \"keeps\": 1}, \"sinks\"", "no parameter \"keeps\"");
  refused("\"sinks\"", "\"tokens\": {\"policy\": \"snapkv\", \"pooling\": [1]}, \"sinks\"", "pooling");
  refused("\"tokens\": 64", "\"tokens\": 1e400", "");
  refused("{", std::string(200000, '['), "nested");
  EXPECT_THROW(read_plan("/nonexistent/plan.json"), Error);
}

// Random damage must end in an Error or in a plan that is valid, never in anything else.
template <typename Parse>
void mutate(const std::string& good, Parse parse) {
  std::mt19937 random(11);
  constexpr int kTries = 5000;
  int refused = 0;
  for (int tried = 0; tried < kTries; ++tried) {
    std::string bad = good;
    for (size_t k = 1 + random() % 4; k > 0 && !bad.empty(); --k) {
      const size_t at = random() % bad.size();
      switch (random() % 4) {
        case 0:
          bad[at] = static_cast<char>(random());
          break;
        case 1:
          bad.erase(at, random() % 20);
          break;
        case 2:
          bad.insert(at, bad.substr(random() % bad.size(), random() % 30));
          break;
        default:
          bad.resize(at + 1);
      }
    }
    try {
      parse(bad);
    } catch (const Error& e) {
      EXPECT_NE(e.status(), Status::kInternal);
      ++refused;
    }
  }
  EXPECT_GT(refused, kTries / 2);
}

TEST(Files, DamagedPlansAndProfilesNeverCrash) {
  const ModelShape model = shape(3);
  PlannerRequest request;
  request.model = &model;
  mutate(to_json(make_plan("uniform", request)), [&](const std::string& text) {
    const Plan plan = parse_plan(text, "fuzz");
    // A plan that was accepted either fits a cache or is refused by it.
    if (plan.layers.size() == model.layers.size()) Cache cache(cache_config(plan, model));
  });
  Profile p = profile(model);
  p.sensitivities.push_back({"kl", 1, Side::kKey, "int2.channel.g128.fitted.zero", "hadamard", 0.01});
  mutate(to_json(p), [](const std::string& text) { parse_profile(text, "fuzz"); });
  EXPECT_EQ(to_json(parse_profile(to_json(p), "memory")), to_json(p));
}

TEST(Files, KeepCalibratedTransforms) {
  const ModelShape model = shape(2);
  const ModelShape::Layer& layer = model.layers[0];
  const auto values = static_cast<size_t>(layer.kv_heads * layer.head_dim);
  TransformSpec spec;
  spec.hadamard = true;
  for (size_t i = 0; i < values; ++i) spec.scales.push_back(i % 2 == 0 ? 0.5f : -3.0f);
  for (size_t i = 0; i < values; ++i) spec.center.push_back(static_cast<float>(i) / 8.0f);
  for (size_t i = 0; i < values * static_cast<size_t>(layer.head_dim - 1) / 2; ++i)
    spec.feedback.push_back(static_cast<float>(i % 37) / 64.0f - 0.25f);
  Profile p = profile(model);
  p.transforms.push_back({"mine", 0, Side::kKey, spec});
  p.sensitivities.push_back({"kl", 0, Side::kKey, "int2.channel.g128.fitted.zero", "mine", 0.01});
  const Profile again = parse_profile(to_json(p), "memory");
  EXPECT_EQ(named_transform(model, again, 0, Side::kKey, "mine"), spec);
  EXPECT_THROW(named_transform(model, again, 1, Side::kKey, "mine"), Error);
  EXPECT_THROW(named_transform(model, again, 0, Side::kValue, "mine"), Error);

  PlannerRequest request;
  request.model = &model;
  Plan plan = make_plan("uniform", request);
  plan.layers[0].key.transform = spec;
  const std::string text = to_json(plan);
  const Plan back = parse_plan(text, "memory");
  EXPECT_EQ(back.layers[0].key, plan.layers[0].key);
  Cache cache(cache_config(back, model));
  // A number too few, and no number at all.
  plan.layers[0].key.transform.feedback.pop_back();
  EXPECT_THROW(Cache(cache_config(parse_plan(to_json(plan), "memory"), model)), Error);
  std::string damaged = text;
  damaged[damaged.find("\"scales\":\"") + 12] = '*';
  EXPECT_THROW(parse_plan(damaged, "memory"), Error);
  mutate(text, [&](const std::string& t) { Cache tried(cache_config(parse_plan(t, "fuzz"), model)); });
}

TEST(Files, NumbersThatAreNoneAreNotWritten) {
  const ModelShape model = shape(3);
  const auto refused = [](const Profile& p, const std::vector<std::string>& words) {
    try {
      to_json(p);
      FAIL() << words[0];
    } catch (const Error& e) {
      for (const std::string& word : words) EXPECT_NE(std::string(e.what()).find(word), std::string::npos) << e.what();
    }
  };
  Profile p = profile(model);
  p.value_score[2] = NAN;
  refused(p, {"value score of layer 2", "nan"});
  p = profile(model);
  p.key_score_by_prompt = {{1, INFINITY, 1}};
  refused(p, {"key score by prompt of layer 1", "inf"});
  p = profile(model);
  p.sensitivities.push_back({"kl", 1, Side::kKey, "int2.channel.g128.fitted.zero", "hadamard", NAN});
  refused(p, {"sensitivity (kl, key, int2.channel.g128.fitted.zero, hadamard) of layer 1"});
  p = profile(model);
  TransformSpec spec;
  spec.scales = {1.0f, 70000.0f};
  p.transforms.push_back({"mine", 2, Side::kKey, spec});
  refused(p, {"transform mine of layer 2", "70000"});
  const std::string path = ::testing::TempDir() + "/kvmix_profile.json";
  EXPECT_THROW(write_profile(p, path), Error);
  EXPECT_FALSE(std::filesystem::exists(path));
  Plan plan = f16_plan(model);
  plan.layers[1].key.codec = {2, Axis::kChannel, 128, Fit::kMinMax, true};
  plan.layers[1].key.transform.scales = {INFINITY};
  EXPECT_THROW(to_json(plan), Error);
}

TEST(Files, AreWrittenWholeOrNotAtAll) {
  const ModelShape model = shape(2);
  EXPECT_THROW(write_plan(f16_plan(model), "/nonexistent/folder/plan.json"), Error);
  const std::string path = ::testing::TempDir() + "/kvmix_plan.json";
  write_plan(f16_plan(model), path);
  EXPECT_EQ(to_json(read_plan(path)), to_json(f16_plan(model)));
  std::filesystem::remove(path);
}

}  // namespace
}  // namespace kvmix
