// LeanKV on the published trace: one head, 256 tokens of prompt, 256 of decoding.
#include <cmath>

#include "policy/layer_state.h"

namespace kvmix {
namespace {

struct Counts {
  size_t high, low, dropped;
  friend bool operator==(const Counts&, const Counts&) = default;
};
std::ostream& operator<<(std::ostream& out, const Counts& c) { return out << c.high << "/" << c.low << "/" << c.dropped; }

struct Trace {
  double low, high;
  std::map<int64_t, Counts> expected;  // by tokens decoded
  std::array<int, 4> cases;            // dropped; demoted in place of a dropped one; demoted; left
};

double eighth_power(double u) { return std::pow(u, 8); }

TEST(LeanKv, Trace) {
  const Trace traces[] = {
      {.02, 1, {{0, {108, 58, 90}}, {64, {118, 78, 124}}, {128, {130, 93, 161}}, {256, {163, 134, 215}}}, {125, 0, 76, 55}},
      {0, 1, {{0, {108, 148, 0}}, {256, {163, 349, 0}}}, {0, 0, 201, 55}},
      {.04, .04, {{0, {161, 0, 95}}, {256, {281, 0, 231}}}, {-1, -1, -1, -1}},
      {0, 0, {{0, {256, 0, 0}}, {256, {512, 0, 0}}}, {0, 0, 0, 256}}};
  for (const Trace& trace : traces) {
    SCOPED_TRACE(std::to_string(trace.low) + " " + std::to_string(trace.high));
    const auto policy = make_policy({"leankv", {{"low", trace.low}, {"high", trace.high}}});
    Lcg random(99);
    LayerState state(256, 1);
    state.window_rows = 64;
    LayerState::Head& head = state.heads[0];
    // By position, in double precision; the policy sees floats, as a cache stores them.
    std::vector<double> weight, mass;
    double sum = 0;
    for (int t = 0; t < 256; ++t) sum += weight.emplace_back(eighth_power(random.uniform()));
    for (int t = 0; t < 256; ++t) {
      head.queries[t] = std::min(256 - t, 64);
      mass.push_back(weight[t] / sum * head.queries[t]);
      head.mass[t] = static_cast<float>(mass[t]);
    }
    state.run(*policy);
    const auto counts = [&] {
      return Counts{head.count(Tier::kHigh), head.count(Tier::kLow), static_cast<size_t>(state.length) - head.positions.size()};
    };
    // What a token has gathered goes with it.
    for (size_t i = 0; i < head.positions.size(); ++i) {
      EXPECT_EQ(head.mass[i], static_cast<float>(mass[head.positions[i]]));
    }
    EXPECT_EQ(counts(), trace.expected.at(0));
    std::array<int, 4> cases = {0, 0, 0, 0};
    for (int64_t step = 1; step <= 256; ++step) {
      weight.push_back(eighth_power(random.uniform()));
      const Decision decision = state.decide(*policy, Moment::kBeforeToken);
      const bool drops = !decision.heads[0].drop.empty(), moves = !decision.heads[0].move.empty();
      ++cases[moves ? (drops ? 1 : 2) : (drops ? 0 : 3)];
      state.apply(decision);
      head.append(state.length++);
      mass.push_back(0);
      double all = 0;
      for (const int64_t p : head.positions) all += weight[p];
      for (size_t i = 0; i < head.positions.size(); ++i) {
        const int64_t p = head.positions[i];
        mass[p] += weight[p] / all;
        head.mass[i] = static_cast<float>(mass[p]);
        ++head.queries[i];
      }
      if (trace.expected.contains(step)) {
        EXPECT_EQ(counts(), trace.expected.at(step)) << step;
      }
    }
    if (trace.cases[0] >= 0) {
      EXPECT_EQ(cases, trace.cases);
    }
  }
}

// Position 200, window 64, low .02, high 1: the least high token has mean `high_mean`, the least low one `low_mean`.
HeadDecision step(double high_mean, double low_mean) {
  LayerState state(200, 1);
  LayerState::Head& head = state.heads[0];
  for (int t = 0; t < 200; ++t) {
    head.queries[t] = 200 - t;
    head.mass[t] = static_cast<float>(0.9 * head.queries[t]);
  }
  head.mass[30] = static_cast<float>(high_mean * head.queries[30]);
  head.mass[70] = static_cast<float>(low_mean * head.queries[70]);
  for (const int t : {70, 90}) head.tiers[t] = Tier::kLow;
  // Lighter still, but recent, or counted by no query yet.
  head.mass[150] = 0;
  head.mass[20] = 0;
  head.queries[20] = 0;
  return state.decide(*make_policy({"leankv", {}}), Moment::kBeforeToken).heads[0];
}

TEST(LeanKv, FourCases) {
  const double tq = 1.0 / 200, tp = 0.02 / 200;
  const std::vector<Move> demoted = {{30, Tier::kLow}};
  EXPECT_EQ(step(.4 * tp, .5 * tp).drop, std::vector<int32_t>{30});
  EXPECT_TRUE(step(.4 * tp, .5 * tp).move.empty());
  EXPECT_EQ(step(.5 * tq, .5 * tp).drop, std::vector<int32_t>{70});
  EXPECT_EQ(step(.5 * tq, .5 * tp).move, demoted);
  // Both below the lower threshold, the low tier's the lighter one: it makes room.
  EXPECT_EQ(step(.5 * tp, .4 * tp).drop, std::vector<int32_t>{70});
  EXPECT_EQ(step(.5 * tp, .4 * tp).move, demoted);
  EXPECT_TRUE(step(.5 * tq, 2 * tp).drop.empty());
  EXPECT_EQ(step(.5 * tq, 2 * tp).move, demoted);
  EXPECT_TRUE(step(2 * tq, .5 * tp).drop.empty());
  EXPECT_TRUE(step(2 * tq, .5 * tp).move.empty());
}

// Asked once for many tokens it does what it does when it is asked for each.
TEST(LeanKv, OnceForManyIsOneByOne) {
  for (const auto& [low, high] : {std::pair{.02, 1.0}, {.5, 1.0}, {.3, .3}, {0.0, 2.0}}) {
    const auto policy = make_policy({"leankv", {{"low", low}, {"high", high}}});
    for (uint32_t seed = 1; seed < 20; ++seed) {
      Lcg random(seed);
      LayerState single(400, 2);
      for (LayerState::Head& head : single.heads) {
        for (int t = 0; t < 400; ++t) {
          head.queries[t] = 400 - t;
          head.mass[t] = static_cast<float>(eighth_power(random.uniform()) * 9 / 400 * head.queries[t]);
          if (random.uniform() < .3) head.tiers[t] = Tier::kLow;
        }
      }
      LayerState many = single;
      for (int i = 0; i < 60; ++i) single.run(*policy, Moment::kBeforeToken);
      PolicyView view = many.view(Moment::kBeforeToken);
      view.since = 60;
      PolicyScratch scratch;
      Decision decision;
      policy->decide(view, scratch, decision);
      many.apply(decision);
      for (size_t h = 0; h < 2; ++h) {
        EXPECT_EQ(many.heads[h].positions, single.heads[h].positions) << low << " " << high << " " << seed;
        EXPECT_EQ(many.heads[h].tiers, single.heads[h].tiers) << low << " " << high << " " << seed;
      }
    }
  }
}

// As after a sequence was cut back to where most had been dropped.
TEST(LeanKv, KeepsAsManyAsTheWindow) {
  const auto policy = make_policy({"leankv", {}});
  for (const int64_t recent : {61, 62}) {
    LayerState state(0, 1);
    state.length = state.prompt_length = 500;
    for (const int64_t p : join({3, 40}, range(500 - recent, 500))) {
      state.heads[0].append(p);
      state.heads[0].queries.back() = 5;
    }
    EXPECT_EQ(state.decide(*policy, Moment::kBeforeToken).empty(), recent == 61);
  }
}

TEST(LeanKv, SaysItsTiers) {
  const auto policy = make_policy({"leankv", {}});
  EXPECT_TRUE(policy->has_low_tier());
  EXPECT_EQ(policy->tiers(), (std::array<TierBits, kTiers>{TierBits{8, 4}, TierBits{4, 2}}));
  EXPECT_TRUE(policy->needs().mass_from_window);
}

TEST(LeanKv, SkewedHeadsKeepFewerTokens) {
  LayerState state(512, 2);
  Lcg random(4);
  for (int h = 0; h < 2; ++h) {
    double sum = 0;
    std::vector<double> weight;
    for (int t = 0; t < 512; ++t) sum += weight.emplace_back(std::pow(random.uniform(), h == 0 ? 1 : 12));
    for (int t = 0; t < 512; ++t) {
      state.heads[h].queries[t] = std::min(512 - t, 64);
      state.heads[h].mass[t] = static_cast<float>(weight[t] / sum * state.heads[h].queries[t]);
    }
  }
  state.run(*make_policy({"leankv", {}}));
  EXPECT_GT(state.heads[0].positions.size(), state.heads[1].positions.size() + 100);
  EXPECT_GT(state.heads[0].count(Tier::kHigh), state.heads[1].count(Tier::kHigh));
}

}  // namespace
}  // namespace kvmix
