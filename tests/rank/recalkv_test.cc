#include <gtest/gtest.h>

#include <Eigen/Cholesky>

#include "rank/published.h"

namespace kvmix::rank::testing {
namespace {

using Groups = std::vector<std::vector<int>>;
void expect_near(double got, double wanted) { EXPECT_NEAR(got, wanted, 1e-5 * std::abs(wanted) + 6e-7); }

Matrix moments(const Published& d) { return d.wk * d.gram * d.wk.transpose(); }

// Second moments of the outputs about their mean over tokens.
Matrix centred_moments(const Published& d) {
  const Vector mean = d.x.colwise().mean();
  return d.wk * (d.gram - 48 * mean * mean.transpose()) * d.wk.transpose();
}

void expect_pairs(const Matrix& similarity, const double (&wanted)[6]) {
  int i = 0;
  for (int a = 0; a < 4; ++a) {
    for (int b = a + 1; b < 4; ++b) EXPECT_NEAR(similarity(a, b), wanted[i++], 1.5e-6) << a << " " << b;
  }
}

TEST(Recalkv, GroupsOfSimilarHeadsLoseLess) {
  const Published d;
  const auto error = [&](const Groups& groups, int rank) {
    return output_error(d.x, d.wk,
                        rebuilt(d.wk, groups, [&](const Matrix& part) { return whitened_factors(part, d.gram, rank); }));
  };
  const double before[] = {0.285278, 0.152741, 0.056228}, after[] = {0.251387, 0.017473, 0.006021};
  for (int i = 0; i < 3; ++i) {
    expect_near(error(natural(2), 2 * (i + 1)), before[i]);
    expect_near(error({{1, 3}, {0, 2}}, 2 * (i + 1)), after[i]);
  }
}

TEST(Recalkv, Similarity) {
  const Published d;
  // The reference's convention: rows of W S less their means, S the lower Cholesky factor.
  const Matrix s = d.gram.llt().matrixL();
  Matrix z = d.wk * s;
  z.colwise() -= z.rowwise().mean().eval();
  expect_pairs(head_similarity(z * z.transpose(), 4), {0.943677, 0.998608, 0.944742, 0.941434, 0.999692, 0.942061});
  expect_pairs(head_similarity(moments(d), 4), {0.945758, 0.998575, 0.946779, 0.943470, 0.999686, 0.944066});
  expect_pairs(head_similarity(centred_moments(d), 4), {0.887656, 0.997185, 0.890179, 0.880940, 0.999311, 0.883048});
}

Matrix eight(const std::vector<std::tuple<int, int, double>>& pairs, double rest) {
  Matrix m = Matrix::Constant(8, 8, rest);
  for (const auto& [a, b, value] : pairs) m(a, b) = m(b, a) = value;
  return m;
}

TEST(Recalkv, GreedyRule) {
  const Published d;
  EXPECT_EQ(greedy_groups(head_similarity(centred_moments(d), 4), 2), (Groups{{1, 3}, {0, 2}}));
  // Pairs go to the first group with room, so it may join what is not alike.
  Matrix clusters = eight({}, 0.1);
  clusters.topLeftCorner(4, 4).setConstant(0.9);
  clusters.bottomRightCorner(4, 4).setConstant(0.9);
  clusters(0, 1) = clusters(1, 0) = 0.99;
  clusters(4, 5) = clusters(5, 4) = 0.98;
  EXPECT_EQ(greedy_groups(clusters, 4), (Groups{{0, 1, 4, 5}, {2, 3, 6, 7}}));
  EXPECT_EQ(greedy_groups(eight({{0, 1, .9}, {1, 2, .8}, {5, 6, .7}, {3, 4, .6}}, 0.1), 4),
            (Groups{{0, 1, 2, 5}, {3, 4, 7, 6}}));
}

TEST(Recalkv, ExchangesFindTheClusters) {
  // Outputs of heads 0 to 3, and of 4 to 7, share their two directions.
  Matrix outputs(16, 4);
  for (int h = 0; h < 8; ++h) {
    outputs.middleRows(2 * h, 2).setZero();
    outputs.block(2 * h, h < 4 ? 0 : 2, 2, 2) = uniform(static_cast<uint32_t>(h) + 1, 2, 2) + Matrix::Identity(2, 2);
  }
  Groups groups = improved_groups(outputs * outputs.transpose(), 8, {{0, 1, 4, 5}, {2, 3, 6, 7}}, 2);
  for (std::vector<int>& group : groups) std::sort(group.begin(), group.end());
  std::sort(groups.begin(), groups.end());
  EXPECT_EQ(groups, (Groups{{0, 1, 2, 3}, {4, 5, 6, 7}}));
}

TEST(Recalkv, ReorderedKeysComeBackInTheirPlaces) {
  const Published d;
  const Matrix w = rebuilt(d.wk, {{1, 3}, {0, 2}}, [&](const Matrix& part) { return whitened_factors(part, d.gram, 8); });
  for (int h = 0; h < 8; ++h) EXPECT_LT(relative(scores(d, d.wk, h, 0.5), scores(d, w, h, 0.5)), 1e-12);
  // A bias is added once, at the heads' own places.
  const Vector bias = uniform(9, 16, 1);
  const Matrix keys = (d.x * w.transpose()).rowwise() + bias.transpose();
  EXPECT_LT(relative((d.x * d.wk.transpose()).rowwise() + bias.transpose(), keys), 1e-12);
}

TEST(Recalkv, CalibrationOnTheSameTextChangesNothing) {
  const Published d;
  Factors f = whitened_factors(d.wv, d.gram, 6);
  const Matrix before = f.up * f.down;
  expect_near(output_error(d.x, d.wv, before), 0.166875);
  calibrate_round(d.wv, d.gram, f);
  EXPECT_LT(relative(before, f.up * f.down), 1e-10);
}

TEST(Recalkv, CalibrationOnOtherText) {
  const Published d;
  Factors f = whitened_factors(d.wv, d.gram, 6);
  const double wanted[] = {0.321197, 0.257245, 0.254232, 0.253993, 0.253967};
  const Factors direct = whitened_factors(d.wv, d.gram2, 6);
  const double best = output_error(d.x2, d.wv, direct.up * direct.down);
  expect_near(best, 0.253964);
  for (int round = 0; round < 5; ++round) {
    const double error = output_error(d.x2, d.wv, f.up * f.down);
    expect_near(error, wanted[round]);
    EXPECT_LE(best, error);
    calibrate_round(d.wv, d.gram2, f);
  }
}

TEST(Recalkv, OneLatentOfAllHeadsIsUsedPerQueryHead) {
  const Published d;
  const Factors f = whitened_factors(d.wv, d.gram, 6);
  Matrix two_step = Matrix::Zero(16, 1), fused = two_step, block = Matrix::Zero(16, 6), mean = Matrix::Zero(6, 1);
  for (int h = 0; h < 8; ++h) {
    const Matrix up = f.up.middleRows(h / 2 * 4, 4), out = d.wo.middleCols(h * 4, 4);
    const Matrix latent = (d.p.row(h) * (d.x * f.down.transpose())).transpose();
    two_step += out * (up * latent);
    fused += (out * up) * latent;
    block += out * up;
    mean += latent / 8;
  }
  EXPECT_LT(relative(two_step, fused), 1e-12);
  EXPECT_GT(relative(two_step, block * mean), 1e-3);
}

}  // namespace
}  // namespace kvmix::rank::testing
