// Planners on made-up profiles. One long file: its tests share these profiles and their requests.
#include "kvmix/plan.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <random>

#include "codec/trellis.h"
#include "kvmix/error.h"
#include "plan/allocate.h"
#include "rows/scale.h"
#include "support/plan_fixture.h"

namespace kvmix {
namespace {

using testing::profile;
using testing::shape;

// With errors and divergences of the recipe's codecs, recent rows among them.
Profile measured_profile(const ModelShape& model, double recent_cost = 1e-7) {
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
      for (const char* metric : {"output", "kl"})
        p.sensitivities.push_back(
            {metric, static_cast<int>(l), side, "int8.token.g64.minmax.zero", "plain", recent_cost, true});
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

// The other fit of keys is taken where it costs less, and only if both are asked for.
TEST(Planners, TheUnbiasedFitOfKeysIsTakenWhereBothAreAsked) {
  const ModelShape model = shape(6);
  Profile scores = measured_profile(model);
  for (size_t i = 0, n = scores.sensitivities.size(); i < n; ++i) {
    Profile::Sensitivity s = scores.sensitivities[i];
    CodecSpec codec = parse_codec(s.codec);
    if (s.side != Side::kKey || s.recent || codec.fit != Fit::kLeastSquares) continue;
    codec.fit = Fit::kUnbiased;
    s.codec = to_string(codec);
    s.cost *= s.layer == 2 ? 0.5 : 2;
    scores.sensitivities.push_back(s);
  }
  PlannerRequest request = request_for(model, scores);
  request.budget = {.bits = 3, .context = 8192};
  const auto unbiased = [&] {
    std::vector<int> layers;
    const Plan plan = make_plan("kvmix", request);
    for (size_t l = 0; l < plan.layers.size(); ++l) {
      if (plan.layers[l].key.codec.fit == Fit::kUnbiased) layers.push_back(static_cast<int>(l));
    }
    return layers;
  };
  EXPECT_EQ(unbiased(), std::vector<int>{});
  request.options["fits"] = "both";
  EXPECT_EQ(unbiased(), std::vector<int>{2});
  request.options.clear();  // both by itself where the measured text was as long as the plan's
  scores.window_tokens = 8191;
  EXPECT_EQ(unbiased(), std::vector<int>{});
  scores.window_tokens = 8192;
  EXPECT_EQ(unbiased(), std::vector<int>{2});
  request.options["fits"] = "one";
  EXPECT_EQ(unbiased(), std::vector<int>{});
  request.options["fits"] = "all";
  EXPECT_THROW(make_plan("kvmix", request), Error);
}

// Which lose less: plans for the CPU take them by themselves, those for a GPU where they are asked for, unless they are not
// wanted.
TEST(Planners, TrellisesAreTakenWhereTheDeviceReadsThemFastOrTheyAreAsked) {
  const ModelShape model = shape(6);
  Profile scores = measured_profile(model);
  for (size_t i = 0, n = scores.sensitivities.size(); i < n; ++i) {
    Profile::Sensitivity s = scores.sensitivities[i];
    const CodecSpec codec = parse_codec(s.codec);
    if (s.recent || codec.bits < 2 || codec.bits > 4) continue;
    s.codec = to_string(trellis_spec(codec.bits, s.side));
    s.cost *= 0.5;
    scores.sensitivities.push_back(s);
  }
  PlannerRequest request = request_for(model, scores);
  request.budget = {.bits = 3, .context = 8192};
  const auto trellises = [&](const std::string& planner) {
    const Plan plan = make_plan(planner, request);
    int count = 0;
    for (const Plan::Layer& layer : plan.layers) count += is_trellis(layer.key.codec) + is_trellis(layer.value.codec);
    const bool noted = plan.note.find(count > 0 ? "of all codes" : "of even codes") != std::string::npos;
    EXPECT_TRUE(noted || planner != "kvmix") << plan.note;
    return count;
  };
  EXPECT_GT(trellises("kvmix"), 0);
  request.options["codes"] = "even";
  EXPECT_EQ(trellises("kvmix"), 0);
  request.options["codes"] = "all";
  EXPECT_GT(trellises("kvmix"), 0);
  request.device = "cuda";
  EXPECT_GT(trellises("kvmix"), 0);
  request.options["codes"] = "even";
  EXPECT_EQ(trellises("kvmix"), 0);
  request.options.clear();
  EXPECT_EQ(trellises("kvmix"), 0);
  EXPECT_EQ(trellises("kvtuner"), 0);
  request.options["codes"] = "trellis";
  EXPECT_THROW(make_plan("kvmix", request), Error);
}

// One bit of a layer's keys that seems to cost no more than two is not believed.
TEST(Planners, OneBitCostsMoreThanTwoWhateverWasMeasured) {
  const ModelShape model = shape(6);
  Profile scores = measured_profile(model);
  const auto one_bits = [&] {
    PlannerRequest request = request_for(model, scores);
    request.budget = {.bits = 3.5, .context = 8192};
    const Plan plan = make_plan("kvmix", request);
    return plan.layers[2].key.codec.bits == 1;
  };
  EXPECT_FALSE(one_bits());
  std::map<std::string, double> two;  // by metric
  for (const auto& s : scores.sensitivities) {
    if (s.layer == 2 && s.side == Side::kKey && !s.recent && parse_codec(s.codec).bits == 2) two[s.metric] = s.cost;
  }
  for (auto& s : scores.sensitivities) {
    if (s.layer == 2 && s.side == Side::kKey && !s.recent && parse_codec(s.codec).bits == 1) s.cost = two[s.metric];
  }
  EXPECT_FALSE(one_bits());
}

// The note says what more bytes would buy.
TEST(Planners, ANoteTellsWhatATenthOfABitWouldSave) {
  const ModelShape model = shape(6);
  const Profile scores = measured_profile(model);
  PlannerRequest request = request_for(model, scores);
  request.budget = {.bits = 3, .context = 8192};
  const std::string note = make_plan("kvmix", request).note;
  const auto cost = [](const std::string& text, const std::string& before) {
    const size_t at = text.find(before);
    EXPECT_NE(at, std::string::npos) << text;
    return at == std::string::npos ? NAN : std::stod(text.substr(at + before.size()));
  };
  EXPECT_LT(cost(note, "; .1 bits more: cost "), cost(note, "predicted cost "));
  request.budget.bits = 3.1;
  EXPECT_NEAR(cost(make_plan("kvmix", request).note, "predicted cost ") / cost(note, "; .1 bits more: cost "), 1, 0.05);
}

// Ranks and widths in one budget: what latents explain decides.
FactorsInfo factors_of(const ModelShape& model, double decay) {
  FactorsInfo factors{"factors.gguf", "palu", "", model.name, model.fingerprint, "7", {}};
  for (const auto& layer : model.layers) {
    const int n = layer.kv_heads * layer.head_dim;
    FactorsInfo::Layer& f = factors.layers.emplace_back(FactorsInfo::Layer{1, n, n, 1, n, n, {}, {}});
    for (int i = 0; i <= n; ++i) f.key_left.push_back((std::pow(decay, i) - std::pow(decay, n)) / (1 - std::pow(decay, n)));
    f.value_left = f.key_left;
  }
  return factors;
}

TEST(Planners, RanksAndBitsShareABudget) {
  const ModelShape model = shape(12);
  const Profile scores = measured_profile(model);
  PlannerRequest request = request_for(model, scores);
  request.budget = {.bits = 2, .context = 8192};
  const Plan bits = make_plan("kvmix", request);
  const FactorsInfo steep = factors_of(model, 0.9), flat = factors_of(model, 0.9999);
  const auto latents = [](const Plan& plan) {
    int sum = 0;
    for (const Plan::Layer& layer : plan.layers) sum += layer.key_rank + layer.value_rank;
    return sum;
  };
  request.factors = &flat;
  request.key_price = request.value_price = 1e6;
  const Plan kept = make_plan("kvmix", request);
  for (size_t l = 0; l < kept.layers.size(); ++l) {  // at this price none goes
    const int all = steep.layers[l].key_rank;
    EXPECT_TRUE(kept.layers[l].key_rank == 0 || kept.layers[l].key_rank == all) << kept.layers[l].key_rank;
  }
  request.factors = &steep;
  request.key_price = request.value_price = 1;
  const Plan cut = make_plan("kvmix", request);
  ASSERT_TRUE(cut.rank);
  EXPECT_EQ(cut.rank->checksum, "7");
  EXPECT_LT(cut.predicted->cost, bits.predicted->cost);
  EXPECT_LE(predict_bits_per_element(cache_config(cut, model), 8192), 2.0);
  EXPECT_LT(latents(cut), 12 * 2 * steep.layers[0].key_rank);
  check_plan(parse_plan(to_json(cut), "memory"), model, false);
  request.key_price = request.value_price = INFINITY;
  const Plan whole = make_plan("kvmix", request);
  for (const Plan::Layer& layer : whole.layers) EXPECT_TRUE(layer.key_rank == 0 || layer.key_rank == steep.layers[0].key_rank);
  EXPECT_LE(whole.predicted->cost, bits.predicted->cost * 1.001);
  EXPECT_THROW(make_plan("uniform", request), Error);
  request.budget.bits = 0.01;
  EXPECT_THROW(make_plan("kvmix", request), BudgetError);

  request.budget.bits = 2;
  const RankProbes probes = rank_probes(request);
  EXPECT_LT(probes.key.layers[0].key_rank, steep.layers[0].key_rank);
  EXPECT_EQ(probes.key.layers[0].value_rank, steep.layers[0].value_rank);
  EXPECT_EQ(probes.value.layers[0].key_rank, steep.layers[0].key_rank);
  EXPECT_GT(probes.value_cost, 0);
}

TEST(Planners, ThePapersWindowIsARatioOrFixedOrNone) {
  const ModelShape model = shape(4);
  const Profile scores = profile(model);
  PlannerRequest request = request_for(model, scores);
  const auto window = [&](const std::string& choice) {
    request.options["window"] = choice;
    return make_plan("kvmix-paper", request).window;
  };
  EXPECT_EQ(window("ratio"), (WindowRule{.tokens = 0, .ratio_key = 0.2f, .ratio_value = 0.2f}));
  EXPECT_EQ(window("fixed"), WindowRule{});
  EXPECT_EQ(window("none"), WindowRule{.tokens = 0});
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

TEST(Planners, KvarnIsItsRecipeInEveryLayer) {
  const ModelShape model = shape(4);
  PlannerRequest request;
  request.model = &model;
  const Plan plan = make_plan("kvarn", request);
  EXPECT_EQ(fp16_part(plan), (Fp16Part{128, 0, 0}));
  EXPECT_TRUE(plan.recent.is_f16());
  for (const Plan::Layer& layer : plan.layers) {
    EXPECT_EQ(to_string(layer.key.codec), "kvarn4.channel.minmax");
    EXPECT_EQ(to_string(layer.value.codec), "kvarn2.token.minmax");
    EXPECT_TRUE(layer.key.transform.hadamard && layer.value.transform.hadamard);
  }
  EXPECT_EQ(to_json(parse_plan(to_json(plan), "memory")), to_json(plan));
  request.options = {{"k-bits", "3"}, {"v-bits", "8"}, {"codec-fit", "fitted"}, {"recent", "8"}, {"sinks", "16"}};
  const Plan other = make_plan("kvarn", request);
  EXPECT_EQ(to_string(other.layers[1].key.codec), "kvarn3.channel.fitted");
  EXPECT_EQ(to_string(other.layers[1].value.codec), "kvarn8.token.fitted");
  EXPECT_EQ(other.sinks, 16);
  for (const char* bits : {"1", "7", "16"}) {
    request.options = {{"v-bits", bits}};
    EXPECT_THROW(make_plan("kvarn", request), Error) << bits;
  }
}

// Of sealed pages alone, whatever is around them: codes, a scale and a midpoint of 128 tokens for keys and of 64 channels for
// values.
TEST(Planners, BodyBitsAreThoseOfSealedPages) {
  const ModelShape model = shape(4);
  PlannerRequest request;
  request.model = &model;
  for (const char* sinks : {"0", "128"}) {
    request.options = {{"k-bits", "2"}, {"v-bits", "4"}, {"sinks", sinks}};
    const CacheConfig config = cache_config(make_plan("uniform", request), model);
    for (const int64_t tokens : {1, 1000}) EXPECT_DOUBLE_EQ(predict_body_bits(config, tokens), (2.25 + 4.5) / 2);
  }
  EXPECT_DOUBLE_EQ(predict_body_bits(cache_config(f16_plan(model), model), 1000), 16);
  EXPECT_EQ(predict_body_bits(cache_config(f16_plan(model), model), 0), 0);
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

// What recent rows of 8 bits cost is part of what a plan does, and fp16 is taken where it loses less at the same bytes.
TEST(Planners, PriceRecentRows) {
  const ModelShape model = shape(30);
  Profile scores = measured_profile(model, 0.001);
  PlannerRequest request = request_for(model, scores);
  request.budget.bits = 4;
  const Plan best = make_plan("kvmix", request);
  EXPECT_TRUE(best.recent.is_f16());
  EXPECT_LE(predict_bits_per_element(cache_config(best, model), 8192), 4);
  request.options = {{"recent", "8"}};
  const Plan eight = make_plan("kvmix", request);
  EXPECT_EQ(eight.recent, best.recent.is_f16() ? parse_codec("int8.token.g64.minmax.zero") : CodecSpec{});
  EXPECT_GT(eight.predicted->cost, 60 * 0.001);
  EXPECT_LT(best.predicted->cost, eight.predicted->cost);
  request.options = {{"recent", "f16"}};
  EXPECT_EQ(to_json(make_plan("kvmix", request)), to_json(best));

  // One that does not know the cost is not taken for one that knows it to be nothing.
  std::erase_if(scores.sensitivities, [](const auto& s) { return s.recent && s.layer == 3; });
  request.options = {};
  for (const char* planner : {"kvmix", "kvtuner"}) {
    try {
      make_plan(planner, request);
      FAIL() << planner;
    } catch (const Error& e) {
      EXPECT_EQ(e.status(), Status::kMismatch);
      EXPECT_NE(std::string(e.what()).find("layer 3 keys in recent rows (int8.token.g64.minmax.zero"), std::string::npos)
          << e.what();
    }
  }
  request.options = {{"recent", "f16"}};
  EXPECT_EQ(to_json(make_plan("kvmix", request)), to_json(best));
}

// Where weights say what biases do to keys, every planner takes that off them, and files keep it.
TEST(Planners, TakeBiasesOffKeys) {
  ModelShape model = shape(6);
  const auto numbers = static_cast<size_t>(model.layers[0].kv_heads * model.layers[0].head_dim);
  for (size_t i = 0; i < numbers; ++i) model.layers[2].key_sizes.push_back(i % 64 == 5 ? 400.0f : 4.0f);
  for (size_t i = 0; i < numbers; ++i) model.layers[3].key_center.push_back(static_cast<float>(i));
  for (size_t i = 0; i < numbers; ++i) model.layers[4].key_center.push_back(static_cast<float>(i));
  model.layers[4].softcap = 30;
  for (const char* transform : {"plain", "gradient"}) {
    const bool measured = std::string(transform) == "plain";
    const Profile scores = measured ? measured_profile(model) : profile(model);
    PlannerRequest request = request_for(model, scores);
    request.budget.bits = 4;
    for (const PlannerInfo& planner : planners()) {
      if (!measured && planner.name == "kvtuner") continue;  // goes by measured errors alone
      const Plan plan = parse_plan(to_json(make_plan(planner.name, request)), "memory");
      // The paper's plan keeps recent rows in fp16, and scales per channel.
      const bool scaled = planner.name != "kvmix-paper";
      for (size_t l = 0; l < plan.layers.size(); ++l) {
        const std::span<const float> scale = scale_of(plan.layers[l].key.transform);
        EXPECT_EQ(scale.size(), scaled && l == 2 ? numbers : 0) << planner.name << ", layer " << l;
        EXPECT_EQ(plan.layers[l].key.transform.center, scaled && l == 3 ? model.layers[l].key_center : std::vector<float>())
            << planner.name << ", layer " << l;  // capped scores see what all keys share
        EXPECT_TRUE(plan.layers[l].value.transform.center.empty()) << planner.name;
        EXPECT_TRUE(scale_of(plan.layers[l].value.transform).empty()) << planner.name;
        if (scale.empty()) continue;
        EXPECT_NEAR(scale[4], std::pow(100.0, 1.0 / 64), 1e-3);
        EXPECT_NEAR(scale[4] / scale[5], 100, 0.1);
      }
      Cache cache(cache_config(plan, model));
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

}  // namespace
}  // namespace kvmix
