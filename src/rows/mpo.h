// DecoQuant's matrix product operators of two tensors (arXiv 2405.12591, section 3): the rows of a layer, its heads side by
// side, are cut into groups of 16 channels, A [rows x groups, 16]; with its singular values A = U S V', the balanced split is
//     large = U S^(1/2)  [rows x groups, 16]      small = S^(1/2) V'  [16, 16]      A = large small,
// without truncation. `large` is what is quantised: outlying channels go to `small`, and ranges shrink.
#pragma once

#include <array>
#include <span>
#include <vector>

namespace kvmix {

inline constexpr int kMpoChannels = 16;
using MpoMatrix = std::array<double, static_cast<size_t>(kMpoChannels) * kMpoChannels>;

struct MpoFactors {
  std::vector<double> large;                 // [rows][width]
  MpoMatrix small{};                         // row by row
  std::array<double, kMpoChannels> sigma{};  // descending
};
// Of rows [n][width]; width is a multiple of 16. Singular values count as at least a millionth of the largest.
MpoFactors mpo_factors(std::span<const double> rows, int width);

// Throws kInvalidArgument for a matrix that has no inverse.
MpoMatrix mpo_inverse(const MpoMatrix& small);

}  // namespace kvmix
