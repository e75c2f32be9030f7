// What every registered policy promises, whatever it is: none is named here.
#include <cmath>
#include <cstdlib>
#include <limits>
#include <new>

#include "attention/scores.h"
#include "policy/layer_state.h"

namespace {
thread_local int64_t allocations = 0;

void* counted(std::size_t bytes) {
  ++allocations;
  if (void* memory = std::malloc(bytes)) return memory;
  throw std::bad_alloc();
}
}  // namespace

void* operator new(std::size_t bytes) { return counted(bytes); }
void* operator new[](std::size_t bytes) { return counted(bytes); }
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
  ++allocations;
  return std::malloc(bytes);
}
void operator delete(void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }

namespace kvmix {

void PrintTo(const PolicySpec& spec, std::ostream* out) { *out << to_string(spec); }

namespace {

bool has(const PolicyInfo& info, const std::string& name) {
  return std::any_of(info.parameters.begin(), info.parameters.end(), [&](const PolicyParameter& p) { return p.name == name; });
}

// Every policy with each of its choices, small enough for prompts of some hundred tokens.
std::vector<PolicySpec> all_specs() {
  const std::map<std::string, PolicyValue> small = {{"keep", 0.25},   {"sinks", 5.0}, {"window", 12.0},
                                                    {"queries", 8.0}, {"page", 4.0},  {"frozen", 0.0}};
  std::vector<PolicySpec> specs;
  for (const PolicyInfo& info : policies()) {
    PolicySpec spec{info.name, {}};
    for (const auto& [name, value] : small) {
      if (has(info, name)) spec.values[name] = value;
    }
    specs.push_back(spec);
    for (const PolicyParameter& parameter : info.parameters) {
      for (size_t c = 1; c < parameter.choices.size(); ++c) {
        PolicySpec other = spec;
        other.values[parameter.name] = parameter.choices[c];
        if (parameter.name == "host") other.values.erase("window");
        specs.push_back(other);
      }
    }
  }
  return specs;
}

constexpr int kKvHeads = 3, kHeadsPerKv = 2, kDim = 8;

// Rotated keys and queries of a prompt whose heads look at different tokens.
struct Prompt {
  int64_t n;
  std::vector<std::vector<float>> keys, queries;  // [kv head][n][dim], [kv head][n][heads_per_kv][dim]

