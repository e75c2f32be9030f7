#include <gtest/gtest.h>

#include <array>

#include "rank/published.h"

namespace kvmix::rank::testing {
namespace {

constexpr double kClose = 1e-5;  // relative, as the vectors are given
void expect_near(double got, double wanted) { EXPECT_NEAR(got, wanted, kClose * std::abs(wanted) + 6e-7); }

Matrix whitened(const Published& d, const Matrix& w, int size, int rank) {
  return rebuilt(w, natural(size), [&](const Matrix& part) { return whitened_factors(part, d.gram, rank); });
}

TEST(Palu, DataIsThePublishedOne) {
  const Published d;
  EXPECT_NEAR(d.x.sum(), 53.979247577, 1e-8);
  EXPECT_NEAR(d.x.norm(), 11.855198231, 1e-8);
  EXPECT_NEAR(d.wk.norm(), 4.457876824, 1e-8);
  EXPECT_NEAR(d.wv.norm(), 4.732195355, 1e-8);
}

TEST(Palu, WhitenedFactorsOfPairsOfHeads) {
  const Published d;
  const auto error = [&](int rank) { return output_error(d.x, d.wk, whitened(d, d.wk, 2, rank)); };
  expect_near(error(2), 0.285278);
  expect_near(error(4), 0.152741);
  expect_near(error(6), 0.056228);
  EXPECT_LT(error(8), 1e-12);
}

TEST(Palu, ErrorsAreWhatTheEnergiesSay) {
  const Published d;
  double squared = 0;
  for (const std::vector<int>& group : natural(2)) {
    const Factors f = whitened_factors(rows_of(d.wk, group), d.gram, 4);
    squared += f.energies.tail(4).sum();
  }
  EXPECT_NEAR(std::sqrt(squared) / (d.x * d.wk.transpose()).norm(), output_error(d.x, d.wk, whitened(d, d.wk, 2, 4)), 1e-12);
}

TEST(Palu, WithoutWhiteningTheErrorIsAnother) {
  const Published d;
  const auto error = [&](int rank) {
    return output_error(d.x, d.wk, rebuilt(d.wk, natural(2), [&](const Matrix& part) { return plain_factors(part, rank); }));
  };
  expect_near(error(2), 0.530004);
  expect_near(error(4), 0.382330);
  expect_near(error(6), 0.301697);
}

TEST(Palu, LargerGroupsAreBetterAtEqualRank) {
  const Published d;
  for (const auto& [w, one, two, four] :
       {std::tuple{d.wk, 0.250639, 0.152741, 0.012741}, {d.wv, 0.309734, 0.201321, 0.110500}}) {
    expect_near(output_error(d.x, w, whitened(d, w, 1, 2)), one);
    expect_near(output_error(d.x, w, whitened(d, w, 2, 4)), two);
    expect_near(output_error(d.x, w, whitened(d, w, 4, 8)), four);
  }
}

TEST(Palu, KeysAreRebuiltThenRotated) {
  const Published d;
  const Vector exact = scores(d, d.wk, 0, 0.5), got = scores(d, whitened(d, d.wk, 2, 4), 0, 0.5);
  const double wanted[] = {0.069204, -0.028556, -0.172551, 0.180139}, full[] = {0.070283, -0.028308, -0.205234, 0.203418};
  for (int i = 0; i < 4; ++i) {
    EXPECT_NEAR(got[i], wanted[i], 1e-6);
    EXPECT_NEAR(exact[i], full[i], 1e-6);
  }
  expect_near(relative(exact, got), 0.112718);
  EXPECT_NEAR(relative(exact, scores(d, whitened(d, d.wk, 2, 4), 0, 0.5, false)), 1.4575, 1e-4);
  EXPECT_LT(relative(exact, scores(d, whitened(d, d.wk, 2, 8), 0, 0.5)), 1e-12);
}

TEST(Palu, ValuesMeetTheOutputProjectionPerQueryHead) {
  const Published d;
  Matrix exact = Matrix::Zero(16, 1), two_step = exact, fused = exact, summed = exact;
  std::vector<Factors> groups;
  for (const std::vector<int>& group : natural(2)) groups.push_back(whitened_factors(rows_of(d.wv, group), d.gram, 5));
  const Matrix values = d.x * d.wv.transpose();
  for (int h = 0; h < 8; ++h) {
    const int kv = h / 2;
    const Factors& f = groups[static_cast<size_t>(kv / 2)];
    const Matrix up = f.up.middleRows(kv % 2 * 4, 4), out = d.wo.middleCols(h * 4, 4);
    exact += out * (d.p.row(h) * values.middleCols(kv * 4, 4)).transpose();
    const Matrix latent = (d.p.row(h) * (d.x * f.down.transpose())).transpose();
    two_step += out * (up * latent);
    fused += (out * up) * latent;
  }
  expect_near(relative(exact, two_step), 0.035644);
  EXPECT_LT(relative(two_step, fused), 1e-14);
  const double wanted[] = {0.55404, -0.088462, -0.464206, -0.454189};
  for (int i = 0; i < 4; ++i) EXPECT_NEAR(two_step(i, 0), wanted[i], 1e-6);
  // One block for all heads of a group is another thing: their attention weights differ.
  for (int g = 0; g < 2; ++g) {
    const Factors& f = groups[static_cast<size_t>(g)];
    Matrix block = Matrix::Zero(16, 5), mean = Matrix::Zero(5, 1);
    for (int h = g * 4; h < g * 4 + 4; ++h) {
      block += d.wo.middleCols(h * 4, 4) * f.up.middleRows(h / 2 % 2 * 4, 4);
      mean += (d.p.row(h) * (d.x * f.down.transpose())).transpose() / 4;
    }
    summed += block * mean;
  }
  expect_near(relative(exact, summed), 0.121602);
}

TEST(Palu, TurningLatentsLeavesTheProduct) {
  const Published d;
  for (const int rank : {4, 6, 8}) {
    Factors f = whitened_factors(rows_of(d.wk, {0, 1}), d.gram, rank);
    const Matrix before = f.up * f.down, latents = f.down;
    const Matrix q = mixing_rotation(rank, 7);
    EXPECT_LT((q * q.transpose() - Matrix::Identity(rank, rank)).norm(), 1e-12);
    turn(f, q);
    EXPECT_LT(relative(before, f.up * f.down), 1e-12);
    EXPECT_GT(relative(latents, f.down), 0.1);
  }
}

// Codes of a token's slice with a float minimum, or with the integer zero point of the reference, which is clamped.
Matrix quantised(const Matrix& z, int bits, bool clamps) {
  const double top = (1 << bits) - 1;
  Matrix out(z.rows(), z.cols());
  for (int t = 0; t < z.rows(); ++t) {
    const double low = z.row(t).minCoeff(), scale = std::max(z.row(t).maxCoeff() - low, 1e-5) / top;
    const double zero = clamps ? std::clamp(std::nearbyint(-low / scale), 0.0, top) : 0;
    for (int i = 0; i < z.cols(); ++i) {
      if (clamps) {
        out(t, i) = (std::clamp(std::nearbyint(z(t, i) / scale) + zero, 0.0, top) - zero) * scale;
      } else {
        out(t, i) = std::clamp(std::nearbyint((z(t, i) - low) / scale), 0.0, top) * scale + low;
      }
    }
  }
  return out;
}

TEST(Palu, RotationHelpsQuantisedLatents) {
  const Published d;
  Matrix sylvester(8, 8);
  for (int i = 0; i < 8; ++i) {
    for (int j = 0; j < 8; ++j)
      sylvester(i, j) = (__builtin_popcount(static_cast<unsigned>(i & j)) % 2 == 0 ? 1 : -1) / std::sqrt(8.0);
  }
  // Squared errors by group, sign pattern of its latents (which no factorisation defines) and case: bits 2 to 4, by whether
  // latents are rotated and zero points clamped.
  constexpr size_t kCases = 12, kSigns = 256;
  std::vector<std::vector<std::array<double, kCases>>> squared;
  for (const std::vector<int>& group : natural(2)) {
    const Factors f = whitened_factors(rows_of(d.wk, group), d.gram, 8);
    const Matrix exact = d.x * rows_of(d.wk, group).transpose();
    auto& errors = squared.emplace_back(kSigns);
    for (size_t signs = 0; signs < kSigns; ++signs) {
      Factors plain = f;
      for (int i = 0; i < 8; ++i) {
        if ((signs >> i & 1) == 0) continue;
        plain.up.col(i) *= -1;
        plain.down.row(i) *= -1;
      }
      Factors rotated = plain;
      turn(rotated, sylvester);
      for (size_t c = 0; c < kCases; ++c) {
        const Factors& g = c / 3 % 2 == 0 ? plain : rotated;
        errors[signs][c] =
            (exact - quantised(d.x * g.down.transpose(), 2 + static_cast<int>(c) % 3, c >= 6) * g.up.transpose()).squaredNorm();
      }
    }
  }
  const double wanted[kCases] = {0.132439, 0.056591, 0.025705, 0.114860, 0.047303, 0.023024,
                                 0.189822, 0.077075, 0.038306, 0.143313, 0.074489, 0.053569};
  const double norm = (d.x * d.wk.transpose()).norm();
  int found = 0;  // sign patterns with all twelve published errors
  for (const auto& first : squared[0]) {
    for (const auto& second : squared[1]) {
      bool all = true;
      for (size_t c = 0; c < kCases && all; ++c) all = std::abs(std::sqrt(first[c] + second[c]) / norm - wanted[c]) < 2e-6;
      found += all ? 1 : 0;
    }
  }
  EXPECT_GE(found, 1);
}

TEST(Palu, RanksFollowGradients) {
  EXPECT_EQ(fisher_ranks(std::vector<double>{1, 3, 0.5, 1.5}, 512, 2, 0.5, 32), (std::vector<int>{96, 256, 32, 128}));
  const std::vector<int> capped = fisher_ranks(std::vector<double>{1, 6, 0.5, 1.5}, 512, 2, 0.5, 32);
  EXPECT_EQ(capped, (std::vector<int>{96, 256, 64, 128}));
  EXPECT_DOUBLE_EQ((capped[0] + capped[1] + capped[2] + capped[3]) * 2 / 2048.0, 0.53125);
}

}  // namespace
}  // namespace kvmix::rank::testing
