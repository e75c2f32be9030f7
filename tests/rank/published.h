// The arrays that the three methods' vectors are given for, and what attention makes of them, in fp64.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "rank/factors.h"

namespace kvmix::rank::testing {

inline Matrix uniform(uint32_t seed, int rows, int cols) {
  Matrix m(rows, cols);
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < cols; ++j) {
      seed = 1664525u * seed + 1013904223u;
      m(i, j) = static_cast<double>(seed >> 8) / 16777216.0 - 0.5;
    }
  }
  return m;
}

// 4 KV heads of 4, 8 query heads, 48 tokens of 16 inputs.
struct Published {
  static constexpr int kDim = 4, kHeads = 4, kTokens = 48;
  Matrix x = uniform(1, 48, 16), wk = uniform(2, 16, 16), wv = uniform(4, 16, 16), wo = uniform(5, 16, 32),
         wq = uniform(8, 32, 16), p = uniform(6, 8, 48), x2 = uniform(7, 48, 16), gram, gram2;

  Published() {
    const Matrix noise = uniform(3, 16, 16);
    wk.middleRows(8, 4) = wk.middleRows(0, 4) + 0.1 * noise.middleRows(8, 4);
    wk.middleRows(12, 4) = wk.middleRows(4, 4) + 0.1 * noise.middleRows(12, 4);
    for (int j = 0; j < 16; ++j) {
      x.col(j) *= 4.0 / (1 + j);
      x2.col(j) *= 4.0 / (1 + 0.5 * j);
    }
    x.col(0).array() += 1;
    x2.col(0).array() += 1;
    x2.col(5).array() += 0.5;
    p.array() += 0.5;
    for (int i = 0; i < p.rows(); ++i) p.row(i) /= p.row(i).sum();
    gram = x.transpose() * x;
    gram2 = x2.transpose() * x2;
  }
};

// The rows of these heads, one below the other.
inline Matrix rows_of(const Matrix& w, const std::vector<int>& heads, int dim = Published::kDim) {
  Matrix part(static_cast<Eigen::Index>(heads.size()) * dim, w.cols());
  for (size_t i = 0; i < heads.size(); ++i)
    part.middleRows(static_cast<Eigen::Index>(i) * dim, dim) = w.middleRows(heads[i] * dim, dim);
  return part;
}
inline void put_rows(const Matrix& part, const std::vector<int>& heads, Matrix& w, int dim = Published::kDim) {
  for (size_t i = 0; i < heads.size(); ++i)
    w.middleRows(heads[i] * dim, dim) = part.middleRows(static_cast<Eigen::Index>(i) * dim, dim);
}

template <class Make>  // Factors(part of w)
Matrix rebuilt(const Matrix& w, const std::vector<std::vector<int>>& groups, const Make& make) {
  Matrix out(w.rows(), w.cols());
  for (const std::vector<int>& group : groups) {
    const Factors f = make(rows_of(w, group));
    put_rows(f.up * f.down, group, out);
  }
  return out;
}
inline double relative(const Matrix& exact, const Matrix& other) { return (exact - other).norm() / exact.norm(); }
// Of outputs on these inputs.
inline double output_error(const Matrix& x, const Matrix& w, const Matrix& other) {
  return relative(x * w.transpose(), x * other.transpose());
}
inline std::vector<std::vector<int>> natural(int size) {
  std::vector<std::vector<int>> groups;
  for (int h = 0; h < Published::kHeads; ++h) {
    if (h % size == 0) groups.emplace_back();
    groups.back().push_back(h);
  }
  return groups;
}

// Rotate-half with base 10000, of a row of 4.
inline Vector rotated(const Vector& row, int position) {
  Vector out(4);
  for (int i = 0; i < 2; ++i) {
    const double angle = position * std::pow(10000.0, -i / 2.0), c = std::cos(angle), s = std::sin(angle);
    out[i] = row[i] * c - row[i + 2] * s;
    out[i + 2] = row[i] * s + row[i + 2] * c;
  }
  return out;
}
// Scores of token 47's query head with keys of its KV head: [48], times scale.
inline Vector scores(const Published& d, const Matrix& wk, int q_head, double scale, bool rotates = true) {
  const Vector q = d.wq.middleRows(q_head * 4, 4) * d.x.row(47).transpose();
  Vector out(48);
  for (int t = 0; t < 48; ++t) {
    const Vector k = wk.middleRows(q_head / 2 * 4, 4) * d.x.row(t).transpose();
    out[t] = scale * (rotates ? rotated(q, 47).dot(rotated(k, t)) : q.dot(k));
  }
  return out;
}

}  // namespace kvmix::rank::testing
