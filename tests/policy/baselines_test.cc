// StreamingLLM, H2O, SnapKV, PyramidKV and Ada-KV on small numbers worked out by hand or by the papers' code.
#include <cfloat>
#include <cmath>

#include "policy/layer_state.h"
#include "policy/pyramidkv.h"
#include "policy/select.h"

namespace kvmix {
namespace {

using Values = std::map<std::string, PolicyValue>;
using Positions = std::vector<int64_t>;

const std::vector<double> kVotes = {9, 1, 1, 1, 6, 1, 1, 2, 1, 7, 1, 1};

// The votes for old tokens, then a window of two that gets none.
LayerState voted(const std::vector<double>& votes, int window = 2) {
  LayerState state(static_cast<int64_t>(votes.size()) + window, 1);
  std::copy(votes.begin(), votes.end(), state.heads[0].window.begin());
  return state;
}

TEST(Pooling, Average) {
  std::vector<double> out;
  pool(kVotes, Pooling::kAverage, 5, out);
  const std::vector<double> expected = {2.2, 2.4, 3.6, 2.0, 2.0, 2.2, 2.2, 2.4, 2.4, 2.4, 2.0, 1.8};
  for (size_t i = 0; i < expected.size(); ++i) EXPECT_DOUBLE_EQ(out[i], expected[i]) << i;
}

TEST(Pooling, Maximum) {
  std::vector<double> out;
  pool(kVotes, Pooling::kMax, 3, out);
  EXPECT_EQ(out, (std::vector<double>{9, 9, 1, 6, 6, 6, 2, 2, 7, 7, 7, 1}));
}

TEST(SnapKv, KeepsTheBestPooledVotes) {
  const auto kept = [](const Values& more, int tokens) {
    Values values = {{"tokens", tokens + 2.0}, {"window", 2.0}};
    values.insert(more.begin(), more.end());
    LayerState state = voted(kVotes);
    state.run(*make_policy({"snapkv", values}));
    return state.kept(0);
  };
  // Token 0 has the most votes, but the zeros before it count.
  EXPECT_EQ(kept({{"pooling", "avg"}, {"kernel", 5.0}}, 5), (Positions{1, 2, 7, 8, 9, 12, 13}));
  EXPECT_EQ(kept({{"pooling", "max"}, {"kernel", 3.0}}, 5), (Positions{0, 1, 8, 9, 10, 12, 13}));
  EXPECT_EQ(kept({{"pooling", "none"}}, 4), (Positions{0, 4, 7, 9, 12, 13}));
}

TEST(SnapKv, AveragesTheQueryHeadsOfAKvHead) {
  constexpr int kOld = 40, kWindow = 4, kCount = kOld + kWindow;
  Lcg random(5);
  LayerState grouped(kCount, 2, 2), averaged(kCount, 2, 1);
  for (int h = 0; h < 2; ++h) {
    for (int i = 0; i < kOld; ++i) {
      const auto a = static_cast<float>(random.uniform()), b = static_cast<float>(random.uniform());
      grouped.heads[h].window[i] = a;
      grouped.heads[h].window[kCount + i] = b;
      averaged.heads[h].window[i] = (a + b) / 2;
    }
  }
  const auto policy = make_policy({"snapkv", {{"tokens", 14.0}, {"window", 4.0}}});
  grouped.run(*policy);
  averaged.run(*policy);
  for (int h = 0; h < 2; ++h) {
    EXPECT_EQ(grouped.kept(h).size(), 14u);
    EXPECT_EQ(grouped.kept(h), averaged.kept(h));
  }
  EXPECT_NE(grouped.kept(0), grouped.kept(1));
}

TEST(SnapKv, NanIsNoVote) {
  EXPECT_EQ(finite(std::nanf("")), 0);
  EXPECT_EQ(finite(-INFINITY), -static_cast<double>(FLT_MAX));
  LayerState state(9, 1);
  state.heads[0].window = {NAN, .1f, NAN, .3f, 0, NAN, .2f, INFINITY, 0};
  state.run(*make_policy({"snapkv", {{"tokens", 5.0}, {"window", 1.0}, {"pooling", "none"}}}));
  EXPECT_EQ(state.kept(0), (Positions{1, 3, 6, 7, 8}));
}

struct PyramidCase {
  int64_t capacity, window;
  std::vector<int64_t> first;  // the first layers' old tokens
  int64_t last, sum;
};

TEST(PyramidKv, BudgetsOfAllLayers) {
  const PyramidCase cases[] = {{128, 8, {234, 227}, 17, 4016},
                               {2048, 8, {3978, 3853}, 103, 65296},
                               {2048, 32, {3932, 3809}, 119, 64816},
                               {512, 32, {936, 907}, 37, 15568}};
  for (const PyramidCase& c : cases) {
    const Pyramid pyramid{.window = c.window};
    const int64_t step = c.first[0] - c.first[1];
    int64_t sum = 0;
    for (int layer = 0; layer < 32; ++layer) {
      const int64_t old = pyramid.tokens(static_cast<double>(c.capacity), 8192, layer, 32) - c.window;
      EXPECT_EQ(old, c.first[0] - layer * step) << c.capacity << " layer " << layer;
      sum += old;
      if (layer == 31) {
        EXPECT_EQ(old, c.last);
      }
    }
    EXPECT_EQ(sum, c.sum);
  }
}

TEST(PyramidKv, PublishedCapsAtShorterPrompts) {
  const Pyramid pyramid{.window = 8};
  EXPECT_EQ(pyramid.tokens(128, 8000, 0, 32), 234 + 8);
  EXPECT_EQ(pyramid.tokens(128, 8000, 1, 32), 227 + 8);
  EXPECT_EQ(pyramid.tokens(128, 8000, 31, 32), 17 + 8);
  for (int layer = 0; layer < 32; ++layer) {
    EXPECT_EQ(pyramid.tokens(2048, 3000, layer, 32), 2040 + 8);
    EXPECT_EQ(pyramid.tokens(2048, 2047, layer, 32), 2047);
  }
}

TEST(PyramidKv, LayersKeepTheirBudgets) {
  const auto policy = make_policy({"pyramidkv", {{"tokens", 128.0}, {"window", 8.0}}});
  Lcg random(3);
  for (int layer = 0; layer < 32; layer += 5) {
    LayerState state(8000, 1);
    state.shape.layer = 2 * layer;  // every other layer of the model has a sliding window
    state.shape.layers = 64;
    state.shape.ordinal = layer;
    state.shape.ordinals = 32;
    for (float& vote : state.heads[0].window) vote = static_cast<float>(random.uniform());
    state.run(*policy);
    EXPECT_EQ(state.kept(0).size(), static_cast<size_t>(234 - 7 * layer + 8));
    EXPECT_EQ(policy->most_tokens(state.shape, 8000), 234 - 7 * layer + 8);
  }
}

// Attention rows over the tokens that are there, and what is left after each.
TEST(H2o, Trace) {
  const auto policy = make_policy({"h2o", {{"tokens", 4.0}, {"recent", 2.0}}});
  LayerState state(1, 1);
  const auto attend = [&](const std::vector<float>& row) {
    LayerState::Head& head = state.heads[0];
    ASSERT_EQ(row.size(), head.mass.size());
    for (size_t i = 0; i < row.size(); ++i) head.mass[i] += row[i], ++head.queries[i];
  };
  attend({1});
  state.run(*policy);
  const std::vector<std::vector<float>> rows = {
      {.6f, .4f}, {.5f, .3f, .2f}, {.5f, .2f, .1f, .2f}, {.4f, .1f, .3f, .1f, .1f}, {.3f, .1f, .2f, .2f, .2f}};
  const std::vector<Positions> left = {{0, 1}, {0, 1, 2}, {0, 1, 2, 3}, {0, 1, 3, 4}, {0, 1, 4, 5}};
  for (size_t t = 0; t < rows.size(); ++t) {
    state.heads[0].append(state.length++);
    attend(rows[t]);
    state.run(*policy, Moment::kBeforeToken);
    EXPECT_EQ(state.kept(0), left[t]) << "after token " << t + 1;
  }
  const std::vector<float> mass = {3.3f, 1.1f, .3f, .2f};
  for (size_t i = 0; i < mass.size(); ++i) EXPECT_NEAR(state.heads[0].mass[i], mass[i], 1e-6);
}

TEST(H2o, FractionsOfTheBudgetAreRecent) {
  LayerState state(100, 1);
  for (int i = 0; i < 100; ++i) state.heads[0].mass[i] = static_cast<float>(100 - i);
  state.run(*make_policy({"h2o", {{"keep", 0.2}}}));
  EXPECT_EQ(state.kept(0), join(range(0, 10), range(90, 100)));
}

TEST(H2o, TheLowerOfEqualTokensStays) {
  const auto policy = make_policy({"h2o", {{"tokens", 4.0}, {"recent", 1.0}}});
  LayerState state(4, 1);
  state.heads[0].append(state.length++);
  state.heads[0].mass = {2, 1, 1, 1, 0};
  state.run(*policy, Moment::kBeforeToken);
  EXPECT_EQ(state.kept(0), (Positions{0, 1, 2, 4}));
  LayerState prompt(6, 1);
  prompt.heads[0].mass = {2, 1, 1, 1, 1, 0};
  prompt.run(*policy);
  EXPECT_EQ(prompt.kept(0), (Positions{0, 1, 2, 5}));
}

TEST(H2o, MeanIsPerQueryThatSawTheToken) {
  LayerState state(6, 1);
  state.heads[0].mass = {3, 3, 3, 3, 1, 1};
  state.heads[0].queries = {6, 5, 4, 3, 2, 1};
  state.run(*make_policy({"h2o", {{"tokens", 3.0}, {"recent", 0.0}, {"score", "mean"}}}));
  EXPECT_EQ(state.kept(0), (Positions{2, 3, 5}));
}

TEST(Streaming, SinksAndTheNewest) {
  LayerState state(20, 2);
  const auto policy = make_policy({"streaming", {{"tokens", 10.0}}});
  state.run(*policy);
  EXPECT_EQ(state.kept(0), join(range(0, 4), range(14, 20)));
  // Never more than the budget, the new token included; all keep their positions.
  for (int64_t t = 20; t < 40; ++t) {
    state.run(*policy, Moment::kBeforeToken);
    for (LayerState::Head& head : state.heads) head.append(t);
    ++state.length;
    EXPECT_EQ(state.kept(1), join(range(0, 4), range(t - 5, t + 1)));
  }
  LayerState appended(20, 1);
  const auto once = make_policy({"streaming", {{"tokens", 10.0}, {"decode", "append"}}});
  EXPECT_FALSE(once->needs().every_step);
  appended.run(*once);
  appended.run(*once, Moment::kBeforeToken);
  EXPECT_EQ(appended.kept(0).size(), 10u);
}

// Two heads of eight old tokens each and a budget of three old ones a head.
LayerState two_heads() {
  LayerState state(9, 2);
  state.heads[0].window = {9, 8, 7, 6, 1, 1, 1, 1, 0};
  state.heads[1].window = {3, 3, 2, 2, 2, 2, 2, 2, 0};
  return state;
}

TEST(AdaKv, SharesAddUp) {
  // Counts are 4 and 2: rounding 0.8 * count + floor(0.6) for itself would keep 5.
  for (const char* shares : {"blend", "guarantee"}) {
    LayerState state = two_heads();
    state.run(*make_policy({"adakv", {{"tokens", 4.0}, {"window", 1.0}, {"pooling", "none"}, {"shares", shares}}}));
    EXPECT_EQ(state.kept(0), (Positions{0, 1, 2, 3, 8})) << shares;
    EXPECT_EQ(state.kept(1), (Positions{0, 1, 8})) << shares;
  }
}

TEST(AdaKv, ASafeShareOfOneIsUniform) {
  for (const char* shares : {"blend", "guarantee"}) {
    LayerState state = two_heads();
    state.run(
        *make_policy({"adakv", {{"tokens", 4.0}, {"window", 1.0}, {"pooling", "none"}, {"safe", 1.0}, {"shares", shares}}}));
    EXPECT_EQ(state.kept(0), (Positions{0, 1, 2, 8})) << shares;
    EXPECT_EQ(state.kept(1), (Positions{0, 1, 2, 8})) << shares;
  }
}

TEST(AdaKv, TheSafeShareIsMixedIn) {
  const std::pair<double, size_t> cases[] = {
      {0, 12}, {0.25, 11}, {0.5, 9}, {0.75, 8}, {1, 6}};  // of 12, all best votes are head 0's
  for (const auto& [safe, old] : cases) {
    LayerState state(31, 2);
    for (int i = 0; i < 30; ++i) state.heads[0].window[i] = 1, state.heads[1].window[i] = 0.5f;
    state.run(*make_policy({"adakv", {{"tokens", 7.0}, {"window", 1.0}, {"pooling", "none"}, {"safe", safe}}}));
    EXPECT_EQ(state.kept(0).size(), old + 1) << safe;
    EXPECT_EQ(state.kept(1).size(), 12 - old + 1) << safe;
  }
}

TEST(LargestRemainder, SumsAreExactWithinLimits) {
  EXPECT_EQ(largest_remainder(std::vector<double>{3.2, 1.6}, std::vector<int64_t>{9, 9}, 6), (std::vector<int64_t>{4, 2}));
  EXPECT_EQ(largest_remainder(std::vector<double>{1.5, 1.5}, std::vector<int64_t>{9, 9}, 3), (std::vector<int64_t>{2, 1}));
  EXPECT_EQ(largest_remainder(std::vector<double>{5, 1}, std::vector<int64_t>{2, 9}, 6), (std::vector<int64_t>{2, 4}));
  EXPECT_EQ(largest_remainder(std::vector<double>{5, 1}, std::vector<int64_t>{2, 3}, 6), (std::vector<int64_t>{2, 3}));
}

}  // namespace
}  // namespace kvmix
