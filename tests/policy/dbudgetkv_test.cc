// DBudgetKV on the published vector, with both norms.
#include "policy/dbudgetkv.h"

#include "policy/layer_state.h"

namespace kvmix {
namespace {

const std::vector<std::vector<double>> kRows = {{60, 1, 1, 1, 1, 2, 1, 3, 1, 4, 6, 19},
                                                {40, 2, 2, 2, 1, 1, 2, 2, 8, 4, 10, 26}};

// One KV head of two query heads, or two KV heads of one: the norm is the mean over all query heads.
LayerState vector_state(int kv_heads) {
  LayerState state(12, kv_heads, 2 / kv_heads);
  state.window_rows = 1;
  state.shape.layer = 2;
  state.shape.layers = 8;
  for (size_t q = 0; q < 2; ++q) {
    LayerState::Head& head = state.heads[kv_heads == 2 ? q : 0];
    for (size_t i = 0; i < 12; ++i) head.window[(kv_heads == 2 ? 0 : q * 12) + i] = static_cast<float>(kRows[q][i] / 100);
  }
  return state;
}

TEST(DBudgetKv, Losses) {
  std::vector<double> rows;
  for (const std::vector<double>& row : kRows) {
    for (const double w : row) rows.push_back(w / 100);
  }
  const std::vector<double> without = {0, .000821, .003092, .004936, .010685, .033412, .047039, .102516};
  const std::vector<double> all = {0, .000158, .000525, .000950, .001931, .007725, .010283, .021930};
  for (const bool sinks_count : {false, true}) {
    const std::vector<double> losses = norm_losses(rows, 12, 4, sinks_count);
    ASSERT_EQ(losses.size(), 8u);
    for (size_t j = 0; j < 8; ++j) EXPECT_NEAR(losses[j], (sinks_count ? all : without)[j], 1e-5) << sinks_count << j;
  }
}

TEST(DBudgetKv, CutsAtThresholds) {
  const std::tuple<double, int64_t, int64_t> cases[] = {{0.005, 3, 4}, {0.01, 3, 5}, {0.02, 4, 6}, {0.05, 6, 7}, {0.2, 7, 7}};
  for (const auto& [threshold, without, all] : cases) {
    for (const int kv_heads : {1, 2}) {
      for (const bool sinks_count : {false, true}) {
        LayerState state = vector_state(kv_heads);
        state.run(*make_policy({"dbudgetkv", {{"threshold", threshold}, {"norm", sinks_count ? "all" : "without-sinks"}}}));
        const int64_t cut = sinks_count ? all : without;
        for (int h = 0; h < kv_heads; ++h) {
          EXPECT_EQ(state.kept(h), join(range(0, 4), range(4 + cut, 12))) << threshold << " " << sinks_count;
        }
      }
    }
  }
}

TEST(DBudgetKv, UniformAttention) {
  for (const char* norm : {"without-sinks", "all"}) {
    LayerState state(1004, 1);
    state.shape.layer = 2;
    state.shape.layers = 3;
    std::fill(state.heads[0].window.begin(), state.heads[0].window.end(), 1.0f / 1004);
    state.run(*make_policy({"dbudgetkv", {{"norm", norm}}}));
    EXPECT_EQ(state.kept(0), join(range(0, 4), range(23, 1004))) << norm;
  }
}

TEST(DBudgetKv, FirstLayersAreFrozen) {
  for (int layer = 0; layer < 3; ++layer) {
    LayerState state = vector_state(1);
    state.shape.layer = layer;
    state.run(*make_policy({"dbudgetkv", {}}));
    EXPECT_EQ(state.kept(0).size(), layer < 2 ? 12u : 9u);
  }
}

TEST(DBudgetKv, AllOnTheLastTokenDropsTheOthers) {
  LayerState state(200, 2);
  state.shape.layer = 5;
  for (LayerState::Head& head : state.heads) head.window[199] = 1;
  state.run(*make_policy({"dbudgetkv", {}}));
  EXPECT_EQ(state.kept(0), join(range(0, 4), {199}));
}

TEST(DBudgetKv, TheBudgetFallsWithTheThreshold) {
  Lcg random(12);
  LayerState prompt(400, 2, 2);
  prompt.shape.layer = 3;
  for (LayerState::Head& head : prompt.heads) {
    for (float& w : head.window) w = static_cast<float>(random.uniform());
  }
  size_t before = 400;
  for (const double threshold : {0.0, 0.002, 0.01, 0.05, 0.2, 0.9}) {
    LayerState state = prompt;
    state.run(*make_policy({"dbudgetkv", {{"threshold", threshold}}}));
    EXPECT_LE(state.kept(0).size(), before);
    before = state.kept(0).size();
  }
  EXPECT_LT(before, 20u);
}

}  // namespace
}  // namespace kvmix