  Prompt(int64_t tokens, uint32_t seed) : n(tokens), keys(kKvHeads), queries(kKvHeads) {
    Lcg random(seed);
    for (int h = 0; h < kKvHeads; ++h) {
      for (int64_t i = 0; i < n * kDim; ++i) keys[h].push_back(static_cast<float>(2 * random.symmetric()));
      for (int64_t i = 0; i < n * kHeadsPerKv * kDim; ++i) queries[h].push_back(static_cast<float>(8 * random.symmetric()));
    }
  }
};

// What attention hands a policy after this prompt, gathered over chunks of these sizes (the last one again and again).
LayerState scored(const Prompt& prompt, const Needs& needs, const std::vector<int64_t>& chunks) {
  LayerState state(prompt.n, kKvHeads, kHeadsPerKv);
  state.shape.layer = state.shape.ordinal = 2;
  state.shape.layers = state.shape.ordinals = 6;
  const int64_t first_voter = std::max<int64_t>(0, prompt.n - needs.window_queries);
  state.window_rows = static_cast<int>(prompt.n - first_voter);
  const std::vector<int64_t> all = range(0, prompt.n);
  for (int h = 0; h < kKvHeads; ++h) {
    std::vector<float> mass;
    std::vector<int32_t> counted;
    std::vector<float> window(prompt.n * kHeadsPerKv, 0);
    int64_t done = 0;
    for (size_t chunk = 0; done < prompt.n; ++chunk) {
      const int64_t end = std::min(prompt.n, done + chunks[std::min(chunk, chunks.size() - 1)]);
      mass.resize(end, 0);
      counted.resize(end, 0);
      const ScoreKeys keys{.heads_per_kv = kHeadsPerKv,
                           .head_dim = kDim,
                           .scale = 1 / std::sqrt(static_cast<float>(kDim)),
                           .keys = std::span(prompt.keys[h]).first(end * kDim),
                           .positions = std::span(all).first(end)};
      std::vector<float> row(end * kHeadsPerKv);
      for (; done < end; ++done) {
        score_row(keys, &prompt.queries[h][done * kHeadsPerKv * kDim], done, row);
        if (!needs.mass_from_window || done >= first_voter) {
          count_query(keys, done, counted);
          if (needs.mass == MassReduce::kMax) {
            add_max_mass(row, mass);
          } else {
            add_mean_mass(row, mass);
          }
        }
        if (done < first_voter) continue;
        for (int q = 0; q < kHeadsPerKv; ++q) {
          add_to_window(std::span(row).subspan(q * end, end), std::span(window).subspan(q * prompt.n, end));
        }
      }
    }
    if (needs.mass_from_window) {
      if (needs.mass == MassReduce::kMax) {
        max_of_window(window, mass);
      } else {
        mean_of_window(window, mass);
      }
    }
    state.heads[h].mass = mass;
    state.heads[h].queries = counted;
    state.heads[h].window = window;
  }
  return state;
}

void expect_protected(const LayerState& state, const Policy& policy, int64_t incoming) {
  const Protection kept = policy.protection(state.shape, state.prompt_length);
  for (const LayerState::Head& head : state.heads) {
    const std::set<int64_t> here(head.positions.begin(), head.positions.end());
    ASSERT_EQ(here.size(), head.positions.size());
    for (int64_t p = 0; p < std::min(kept.sinks, state.length); ++p) ASSERT_TRUE(here.contains(p)) << "sink " << p;
    for (int64_t p = std::max<int64_t>(0, state.length + incoming - kept.window); p < state.length; ++p) {
      ASSERT_TRUE(here.contains(p)) << "position " << p << " of " << state.length;
    }
  }
}

size_t stored(const LayerState& state) {
  size_t all = 0;
  for (const LayerState::Head& head : state.heads) all += head.positions.size();
  return all;
}

// A token is appended and looks at the others.
void decode_one(LayerState& state, Lcg& random) {
  for (LayerState::Head& head : state.heads) {
    head.append(state.length);
    for (size_t i = 0; i < head.mass.size(); ++i) {
      head.mass[i] += static_cast<float>(std::pow(random.uniform(), 8) / static_cast<double>(head.mass.size()));
      ++head.queries[i];
    }
  }
  ++state.length;
}

class EveryPolicy : public testing::TestWithParam<PolicySpec> {
 protected:
  static const PolicyInfo& info() {
    return *std::find_if(policies().begin(), policies().end(), [](const PolicyInfo& p) { return p.name == GetParam().name; });
  }
  std::unique_ptr<Policy> policy_ = make_policy(GetParam());
};

TEST(PolicyContract, RunsOverTheRegistry) {
  std::vector<std::string> names;
  for (const PolicyInfo& info : policies()) {
    std::printf("[ REGISTRY ] policy %s\n", info.name.c_str());  // read by scripts/extend
    EXPECT_EQ(std::count(names.begin(), names.end(), info.name), 0) << info.name;
    names.push_back(info.name);
    EXPECT_FALSE(info.description.empty()) << info.name;
    EXPECT_NO_THROW(check_policy({info.name, {}})) << info.name;
  }
}

TEST_P(EveryPolicy, KeepsSinksAndWindowWithinTheBudget) {
  Lcg random(17);
  for (const int64_t n : {40, 137, 300, 512}) {
    LayerState state = scored(Prompt(n, 3), policy_->needs(), {n});
    state.run(*policy_);
    ASSERT_NO_FATAL_FAILURE(expect_protected(state, *policy_, 0));
    const size_t most = static_cast<size_t>(policy_->most_tokens(state.shape, n));
    EXPECT_LE(stored(state), most);
    EXPECT_LE(most, static_cast<size_t>(n * kKvHeads));
    // A budget is spent, but for what whole pages of four leave.
    const bool bounded = has(info(), "keep");
    if (bounded) {
      EXPECT_GT(stored(state) + 4 * kKvHeads, most);
    }
    for (int step = 0; step < 40; ++step) {
      state.run(*policy_, Moment::kBeforeToken);
      ASSERT_NO_FATAL_FAILURE(expect_protected(state, *policy_, 1));
      if (policy_->needs().every_step) {
        EXPECT_LE(stored(state), bounded ? most : most + kKvHeads * step);
      }
      decode_one(state, random);
    }
  }
}

TEST_P(EveryPolicy, DropsSomethingOfALongPrompt) {
  LayerState state = scored(Prompt(512, 4), policy_->needs(), {512});
  const size_t before = stored(state);
  const Decision decision = state.decide(*policy_);
  EXPECT_FALSE(decision.empty());
  state.apply(decision);
  EXPECT_LT(stored(state), before);
}

TEST_P(EveryPolicy, HeadsDifferWhereTheirScoresDo) {
  LayerState state = scored(Prompt(300, 5), policy_->needs(), {300});
  state.run(*policy_);
  for (int h = 1; h < kKvHeads; ++h) {
    EXPECT_EQ(state.kept(h) == state.kept(0), policy_->heads_share()) << h;
  }
}

TEST_P(EveryPolicy, TheSameForChunkedAndWholePrompts) {
  const Prompt prompt(300, 6);
  LayerState whole = scored(prompt, policy_->needs(), {300});
  const Decision expected = whole.decide(*policy_);
  for (const std::vector<int64_t>& chunks : {std::vector<int64_t>{1}, {7}, {128}, {299, 1}, {3, 250, 11}}) {
    const Decision ours = scored(prompt, policy_->needs(), chunks).decide(*policy_);
    for (int h = 0; h < kKvHeads; ++h) {
      EXPECT_EQ(ours.heads[h].drop, expected.heads[h].drop);
      EXPECT_EQ(ours.heads[h].move, expected.heads[h].move);
    }
  }
}

TEST_P(EveryPolicy, TheSameInUsedMemory) {
  LayerState state = scored(Prompt(300, 7), policy_->needs(), {300}), other = scored(Prompt(400, 8), policy_->needs(), {400});
  const Decision expected = state.decide(*policy_);
  PolicyScratch scratch;
  Decision decision;
  policy_->decide(other.view(), scratch, decision);
  policy_->decide(state.view(), scratch, decision);
  for (int h = 0; h < kKvHeads; ++h) {
    EXPECT_EQ(decision.heads[h].drop, expected.heads[h].drop);
    EXPECT_EQ(decision.heads[h].move, expected.heads[h].move);
  }
}

TEST_P(EveryPolicy, TakesAnyScores) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN(), kInf = std::numeric_limits<float>::infinity();
  const std::vector<std::vector<float>> fills = {{0},     {0.25f},         {kNan},           {kInf},         {-kInf},
                                                 {-1, 1}, {kNan, 1, 0.5f}, {kInf, -kInf, 0}, {3e38f, 3e38f}, {1e-45f, 0}};
  for (const std::vector<float>& fill : fills) {
    LayerState state(200, kKvHeads, kHeadsPerKv);
    state.shape.ordinals = 6;
    state.window_rows = 8;
    for (LayerState::Head& head : state.heads) {
      for (size_t i = 0; i < head.window.size(); ++i) head.window[i] = fill[i % fill.size()];
      for (size_t i = 0; i < head.mass.size(); ++i) head.mass[i] = fill[i % fill.size()];
      std::fill(head.queries.begin(), head.queries.end(), 5);
    }
    ASSERT_NO_FATAL_FAILURE(state.run(*policy_));
    ASSERT_NO_FATAL_FAILURE(expect_protected(state, *policy_, 0));
    EXPECT_LE(stored(state), static_cast<size_t>(policy_->most_tokens(state.shape, 200)));
    for (int step = 0; step < 3; ++step) {
      ASSERT_NO_FATAL_FAILURE(state.run(*policy_, Moment::kBeforeToken));
      ASSERT_NO_FATAL_FAILURE(expect_protected(state, *policy_, 1));
      for (LayerState::Head& head : state.heads) head.append(state.length);
      ++state.length;
    }
  }
}

TEST_P(EveryPolicy, KeepsAllOfTinyPrompts) {
  for (const int64_t n : {0, 1, 2, 5, 12, 17}) {
    LayerState state = scored(Prompt(n, 9), policy_->needs(), {1});
    const Protection kept = policy_->protection(state.shape, n);
    if (n > kept.sinks + kept.window) continue;
    EXPECT_TRUE(state.decide(*policy_).empty()) << n;
  }
  LayerState one = scored(Prompt(1, 9), policy_->needs(), {1});
  EXPECT_TRUE(one.decide(*policy_).empty());
}

// A second prompt meets heads that have kept different tokens.
TEST_P(EveryPolicy, DecidesAgainAfterASecondPrompt) {
  Lcg random(23);
  LayerState state = scored(Prompt(200, 10), policy_->needs(), {200});
  state.run(*policy_);
  for (int t = 0; t < 60; ++t) decode_one(state, random);
  state.prompt_length = state.length;
  for (LayerState::Head& head : state.heads) {
    head.window.resize(head.positions.size() * kHeadsPerKv);
    for (float& s : head.window) s = static_cast<float>(std::pow(random.uniform(), 4));
  }
  state.window_rows = 3;  // a short second prompt
  ASSERT_NO_FATAL_FAILURE(state.run(*policy_));
  ASSERT_NO_FATAL_FAILURE(expect_protected(state, *policy_, 0));
  EXPECT_LE(stored(state), static_cast<size_t>(policy_->most_tokens(state.shape, state.length)));
}

// Parameters anywhere in their ranges: refused in words, or what is protected stays.
TEST_P(EveryPolicy, TakesAnyParametersInRange) {
  Lcg random(31);
  int made = 0;
  for (int round = 0; round < 100; ++round) {
    PolicySpec spec = GetParam();
    for (const PolicyParameter& parameter : info().parameters) {
      const double draw = random.uniform();
      if (parameter.kind == PolicyParameter::Kind::kChoice || random.uniform() < 0.7) continue;
      // Small numbers as often as large ones.
      double value = parameter.low + std::pow(draw, 8) * (parameter.high - parameter.low);
      if (parameter.kind == PolicyParameter::Kind::kInteger) value = std::floor(value);
      spec.values[parameter.name] = value;
    }
    if (spec.values.contains("tokens")) spec.values.erase("keep");
    std::unique_ptr<Policy> policy;
    try {
      policy = make_policy(spec);
    } catch (const Error& error) {
      EXPECT_EQ(error.status(), Status::kInvalidArgument) << error.what();
      continue;
    }
    ++made;
    const auto n = static_cast<int64_t>(1 + 400 * random.uniform());
    LayerState state(n, 2, 2);
    state.shape.ordinal = static_cast<int>(6 * random.uniform());
    state.shape.layer = state.shape.ordinal;
    state.shape.layers = state.shape.ordinals = 6;
    state.window_rows = static_cast<int>(std::clamp<int64_t>(policy->needs().window_queries, 1, n));
    for (LayerState::Head& head : state.heads) {
      for (float& s : head.window) s = static_cast<float>(std::pow(random.uniform(), 6));
      for (float& s : head.mass) s = static_cast<float>(std::pow(random.uniform(), 6));
      std::fill(head.queries.begin(), head.queries.end(), 3);
    }
    ASSERT_NO_FATAL_FAILURE(state.run(*policy)) << to_string(spec);
    ASSERT_NO_FATAL_FAILURE(expect_protected(state, *policy, 0)) << to_string(spec);
    EXPECT_LE(stored(state), static_cast<size_t>(policy->most_tokens(state.shape, n))) << to_string(spec);
    for (int step = 0; step < 3; ++step) {
      ASSERT_NO_FATAL_FAILURE(state.run(*policy, Moment::kBeforeToken)) << to_string(spec);
      ASSERT_NO_FATAL_FAILURE(expect_protected(state, *policy, 1)) << to_string(spec);
      decode_one(state, random);
    }
  }
  EXPECT_GT(made, 10);
}

TEST_P(EveryPolicy, AllocatesNothingWhileDecoding) {
  Lcg random(29);
  LayerState state = scored(Prompt(300, 11), policy_->needs(), {300});
  PolicyScratch scratch;
  Decision decision;
  policy_->decide(state.view(), scratch, decision);
  state.apply(decision);
  decision = {};
  for (int step = 0; step < 30; ++step) {
    const PolicyView view = state.view(Moment::kBeforeToken);
    const int64_t before = allocations;
    policy_->decide(view, scratch, decision);
    if (step > 0) {  // the first may
      EXPECT_EQ(allocations, before) << step;
    }
    state.apply(decision);
    decode_one(state, random);
  }
}

TEST_P(EveryPolicy, LeavesSlidingWindowsAlone) {
  LayerState state(100, 1);
  state.shape.sliding_window = 64;
  EXPECT_FALSE(Policy::governs(state.shape));
  try {
    state.decide(*policy_);
    ADD_FAILURE() << "decided";
  } catch (const Error& error) {
    EXPECT_EQ(error.status(), Status::kUnsupported);
    EXPECT_NE(std::string(error.what()).find("sliding window of 64"), std::string::npos);
  }
}

TEST_P(EveryPolicy, RefusesViewsThatLackWhatItNeeds) {
  const Needs needs = policy_->needs();
  const auto refused = [&](auto spoil) {
    LayerState state = scored(Prompt(100, 12), needs, {100});
    PolicyView view = state.view();
    spoil(state, view);
    PolicyScratch scratch;
    Decision decision;
    try {
      policy_->decide(view, scratch, decision);
    } catch (const Error& error) {
      return error.status() == Status::kInternal;
    }
    return false;
  };
  EXPECT_TRUE(refused([](LayerState&, PolicyView& view) { view.heads = view.heads.first(1); }));
  EXPECT_TRUE(refused([](LayerState&, PolicyView& view) { view.prompt_length = 5; }));
  EXPECT_TRUE(refused([](LayerState& state, PolicyView&) { state.views[0].tiers = {}; }));
  EXPECT_EQ(refused([](LayerState& state, PolicyView&) { state.views[0].mass = {}; }), needs.mass != MassReduce::kNone);
  EXPECT_EQ(refused([](LayerState& state, PolicyView&) { state.views[1].window = {}; }), needs.window_queries > 0);
  EXPECT_EQ(refused([](LayerState&, PolicyView& view) { view.window_rows = 0; }), needs.window_queries > 0);
}

TEST_P(EveryPolicy, MovesOnlyWithALowTier) {
  LayerState state = scored(Prompt(512, 13), policy_->needs(), {512});
  bool moved = false;
  for (const HeadDecision& head : state.decide(*policy_).heads) moved |= !head.move.empty();
  EXPECT_EQ(moved, policy_->has_low_tier());
}

// "2_snapkv_avg": its number among all, its name and its choices.
std::string spec_name(const testing::TestParamInfo<PolicySpec>& test) {
  std::string name = std::to_string(test.index) + "_" + test.param.name;
  for (const PolicyInfo& policy : policies()) {
    if (policy.name != test.param.name) continue;
    for (const PolicyParameter& parameter : policy.parameters) {
      const auto it = test.param.values.find(parameter.name);
      if (!parameter.choices.empty() && it != test.param.values.end()) name += "_" + std::get<std::string>(it->second);
    }
  }
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
}

INSTANTIATE_TEST_SUITE_P(Policies, EveryPolicy, testing::ValuesIn(all_specs()), spec_name);

}  // namespace
}  // namespace kvmix
