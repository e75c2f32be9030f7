// ReCalKV: which heads share a group, and values' factors calibrated by least squares.
#include <Eigen/Cholesky>
#include <Eigen/Eigenvalues>
#include <algorithm>

#include "rank/factors.h"

namespace kvmix::rank {

Matrix head_similarity(const Matrix& moments, int heads) {
  const auto dim = moments.rows() / heads;
  const auto block = [&](int a, int b) { return moments.block(a * dim, b * dim, dim, dim).squaredNorm(); };
  Matrix similarity(heads, heads);
  for (int a = 0; a < heads; ++a) {
    for (int b = 0; b < heads; ++b) {
      const double norms = std::sqrt(block(a, a)) * std::sqrt(block(b, b));
      similarity(a, b) = norms > 0 ? block(a, b) / norms : 0.0;
    }
  }
  return similarity;
}

std::vector<std::vector<int>> greedy_groups(const Matrix& similarity, int group_size) {
  const auto heads = static_cast<int>(similarity.rows());
  const auto size = static_cast<size_t>(group_size);
  std::vector<std::pair<int, int>> pairs;
  for (int i = 0; i < heads; ++i) {
    for (int j = i + 1; j < heads; ++j) pairs.emplace_back(i, j);
  }
  std::stable_sort(pairs.begin(), pairs.end(),
                   [&](const auto& a, const auto& b) { return similarity(a.first, a.second) > similarity(b.first, b.second); });
  std::vector<std::vector<int>> groups(static_cast<size_t>(heads / group_size));
  std::vector<int> group_of(static_cast<size_t>(heads), -1);
  const auto put = [&](int head, int group) {
    groups[static_cast<size_t>(group)].push_back(head);
    group_of[static_cast<size_t>(head)] = group;
  };
  const auto first_with_room = [&] {
    return static_cast<int>(std::find_if(groups.begin(), groups.end(), [&](const auto& g) { return g.size() < size; }) -
                            groups.begin());
  };
  for (const auto& [a, b] : pairs) {
    const int ga = group_of[static_cast<size_t>(a)], gb = group_of[static_cast<size_t>(b)];
    if (ga < 0 && gb < 0) {
      const int group = first_with_room();
      if (group == static_cast<int>(groups.size())) continue;
      put(a, group);
      put(b, group);  // may overfill
    } else if (ga < 0 || gb < 0) {
      const int group = std::max(ga, gb);
      if (groups[static_cast<size_t>(group)].size() < size) put(ga < 0 ? a : b, group);
    }
  }
  std::vector<int> free;
  for (int h = 0; h < heads; ++h) {
    if (group_of[static_cast<size_t>(h)] < 0) free.push_back(h);
  }
  for (size_t g = 0; g < groups.size(); ++g) {
    while (groups[g].size() < size && !free.empty()) {
      put(free.back(), static_cast<int>(g));
      free.pop_back();
    }
  }
  for (std::vector<int>& group : groups) {
    while (group.size() > size) {
      const int head = group.back();
      group.pop_back();
      put(head, first_with_room());
    }
  }
  return groups;
}

double left_out(const Matrix& moments, int heads, const std::vector<int>& group, int rank) {
  const auto dim = moments.rows() / heads;
  const auto size = static_cast<Eigen::Index>(group.size());
  Matrix part(size * dim, size * dim);
  for (Eigen::Index a = 0; a < size; ++a) {
    for (Eigen::Index b = 0; b < size; ++b) {
      part.block(a * dim, b * dim, dim, dim) =
          moments.block(group[static_cast<size_t>(a)] * dim, group[static_cast<size_t>(b)] * dim, dim, dim);
    }
  }
  const Vector values = Eigen::SelfAdjointEigenSolver<Matrix>(part, Eigen::EigenvaluesOnly).eigenvalues();  // ascending
  return values.head(std::max<Eigen::Index>(0, values.size() - rank)).cwiseMax(0.0).sum();
}

std::vector<std::vector<int>> improved_groups(const Matrix& moments, int heads, std::vector<std::vector<int>> groups,
                                              int rank) {
  std::vector<double> losses;
  for (const auto& group : groups) losses.push_back(left_out(moments, heads, group, rank));
  for (bool better = true; better;) {
    better = false;
    for (size_t a = 0; a < groups.size(); ++a) {
      for (size_t b = a + 1; b < groups.size(); ++b) {
        for (size_t i = 0; i < groups[a].size(); ++i) {
          for (size_t j = 0; j < groups[b].size(); ++j) {
            std::swap(groups[a][i], groups[b][j]);
            const double la = left_out(moments, heads, groups[a], rank), lb = left_out(moments, heads, groups[b], rank);
            if (la + lb < (losses[a] + losses[b]) * (1 - 1e-9)) {
              losses[a] = la;
              losses[b] = lb;
              better = true;
            } else {
              std::swap(groups[a][i], groups[b][j]);
            }
          }
        }
      }
    }
  }
  return groups;
}

void calibrate_round(const Matrix& w, const Matrix& gram, Factors& f) {
  const Matrix latents = f.down * gram;  // R G
  f.up = (latents * f.down.transpose()).ldlt().solve(latents * w.transpose()).transpose();
  f.down = (f.up.transpose() * f.up).ldlt().solve(f.up.transpose() * w);
}

}  // namespace kvmix::rank
