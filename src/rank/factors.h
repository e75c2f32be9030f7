// Low-rank factors of projections, as mathematics: no model, no file, all in fp64.
//
// A projection W [n][d] becomes up [n][r] times down [r][d]: down x are a token's *latents*, up times them its keys or values.
// Rows of W are taken in groups of whole heads. Latents come in the order of what they explain, so that the first r' of a
// factorisation are the one of rank r' (up to the split of singular values between both, which is per latent).
#pragma once

#include <Eigen/Core>
#include <cstdint>
#include <span>
#include <vector>

namespace kvmix::rank {

using Matrix = Eigen::MatrixXd;
using Vector = Eigen::VectorXd;

struct Factors {
  Matrix up, down;  // [n][r], [r][d]
  // Of all n latents, descending: what leaving out latent i adds to the squared error, of outputs over the calibration's tokens
  // where that is what was minimised, else of the weights.
  Vector energies;
};

// Best rank-r factors for inputs with this Gram matrix, sum of x x^T [d][d] (Palu, arXiv 2407.21118; whitened SVD in its
// inverse-free form: principal components of the outputs). Singular values are split evenly between both factors.
Factors whitened_factors(const Matrix& w, const Matrix& gram, int rank);
// Truncated SVD of the weights alone (LoRC, arXiv 2410.03111).
Factors plain_factors(const Matrix& w, int rank);
Vector singular_values(const Matrix& w);
// The latents turned by an orthogonal matrix [r][r]: the product stays, quantisation sees evener latents (Palu, Hadamard).
void turn(Factors& factors, const Matrix& q);
// An orthogonal matrix that mixes all coordinates evenly: random signs and Hadamard where n is a power of two, else the Q of
// seeded normal numbers.
Matrix mixing_rotation(int n, uint64_t seed);

// Palu's ranks from gradient magnitudes, one score a matrix of n outputs, which all compete for keep * n each: what a group of
// each matrix gets, a multiple of `step` and at least that (rounded to the nearest, ties to even). What is achieved differs
// from `keep` by that rounding: see kept_share. `ascending`: what is left over goes to small fractions first, as Palu's code
// does; else to large ones (ReCalKV's).
std::vector<int> fisher_ranks(std::span<const double> scores, int n, int groups, double keep, int step, bool ascending = true);
// `rank` to the nearest multiple of step, ties to even, within [step, most].
int rounded_rank(double rank, int step, int most);

// LoRC's schedule: log of the product of condition numbers from each layer to the last, the dimensions that follow from it
// between two ends, and both ends moved together until `keep` of n is met on average. A layer's condition number floors its
// smallest singular value at 1e-6 of the largest.
double log_condition(const Vector& singular);
std::vector<double> cumulative_log_conditions(std::span<const double> key, std::span<const double> value);
std::vector<double> progressive_dims(std::span<const double> cumulative, double most, double least);
std::vector<int> progressive_ranks(std::span<const double> cumulative, int n, double keep, int step);

// ReCalKV, arXiv 2505.24357. Similarity of heads [heads][heads] by linear CKA from the outputs' second moments
// C = W G W^T [n][n] (of heads of n / heads channels).
Matrix head_similarity(const Matrix& second_moments, int heads);
// Heads by group, by its greedy rule over pairs in the order of similarity.
std::vector<std::vector<int>> greedy_groups(const Matrix& similarity, int group_size);
// The same, then heads of two groups exchanged while what rank-r factors of each group leave out falls.
std::vector<std::vector<int>> improved_groups(const Matrix& second_moments, int heads, std::vector<std::vector<int>> groups,
                                              int rank);
// Squared error that rank-r factors of these heads together leave.
double left_out(const Matrix& second_moments, int heads, const std::vector<int>& group, int rank);
// One round of its value calibration: up, then down, each the least squares solution for the other.
void calibrate_round(const Matrix& w, const Matrix& gram, Factors& factors);

}  // namespace kvmix::rank
