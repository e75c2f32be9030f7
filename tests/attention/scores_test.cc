// The reference of attention's scores against double precision.
#include "attention/scores.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <random>
#include <vector>

namespace kvmix {
namespace {

constexpr int kHeads = 3, kDim = 32;

struct Case {
  std::vector<float> keys, q;
  std::vector<int64_t> positions;
  ScoreKeys head(float softcap = 0) const {
    return {.heads_per_kv = kHeads, .head_dim = kDim, .scale = 0.2f, .softcap = softcap, .keys = keys, .positions = positions};
  }
};

// Keys at positions with gaps, as after drops.
Case make_case(size_t n) {
  std::mt19937 random(static_cast<unsigned>(n));
  std::normal_distribution<float> normal;
  Case c;
  for (size_t i = 0; i < n * kDim; ++i) c.keys.push_back(normal(random));
  for (int i = 0; i < kHeads * kDim; ++i) c.q.push_back(normal(random));
  for (size_t i = 0; i < n; ++i) c.positions.push_back(static_cast<int64_t>(i < 5 ? i : 3 * i));
  return c;
}

TEST(ScoreRow, MatchesDoublePrecision) {
  for (const float softcap : {0.0f, 5.0f}) {
    for (const size_t n : {1u, 7u, 300u}) {
      const Case c = make_case(n);
      const int64_t position = static_cast<int64_t>(2 * n);
      std::vector<float> row(kHeads * n, -1);
      score_row(c.head(softcap), c.q.data(), position, row);
      for (int h = 0; h < kHeads; ++h) {
        std::vector<double> exact(n, 0);
        double sum = 0;
        for (size_t i = 0; i < n; ++i) {
          if (c.positions[i] > position) continue;
          double dot = 0;
          for (int d = 0; d < kDim; ++d) dot += static_cast<double>(c.q[h * kDim + d]) * c.keys[i * kDim + d];
          dot *= 0.2f;
          sum += exact[i] = std::exp(softcap > 0 ? softcap * std::tanh(dot / softcap) : dot);
        }
        for (size_t i = 0; i < n; ++i) EXPECT_NEAR(row[h * n + i], exact[i] / sum, 1e-5 * exact[i] / sum) << i;
      }
    }
  }
}

TEST(ScoreRow, HugeScoresStayFinite) {
  Case c = make_case(20);
  for (float& x : c.keys) x *= 1e4f;
  std::vector<float> row(kHeads * 20);
  score_row(c.head(), c.q.data(), 100, row);
  for (int h = 0; h < kHeads; ++h) {
    EXPECT_NEAR(std::accumulate(row.begin() + h * 20, row.begin() + (h + 1) * 20, 0.0), 1, 1e-5);
  }
}

TEST(ScoreRow, IsEmptyWhereNothingIsSeen) {
  const Case c = make_case(6);
  std::vector<float> row(kHeads * 6, 3);
  score_row(c.head(), c.q.data(), -1, row);
  EXPECT_EQ(row, std::vector<float>(kHeads * 6, 0));
}

// A later key changes nothing for earlier queries: H2O's sums see no future.
TEST(ScoreRow, IsCausal) {
  Case c = make_case(30);
  std::vector<float> before(kHeads * 30), after(kHeads * 30);
  const int64_t last = c.positions.back();
  score_row(c.head(), c.q.data(), last - 1, before);
  for (int d = 0; d < kDim; ++d) c.keys[29 * kDim + d] = NAN;
  score_row(c.head(), c.q.data(), last - 1, after);
  EXPECT_EQ(before, after);
}

TEST(Mass, ReducesOverQueryHeads) {
  const std::vector<float> row = {.1f, .2f, .7f, .5f, .4f, .1f};
  std::vector<float> mean = {1, 0, 0}, most = {1, 0, 0}, window = row;
  add_mean_mass(row, mean);
  add_max_mass(row, most);
  EXPECT_FLOAT_EQ(mean[0], 1.3f);
  EXPECT_FLOAT_EQ(mean[2], .4f);
  EXPECT_EQ(most, (std::vector<float>{1.5f, .4f, .7f}));
  add_to_window(std::vector<float>{.3f, .3f, .4f, .5f, .5f, 0}, window);
  EXPECT_FLOAT_EQ(window[0], .4f);
  EXPECT_FLOAT_EQ(window[3], 1);
  std::vector<float> out(3);
  // The mean of sums is the sum of means; the largest sum is not the sum of the largest.
  mean_of_window(window, out);
  EXPECT_FLOAT_EQ(out[0], .7f);
  max_of_window(window, out);
  EXPECT_FLOAT_EQ(out[0], 1);
  EXPECT_FLOAT_EQ(out[1], .9f);
  EXPECT_FLOAT_EQ(out[2], 1.1f);
}

TEST(Mass, CountsQueriesThatSeeTheKey) {
  const Case c = make_case(8);  // positions 0..4, 15, 18, 21
  std::vector<int32_t> counted(8, 0);
  for (const int64_t position : {4, 15, 16}) count_query(c.head(), position, counted);
  EXPECT_EQ(counted, (std::vector<int32_t>{3, 3, 3, 3, 3, 2, 0, 0}));
}

}  // namespace
}  // namespace kvmix
