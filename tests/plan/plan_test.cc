#include "kvmix/plan.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <filesystem>
#include <random>

#include "kvmix/error.h"
#include "plan/allocate.h"

namespace kvmix {
namespace {

ModelShape shape(int layers) {
  ModelShape model;
  model.name = "test model";
  model.architecture = "llama";
  model.fingerprint = "0123456789abcdef";
  model.context_tokens = 32768;
  for (int l = 0; l < layers; ++l) model.layers.push_back({9, 3, 64, 0, 0.125f, 0.0f});
  return model;
}

Profile profile(const ModelShape& model) {
  Profile p;
  p.fingerprint = model.fingerprint;
  p.model = model.name;
  p.prompts = 1;
  p.tokens = 100;
  for (size_t l = 0; l < model.layers.size(); ++l) {
    p.key_score.push_back(1.0 + static_cast<double>((l * 7) % 11));
    p.value_score.push_back(1.0 + static_cast<double>((l * 5) % 13));
  }
  return p;
}

// With errors and divergences of the recipe's codecs.
Profile measured_profile(const ModelShape& model) {
  Profile p = profile(model);
  p.fp16.window = 128;
  for (size_t l = 0; l < model.layers.size(); ++l) {
    for (const Side side : {Side::kKey, Side::kValue}) {
      const double weight = (side == Side::kKey ? p.key_score : p.value_score)[l];
      for (const int bits : {1, 2, 3, 4, 6, 8}) {
        const CodecSpec codec = side == Side::kKey ? CodecSpec{bits, Axis::kChannel, 128, Fit::kLeastSquares, true}
                                                   : CodecSpec{bits, Axis::kToken, 64, Fit::kMinMax, true};
        const double error = std::pow(4.0, -bits) * weight;
        p.sensitivities.push_back({"output", static_cast<int>(l), side, to_string(codec), "plain", 0.1 * error});
        p.sensitivities.push_back({"kl", static_cast<int>(l), side, to_string(codec), "plain", 0.01 * error * weight});
      }
    }
  }
  return p;
}

double mean_bits(const Plan& plan, Side side) {
  double sum = 0;
  for (const auto& l : plan.layers) sum += (side == Side::kKey ? l.key : l.value).codec.bits;
  return sum / static_cast<double>(plan.layers.size());
}

PlannerRequest request_for(const ModelShape& model, const Profile& scores) {
  PlannerRequest request;
  request.model = &model;
  request.profile = &scores;
  return request;
}

TEST(Planners, ThePapersAllocationOfThirtyTwoLayers) {
  const ModelShape model = shape(32);
  const Profile scores = profile(model);
  PlannerRequest request = request_for(model, scores);
  const Plan plan = make_plan("kvmix-paper", request);
  EXPECT_DOUBLE_EQ(mean_bits(plan, Side::kKey), 2.1875);
  EXPECT_DOUBLE_EQ(mean_bits(plan, Side::kValue), 2.375);
  // Every layer above the threshold by score is a chosen one; ties go to the lower index.
  for (size_t a = 0; a < 32; ++a) {
    for (size_t b = 0; b < 32; ++b) {
      const bool better = scores.key_score[a] > scores.key_score[b] || (scores.key_score[a] == scores.key_score[b] && a < b);
      if (better) {
        EXPECT_GE(plan.layers[a].key.codec.bits, plan.layers[b].key.codec.bits) << a << " and " << b;
      }
    }
  }
  request.options["k-fraction"] = "0.109375";  // 3.5 of 32 rounds half up
  EXPECT_DOUBLE_EQ(mean_bits(make_plan("kvmix-paper", request), Side::kKey), 2.0 + 4.0 / 32);
}

TEST(Planners, EveryOneMeetsItsBudgetAndRoundTrips) {
  const ModelShape model = shape(30);
  const Profile scores = measured_profile(model);
  for (const PlannerInfo& planner : planners()) {
    double predicted = INFINITY;
    for (const double bits : {3.0, 3.5, 4.5, 8.0}) {
      PlannerRequest request = request_for(model, scores);
      request.budget.bits = bits;
      // Its layers form three groups here, so that sizes come in steps; these come near all budgets.
      if (planner.name == "kvtuner") request.options["recent"] = "f16";
      const Plan plan = make_plan(planner.name, request);
      EXPECT_EQ(plan.layers.size(), 30u) << planner.name;
      const CacheConfig config = cache_config(plan, model);
      if (planner.needs_budget) {
        EXPECT_LE(predict_bits_per_element(config, 8192), bits) << planner.name;
        EXPECT_GT(predict_bits_per_element(config, 8192), bits - 0.1) << planner.name;  // layers may share a choice
        ASSERT_TRUE(plan.predicted) << planner.name;
        EXPECT_LT(plan.predicted->cost, predicted) << planner.name;
        predicted = plan.predicted->cost;
      }
      EXPECT_EQ(to_json(parse_plan(to_json(plan), "memory")), to_json(plan)) << planner.name;
    }
  }
}

TEST(Planners, GradientScoresAreEnoughForTheDefault) {
  const ModelShape model = shape(30);
  const Profile scores = profile(model);
  PlannerRequest request = request_for(model, scores);
  for (const double bits : {2.5, 3.0, 4.5}) {
    request.budget.bits = bits;
    const Plan plan = make_plan("kvmix", request);
    EXPECT_GT(predict_bits_per_element(cache_config(plan, model), 8192), bits - 0.06);
    EXPECT_FALSE(plan.predicted);
  }
}

TEST(Planners, GoByKlOnceAllOfItIsMeasured) {
  const ModelShape model = shape(30);
  Profile scores = measured_profile(model);
  for (size_t i = 0, n = scores.sensitivities.size(); i < n; ++i) {
    if (scores.sensitivities[i].metric != "kl") continue;
    scores.sensitivities.push_back(scores.sensitivities[i]);
    scores.sensitivities.back().metric = "fisher";
  }
  PlannerRequest request = request_for(model, scores);
  request.budget.bits = 3;
  EXPECT_EQ(make_plan("kvmix", request).predicted->metric, "kl");
  scores.sensitivities.erase(std::find_if(scores.sensitivities.begin(), scores.sensitivities.end(),
                                          [](const Profile::Sensitivity& s) { return s.metric == "kl"; }));
  EXPECT_EQ(make_plan("kvmix", request).predicted->metric, "fisher");
}

TEST(Planners, KeepInFp16WhatTheProfileWasMeasuredWith) {
  ModelShape model = shape(4);
  Profile p = profile(model);
  p.fp16 = usual_fp16_part(model);
  PlannerRequest request = request_for(model, p);
  request.budget.bits = 6;
  EXPECT_EQ(make_plan("kvmix", request).window.tokens, 64);
  model.layers[1].sliding_window = 512;
  p.fp16 = usual_fp16_part(model);
  EXPECT_EQ(make_plan("kvmix", request).window.tokens, 32);
  p.fp16 = {8, 4, 96};
  for (const char* planner : {"kvmix", "uniform"}) {
    const Plan plan = make_plan(planner, request);
    if (std::string(planner) == "kvmix") {
      EXPECT_EQ(fp16_part(plan), p.fp16);
    } else {
      EXPECT_EQ(fp16_part(plan), usual_fp16_part(model));
    }
    const CacheConfig config = cache_config(plan, model);
    EXPECT_EQ(config.layers[0].sinks, plan.sinks);
    EXPECT_EQ(config.layers[1].sinks, plan.local_sinks);
    EXPECT_EQ(to_json(parse_plan(to_json(plan), "memory")), to_json(plan));
  }
  request.options = {{"window", "64"}, {"sinks", "2"}};
  EXPECT_EQ(fp16_part(make_plan("kvmix", request)), (Fp16Part{2, 2, 64}));  // never more in sliding layers than elsewhere
  request.options["local-sinks"] = "1";
  EXPECT_EQ(fp16_part(make_plan("kvmix", request)), (Fp16Part{2, 1, 64}));
  EXPECT_EQ(parse_profile(to_json(p), "memory").fp16, p.fp16);
}

TEST(Planners, KeepRecentRowsIn8BitsUnlessAsked) {
  const ModelShape model = shape(30);
  const Profile scores = measured_profile(model);
  PlannerRequest request = request_for(model, scores);
  request.budget.bits = 4;
  for (const char* planner : {"kvmix", "kvtuner", "uniform"}) {
    request.options = {};
    const Plan plan = make_plan(planner, request);
    EXPECT_EQ(to_string(plan.recent), "int8.token.g64.minmax.zero") << planner;
    EXPECT_EQ(cache_config(plan, model).layers[7].recent, plan.recent);
    EXPECT_EQ(to_json(parse_plan(to_json(plan), "memory")), to_json(plan));
    request.options = {{"recent", "f16"}};
    EXPECT_TRUE(make_plan(planner, request).recent.is_f16()) << planner;
    request.options = {{"recent", "4"}};
    EXPECT_THROW(make_plan(planner, request), Error);
  }
  request.options = {};
  EXPECT_TRUE(make_plan("kvmix-paper", request).recent.is_f16());
  Plan plan = make_plan("kvmix", request);
  for (const char* codec : {"int8.channel.g64.minmax.zero", "int4.token.g64.minmax.zero", "int8", "f32"}) {
    std::string json = to_json(plan);
    const std::string was = to_string(plan.recent);
    json.replace(json.find(was), was.size(), codec);
    try {
      parse_plan(json, "plan.json");
      FAIL() << codec << " was accepted";
    } catch (const Error& e) {
      EXPECT_EQ(e.status(), Status::kCorrupt);
      EXPECT_NE(std::string(e.what()).find("recent"), std::string::npos) << e.what();
    }
  }
}

// A budget that leaves some sides fp16 counts their recent rows as fp16 too.
TEST(Planners, MixedSidesMeetTheirBudgetToTheByte) {
  const ModelShape model = shape(30);
  const Profile scores = measured_profile(model);
  PlannerRequest request = request_for(model, scores);
  bool mixed = false;
  for (const double bits : {9.0, 11.0, 13.0, 15.0}) {
    request.budget.bits = bits;
    const Plan plan = make_plan("kvmix", request);
    const CacheConfig config = cache_config(plan, model);
    EXPECT_LE(predict_bits_per_element(config, 8192), bits);
    EXPECT_GT(predict_bits_per_element(config, 8192), bits - 0.4);
    for (const Plan::Layer& l : plan.layers) mixed = mixed || l.key.codec.is_f16() != l.value.codec.is_f16();
  }
  EXPECT_TRUE(mixed);
}

// Sequences share the bytes, each with its own sinks, window and tables.
TEST(Planners, ABudgetOfSeveralSequences) {
  const ModelShape model = shape(30);
  const Profile scores = measured_profile(model);
  for (const PlannerInfo& planner : planners()) {
    if (!planner.needs_budget) continue;
    PlannerRequest request = request_for(model, scores);
    request.budget = {.bytes = size_t{1} << 30, .sequences = 27, .context = 8192};
    if (planner.name == "kvtuner") request.options["recent"] = "f16";
    const Plan plan = make_plan(planner.name, request);
    const size_t one = predict_bytes(cache_config(plan, model), 8192);
    EXPECT_LE(27 * one, size_t{1} << 30) << planner.name;
    EXPECT_GT(27 * one, (size_t{1} << 30) - (size_t{1} << 24)) << planner.name;
    request.budget = {.bytes = (size_t{1} << 30) / 27, .context = 8192};
    EXPECT_EQ(to_json(make_plan(planner.name, request)), to_json(plan)) << planner.name;
  }
}

// A promise to fit holds the allocator's rounding, for one sequence and for many.
TEST(Planners, APromiseToFitHoldsTheSlack) {
  const ModelShape model = shape(30);
  const Profile scores = measured_profile(model);
  for (const PlannerInfo& planner : planners()) {
    if (!planner.needs_budget) continue;
    for (const int sequences : {1, 27}) {
      PlannerRequest request = request_for(model, scores);
      const size_t bytes = (size_t{40} << 20) * static_cast<size_t>(sequences);
      request.budget = {.bytes = bytes, .sequences = sequences, .context = 8192, .slack = true};
      const CacheConfig config = cache_config(make_plan(planner.name, request), model);
      const size_t all = predict_bytes(config, 8192) * static_cast<size_t>(sequences);
      const size_t slack = predict_slack_bytes(config, 8192, sequences);
      EXPECT_LE(all + slack, bytes) << planner.name << ", sequences " << sequences;
      EXPECT_GT(all + slack, bytes - bytes / 20) << planner.name << ", sequences " << sequences;
    }
  }
}

TEST(Planners, CurvesGoFromTheSmallestPlanToTheLargest) {
  const ModelShape model = shape(30);
  const Profile scores = measured_profile(model);
  for (const PlannerInfo& planner : planners()) {
    PlannerRequest request = request_for(model, scores);
    if (!planner.needs_budget) {
      EXPECT_THROW(make_curve(planner.name, request, 8), Error) << planner.name;
      continue;
    }
    const std::vector<Plan> curve = make_curve(planner.name, request, 12);
    ASSERT_GE(curve.size(), 8u) << planner.name;
    const auto bytes = [&](const Plan& plan) { return predict_bytes(cache_config(plan, model), 8192); };
    for (size_t i = 1; i < curve.size(); ++i) {
      EXPECT_GT(bytes(curve[i]), bytes(curve[i - 1])) << planner.name;
      EXPECT_LT(curve[i].predicted->cost, curve[i - 1].predicted->cost) << planner.name;
    }
    // A byte less than the first cannot be had, many more than the last are of no use.
    request.budget = {.bytes = bytes(curve.front()) - 1, .context = 8192};
    try {
      make_plan(planner.name, request);
      FAIL() << planner.name;
    } catch (const BudgetError& e) {
      EXPECT_EQ(e.least_bytes(), bytes(curve.front())) << planner.name;
    }
    request.budget.bytes = size_t{1} << 40;
    EXPECT_EQ(bytes(make_plan(planner.name, request)), bytes(curve.back())) << planner.name;
    EXPECT_THROW(make_curve(planner.name, request, 1), Error);
  }
}

TEST(Planners, ImpossibleBudgetsNameTheSmallestThatWorks) {
  const ModelShape model = shape(30);
  const Profile scores = profile(model);
  PlannerRequest request = request_for(model, scores);
  request.budget.bits = 0.5;
  try {
    make_plan("kvmix", request);
    FAIL() << "half a bit was enough";
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("smallest plan takes"), std::string::npos) << e.what();
  }
  Profile other = scores;
  other.fingerprint = "another";
  request.profile = &other;
  request.budget.bits = 3;
  EXPECT_THROW(make_plan("kvmix", request), Error);
  request.profile = nullptr;
  EXPECT_THROW(make_plan("kvmix", request), Error);
  EXPECT_THROW(make_plan("guess", request), Error);
  request.options["colour"] = "red";
  EXPECT_THROW(make_plan("uniform", request), Error);
}

TEST(Allocate, EqualsExhaustiveSearch) {
  std::mt19937 random(3);
  for (int round = 0; round < 200; ++round) {
    std::vector<std::vector<Choice>> items(4);
    for (auto& choices : items) {
      const size_t n = 1 + random() % 4;
      for (size_t c = 0; c < n; ++c)
        choices.push_back({static_cast<int64_t>(64 * (1 + random() % 20)), static_cast<double>(random() % 1000)});
    }
    const int64_t budget = 64 * static_cast<int64_t>(4 + random() % 60);
    double best = INFINITY;
    for (size_t code = 0; code < 256; ++code) {
      int64_t bytes = 0;
      double cost = 0;
      bool valid = true;
      for (size_t i = 0; i < 4 && valid; ++i) {
        const size_t c = (code >> (2 * i)) & 3;
        valid = c < items[i].size();
        if (valid) bytes += items[i][c].bytes, cost += items[i][c].cost;
      }
      if (valid && bytes <= budget) best = std::min(best, cost);
    }
    const std::vector<size_t> chosen = allocate(items, budget);
    if (std::isinf(best)) {
      EXPECT_TRUE(chosen.empty());
      continue;
    }
    ASSERT_EQ(chosen.size(), 4u);
    int64_t bytes = 0;
    double cost = 0;
    for (size_t i = 0; i < 4; ++i) bytes += items[i][chosen[i]].bytes, cost += items[i][chosen[i]].cost;
    EXPECT_LE(bytes, budget);
    EXPECT_DOUBLE_EQ(cost, best);
  }
}

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
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(4);
  int refused = 0, tried = 0;
  while (std::chrono::steady_clock::now() < end) {
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
    ++tried;
    try {
      parse(bad);
    } catch (const Error& e) {
      EXPECT_NE(e.status(), Status::kInternal);
      ++refused;
    }
  }
  EXPECT_GT(refused, tried / 2);
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
  for (size_t i = 0; i < values * static_cast<size_t>(layer.head_dim - 1) / 2; ++i)
    spec.feedback.push_back(static_cast<float>(i % 37) / 64.0f - 0.25f);
  Profile p = profile(model);
  p.transforms.push_back({"mine", 0, Side::kKey, spec});
  p.sensitivities.push_back({"kl", 0, Side::kKey, "int2.channel.g128.fitted.zero", "mine", 0.01});
  const Profile again = parse_profile(to_json(p), "memory");
  EXPECT_EQ(named_transform(again, 0, Side::kKey, "mine"), spec);
  EXPECT_THROW(named_transform(again, 1, Side::kKey, "mine"), Error);
  EXPECT_THROW(named_transform(again, 0, Side::kValue, "mine"), Error);

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
