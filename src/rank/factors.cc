#include "rank/factors.h"

#include <Eigen/Eigenvalues>
#include <Eigen/QR>
#include <Eigen/SVD>
#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <random>

namespace kvmix::rank {
namespace {

// Energies below this part of the largest are noise: their square roots are not divided by.
constexpr double kNoise = 1e-12;

// up = U s^(1/2) and down = s^(1/2) V^T of the first `rank` singular triplets, with V^T = s^-1 U^T W for those above noise.
Factors split(const Matrix& u, const Vector& sigma, const Matrix& w, const Vector& energies, int rank) {
  Factors f;
  f.energies = energies;
  f.up = u.leftCols(rank);
  f.down = u.leftCols(rank).transpose() * w;
  for (int i = 0; i < rank; ++i) {
    const double root = std::sqrt(std::max(sigma[i], std::sqrt(kNoise) * sigma[0]));
    if (!(root > 0)) continue;
    f.up.col(i) *= root;
    f.down.row(i) /= root;
  }
  return f;
}

}  // namespace

Factors whitened_factors(const Matrix& w, const Matrix& gram, int rank) {
  const Matrix moments = w * gram * w.transpose();
  const Eigen::SelfAdjointEigenSolver<Matrix> solver(0.5 * (moments + moments.transpose()));
  const Vector energies = solver.eigenvalues().reverse().cwiseMax(0.0);
  return split(solver.eigenvectors().rowwise().reverse(), energies.cwiseSqrt(), w, energies, rank);
}

Factors plain_factors(const Matrix& w, int rank) {
  const Eigen::BDCSVD<Matrix> svd(w, Eigen::ComputeThinU);
  Vector sigma = Vector::Zero(w.rows());
  sigma.head(svd.singularValues().size()) = svd.singularValues();
  return split(svd.matrixU(), sigma, w, sigma.cwiseAbs2(), rank);
}

Vector singular_values(const Matrix& w) { return Eigen::BDCSVD<Matrix>(w).singularValues(); }

void turn(Factors& factors, const Matrix& q) {
  factors.up = factors.up * q;
  factors.down = q.transpose() * factors.down;
}

Matrix mixing_rotation(int n, uint64_t seed) {
  std::mt19937_64 random(seed);
  if (std::has_single_bit(static_cast<unsigned>(n))) {
    Matrix q(n, n);
    const double scale = 1.0 / std::sqrt(static_cast<double>(n));
    for (int i = 0; i < n; ++i) {
      const double sign = (random() & 1) != 0 ? scale : -scale;
      for (int j = 0; j < n; ++j) q(i, j) = std::popcount(static_cast<unsigned>(i & j)) % 2 == 0 ? sign : -sign;
    }
    return q;
  }
  // Sums of uniform numbers: std::normal_distribution differs between libraries.
  const Matrix normal = Matrix::NullaryExpr(n, n, [&random] {
    double sum = -6;
    for (int i = 0; i < 12; ++i) sum += static_cast<double>(random() >> 11) * 0x1p-53;
    return sum;
  });
  return Eigen::HouseholderQR<Matrix>(normal).householderQ() * Matrix::Identity(n, n);
}

int rounded_rank(double rank, int step, int most) {
  const double steps = std::nearbyint(rank / step);  // ties to even
  return std::min(std::max(static_cast<int>(steps) * step, step), most);
}

std::vector<int> fisher_ranks(std::span<const double> scores, int n, int groups, double keep, int step, bool ascending) {
  const double budget = keep * n * static_cast<double>(scores.size());
  const double sum = std::accumulate(scores.begin(), scores.end(), 0.0);
  std::vector<int> ranks;
  std::vector<double> fractions;
  for (const double score : scores) {
    const double share = sum > 0 ? budget * score / sum : keep * n;
    ranks.push_back(std::min(n, static_cast<int>(std::floor(share))));
    fractions.push_back(share - std::floor(share));
  }
  std::vector<size_t> order(scores.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return ascending ? fractions[a] < fractions[b] : fractions[a] > fractions[b]; });
  auto left = static_cast<int64_t>(budget + 1e-9) - std::accumulate(ranks.begin(), ranks.end(), int64_t{0});
  for (bool given = true; left > 0 && given;) {
    given = false;
    for (const size_t m : order) {
      if (left == 0 || ranks[m] == n) continue;
      ++ranks[m];
      --left;
      given = true;
    }
  }
  for (int& rank : ranks) rank = rounded_rank(static_cast<double>(rank / groups), step, n / groups);
  return ranks;
}

double log_condition(const Vector& singular) {
  const double most = singular.maxCoeff(), least = singular.minCoeff();
  return most > 0 ? std::log(most / std::max(least, 1e-6 * most)) : 0.0;
}

std::vector<double> cumulative_log_conditions(std::span<const double> key, std::span<const double> value) {
  std::vector<double> sums(key.size());
  double sum = 0;
  for (size_t l = key.size(); l-- > 0;) sums[l] = sum += key[l] + value[l];
  return sums;
}

std::vector<double> progressive_dims(std::span<const double> cumulative, double most, double least) {
  const auto [low, high] = std::minmax_element(cumulative.begin(), cumulative.end());
  std::vector<double> dims;
  for (const double c : cumulative) dims.push_back(least + (most - least) * (*high > *low ? (c - *low) / (*high - *low) : 1.0));
  return dims;
}

std::vector<int> progressive_ranks(std::span<const double> cumulative, int n, double keep, int step) {
  constexpr double kHalfSpread = 0.2;  // ends at first: keep + and - this part of n
  const auto at = [&](double shift) {
    const double most = std::clamp(keep + kHalfSpread + shift, 0.0, 1.0) * n;
    const double least = std::clamp(keep - kHalfSpread + shift, 0.0, 1.0) * n;
    std::vector<int> ranks;
    for (const double dim : progressive_dims(cumulative, most, least)) ranks.push_back(rounded_rank(dim, step, n));
    return ranks;
  };
  const auto total = [](const std::vector<int>& ranks) { return std::accumulate(ranks.begin(), ranks.end(), int64_t{0}); };
  const double budget = keep * n * static_cast<double>(cumulative.size());
  double low = -1, high = 1;
  for (int i = 0; i < 60; ++i) {
    const double middle = 0.5 * (low + high);
    (static_cast<double>(total(at(middle))) <= budget + 1e-9 ? low : high) = middle;
  }
  std::vector<int> ranks = at(low);
  // Layers whose dimensions round alike rise together; what that leaves goes to the first layers, a step each.
  for (size_t l = 0; l < ranks.size(); ++l) {
    if (ranks[l] + step > n || static_cast<double>(total(ranks) + step) > budget + 1e-9) continue;
    if (l == 0 || ranks[l] < ranks[l - 1]) ranks[l] += step;
  }
  return ranks;
}

}  // namespace kvmix::rank
