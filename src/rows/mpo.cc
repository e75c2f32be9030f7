// y = x B^-1 in each group of 16 channels: DecoQuant's stage in front of the quantiser, with a small tensor B for each KV head
// (in the paper one for all of a layer's). A query meets it as x B', sums of values go back by B, so rows are never rebuilt.
#include "rows/mpo.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "kvmix/error.h"
#include "rows/row_map.h"

namespace kvmix {
namespace {

constexpr size_t kN = kMpoChannels;

// Eigenvalues and vectors (columns of `vectors`) of a symmetric matrix, by Jacobi's rotations.
void eigen(MpoMatrix a, std::array<double, kN>& values, MpoMatrix& vectors) {
  constexpr int kSweeps = 60;
  vectors = {};
  for (size_t i = 0; i < kN; ++i) vectors[i * kN + i] = 1;
  for (int sweep = 0; sweep < kSweeps; ++sweep) {
    double off = 0, all = 0;
    for (size_t i = 0; i < kN; ++i) {
      for (size_t j = 0; j < kN; ++j) (i == j ? all : off) += a[i * kN + j] * a[i * kN + j];
    }
    if (off <= 1e-32 * all) break;
    for (size_t p = 0; p < kN; ++p) {
      for (size_t q = p + 1; q < kN; ++q) {
        if (a[p * kN + q] == 0) continue;
        const double theta = (a[q * kN + q] - a[p * kN + p]) / (2 * a[p * kN + q]);
        const double t = (theta >= 0 ? 1 : -1) / (std::abs(theta) + std::sqrt(theta * theta + 1));
        const double c = 1 / std::sqrt(t * t + 1), s = t * c;
        const auto rotate = [c, s](double& x, double& y) {
          const double old = x;
          x = c * old - s * y;
          y = s * old + c * y;
        };
        for (size_t k = 0; k < kN; ++k) rotate(a[k * kN + p], a[k * kN + q]);
        for (size_t k = 0; k < kN; ++k) rotate(a[p * kN + k], a[q * kN + k]);
        for (size_t k = 0; k < kN; ++k) rotate(vectors[k * kN + p], vectors[k * kN + q]);
      }
    }
  }
  for (size_t i = 0; i < kN; ++i) values[i] = a[i * kN + i];
}

constexpr RowMapField kFields[] = {{.name = "mpo", .kind = FieldKind::kNumbers, .limit = 1e30f}};

class Mpo final : public RowMap {
 public:
  Mpo(std::span<const float> numbers, int width) : width_(width) {
    for (; !numbers.empty(); numbers = numbers.subspan(kN * kN)) {
      MpoMatrix small;
      std::copy_n(numbers.begin(), kN * kN, small.begin());
      const MpoMatrix inverse = mpo_inverse(small);
      std::copy(small.begin(), small.end(), small_.emplace_back().begin());
      std::copy(inverse.begin(), inverse.end(), inverse_.emplace_back().begin());
    }
  }
  int width() const override { return width_; }

  void store(int kv_head, float* row) const override { each(row, inverse_[static_cast<size_t>(kv_head)], false); }
  void query(int kv_head, float* row) const override { each(row, small_[static_cast<size_t>(kv_head)], true); }
  void output(int kv_head, float* row) const override { each(row, small_[static_cast<size_t>(kv_head)], false); }

 private:
  using Matrix = std::array<float, kN * kN>;
  // x <- x M, or x M'.
  void each(float* row, const Matrix& m, bool transposed) const {
    for (int first = 0; first < width_; first += kMpoChannels) {
      float out[kN] = {};
      for (size_t i = 0; i < kN; ++i) {
        for (size_t j = 0; j < kN; ++j) out[j] += row[first + static_cast<int>(i)] * m[transposed ? j * kN + i : i * kN + j];
      }
      std::copy_n(out, kN, row + first);
    }
  }

