#include <gtest/gtest.h>

#include "rank/published.h"

namespace kvmix::rank::testing {
namespace {

void expect_near(double got, double wanted) { EXPECT_NEAR(got, wanted, 1e-5 * std::abs(wanted) + 6e-7); }

TEST(Lorc, SingularValuesAndConditions) {
  const Published d;
  const Vector s = singular_values(d.wk);
  const double first[] = {2.501433, 2.087885, 1.874766, 1.562637};
  for (int i = 0; i < 4; ++i) expect_near(s[i], first[i]);
  expect_near(s[14], 0.012118);
  expect_near(s[15], 0.002295);
  expect_near(std::exp(log_condition(s)), 1089.9965);
  expect_near(std::exp(log_condition(singular_values(d.wv))), 35.34882);
}

TEST(Lorc, TruncatedWeights) {
  const Published d;
  struct Row {
    const Matrix& w;
    int rank;
    double weights, outputs;
  };
  for (const Row& row : {Row{d.wk, 4, 0.407480, 0.385101},
                         {d.wk, 8, 0.033999, 0.036179},
                         {d.wk, 12, 0.008867, 0.008720},
                         {d.wv, 4, 0.636471, 0.728102},
                         {d.wv, 8, 0.317341, 0.276003},
                         {d.wv, 12, 0.087037, 0.142138}}) {
    const Factors f = plain_factors(row.w, row.rank);
    const Matrix other = f.up * f.down;
    expect_near(relative(row.w, other), row.weights);
    expect_near(std::sqrt(f.energies.tail(16 - row.rank).sum()) / row.w.norm(), row.weights);
    expect_near(output_error(d.x, row.w, other), row.outputs);
  }
  for (const auto& [w, error] : {std::pair{d.wk, 0.012741}, {d.wv, 0.110500}}) {
    const Factors f = whitened_factors(w, d.gram, 8);
    expect_near(output_error(d.x, w, f.up * f.down), error);
  }
}

TEST(Lorc, AbsorptionWithoutRotation) {
  const Published d;
  const Factors f = plain_factors(d.wk, 8);
  const Vector q = d.wq.topRows(4) * d.x.row(47).transpose(), absorbed = f.up.topRows(4).transpose() * q;
  const double wanted[] = {0.053095, 0.456933, -0.122865};
  for (int t = 0; t < 3; ++t) {
    const Vector z = f.down * d.x.row(t).transpose();
    EXPECT_NEAR(absorbed.dot(z), q.dot(f.up.topRows(4) * z), 1e-12);
    EXPECT_NEAR(absorbed.dot(z), wanted[t], 1e-6);
  }
}

TEST(Lorc, WithRotationKeysAreRebuilt) {
  const Published d;
  const Factors f = plain_factors(d.wk, 8);
  const Matrix w = f.up * f.down;
  const double wanted[] = {0.136679, -0.034769, -0.402646};
  Matrix exact(8, 48), got(8, 48), absorbed(8, 48);
  for (int h = 0; h < 8; ++h) {
    exact.row(h) = scores(d, d.wk, h, 1.0).transpose();
    got.row(h) = scores(d, w, h, 1.0).transpose();
    const Vector q = f.up.middleRows(h / 2 * 4, 4).transpose() * (d.wq.middleRows(h * 4, 4) * d.x.row(47).transpose());
    absorbed.row(h) = (d.x * f.down.transpose() * q).transpose();
  }
  for (int t = 0; t < 3; ++t) EXPECT_NEAR(got(0, t), wanted[t], 1e-6);
  expect_near(relative(exact, got), 0.038035);
  EXPECT_NEAR(relative(exact, absorbed), 1.4251, 1e-4);  // what absorbing in spite of rotation would be
}

TEST(Lorc, ScheduleFromConditionNumbers) {
  const auto logs = [](std::vector<double> v) {
    for (double& x : v) x = std::log(x);
    return v;
  };
  const std::vector<double> sums = cumulative_log_conditions(logs({10, 5, 8, 2}), logs({4, 2, 3, 2}));
  const double wanted[] = {10.555813, 6.866933, 4.564348, 1.386294}, dims[] = {128, 89.379386, 65.272540, 32};
  const std::vector<double> got = progressive_dims(sums, 128, 32);
  for (size_t l = 0; l < 4; ++l) {
    EXPECT_NEAR(sums[l], wanted[l], 1e-6);
    EXPECT_NEAR(got[l], dims[l], 1e-5);
  }
  const std::vector<double> even(5, std::log(7.0)), ramp = progressive_dims(cumulative_log_conditions(even, even), 128, 32);
  for (size_t l = 0; l < 5; ++l) EXPECT_NEAR(ramp[l], 128 - 24.0 * static_cast<double>(l), 1e-9);
}

TEST(Lorc, ManyBadlyConditionedLayersStayFinite) {
  const std::vector<double> logs(80, std::log(1e4)), sums = cumulative_log_conditions(logs, logs);
  for (const double dim : progressive_dims(sums, 128, 32)) EXPECT_TRUE(std::isfinite(dim));
  EXPECT_NEAR(sums[0], 160 * std::log(1e4), 1e-6);
}

TEST(Lorc, RanksMeetTheBudgetAndFallWithDepth) {
  const std::vector<double> logs(30, std::log(50.0)), sums = cumulative_log_conditions(logs, logs);
  for (const double keep : {0.3, 0.5, 0.75, 1.0}) {
    const std::vector<int> ranks = progressive_ranks(sums, 192, keep, 16);
    int total = 0;
    for (size_t l = 0; l < ranks.size(); ++l) {
      total += ranks[l];
      EXPECT_EQ(ranks[l] % 16, 0);
      EXPECT_LE(ranks[l], ranks[l == 0 ? 0 : l - 1]) << keep;
    }
    EXPECT_LE(total, keep * 192 * 30 + 1e-9) << keep;
    EXPECT_GT(total, keep * 192 * 30 - 16 * 30) << keep;
  }
}

}  // namespace
}  // namespace kvmix::rank::testing