  std::vector<Matrix> small_, inverse_;  // by KV head
  int width_;
};

std::unique_ptr<const RowMap> make(const TransformSpec& spec, const RowShape& shape, const RowMapErrors& errors) {
  if (!kFields[0].present(spec)) return nullptr;
  const std::span<const float> numbers = kFields[0].numbers_of(spec);
  errors.check_numbers("mpo", numbers, static_cast<size_t>(shape.kv_heads) * kN * kN, "kv_heads x 16 x 16");
  try {
    return std::make_unique<Mpo>(numbers, shape.width);
  } catch (const Error& e) {
    errors.fail(std::string("\"mpo\": ") + e.what());
  }
}

void example(const RowShape& shape, unsigned seed, TransformSpec& spec) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  std::vector<float> numbers;
  for (int head = 0; head < shape.kv_heads; ++head) {
    std::vector<double> rows(static_cast<size_t>(64 * shape.width));
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = normal(random) + (i % kN == 3 ? 4 : 0);
    const MpoMatrix small = mpo_factors(rows, shape.width).small;
    numbers.insert(numbers.end(), small.begin(), small.end());
  }
  kFields[0].set(spec, std::move(numbers));
}

}  // namespace

MpoFactors mpo_factors(std::span<const double> rows, int width) {
  if (width < kMpoChannels || width % kMpoChannels != 0 || rows.size() % static_cast<size_t>(width) != 0) {
    throw Error(Status::kInvalidArgument,
                "rows of " + std::to_string(width) + " channels cannot be decomposed; the width must be a multiple of 16");
  }
  MpoMatrix gram{}, vectors{};
  for (size_t first = 0; first < rows.size(); first += kN) {
    for (size_t i = 0; i < kN; ++i) {
      for (size_t j = 0; j < kN; ++j) gram[i * kN + j] += rows[first + i] * rows[first + j];
    }
  }
  std::array<double, kN> values{};
  eigen(gram, values, vectors);
  std::array<size_t, kN> order{};
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return values[a] > values[b]; });
  MpoFactors factors;
  MpoMatrix to_large{};  // V S^(-1/2)
  const double largest = std::sqrt(std::max(values[order[0]], 1e-30));
  for (size_t k = 0; k < kN; ++k) {
    const double sigma = std::max(std::sqrt(std::max(values[order[k]], 0.0)), 1e-6 * largest);
    factors.sigma[k] = sigma;
    for (size_t c = 0; c < kN; ++c) {
      const double v = vectors[c * kN + order[k]];
      factors.small[k * kN + c] = std::sqrt(sigma) * v;
      to_large[c * kN + k] = v / std::sqrt(sigma);
    }
  }
  factors.large.assign(rows.size(), 0.0);
  for (size_t first = 0; first < rows.size(); first += kN) {
    for (size_t c = 0; c < kN; ++c) {
      for (size_t k = 0; k < kN; ++k) factors.large[first + k] += rows[first + c] * to_large[c * kN + k];
    }
  }
  return factors;
}

MpoMatrix mpo_inverse(const MpoMatrix& small) {
  MpoMatrix a = small, inverse{};
  for (size_t i = 0; i < kN; ++i) inverse[i * kN + i] = 1;
  const double largest =
      std::abs(*std::max_element(a.begin(), a.end(), [](double x, double y) { return std::abs(x) < std::abs(y); }));
  for (size_t column = 0; column < kN; ++column) {
    size_t pivot = column;
    for (size_t r = column; r < kN; ++r) {
      if (std::abs(a[r * kN + column]) > std::abs(a[pivot * kN + column])) pivot = r;
    }
    const double top = a[pivot * kN + column];
    if (!(std::abs(top) > 1e-12 * largest)) {
      throw Error(Status::kInvalidArgument, "the matrix has no inverse; decompose the rows again");
    }
    for (MpoMatrix* m : {&a, &inverse}) {
      for (size_t j = 0; j < kN; ++j) std::swap((*m)[column * kN + j], (*m)[pivot * kN + j]);
      for (size_t j = 0; j < kN; ++j) (*m)[column * kN + j] /= top;
    }
    for (size_t r = 0; r < kN; ++r) {
      const double factor = a[r * kN + column];
      if (r == column || factor == 0) continue;
      for (MpoMatrix* m : {&a, &inverse}) {
        for (size_t j = 0; j < kN; ++j) (*m)[r * kN + j] -= factor * (*m)[column * kN + j];
      }
    }
  }
  return inverse;
}

extern const RowMapInfo kMpoMap;
const RowMapInfo kMpoMap = {.name = "mpo",
                            .description = "DecoQuant's large tensor: groups of 16 channels times an inverse 16 x 16 matrix",
                            .keys = true,
                            .values = true,
                            .exact = true,
                            .fields = kFields,
                            .make = make,
                            .example = example};

}  // namespace kvmix
