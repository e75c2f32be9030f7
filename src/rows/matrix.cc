// y = x R: a dense matrix per KV head, with its inverse. A query meets it as R^-1 q.
#include <algorithm>
#include <random>

#include "rows/row_map.h"

namespace kvmix {
namespace {

constexpr RowMapField kFields[] = {
    {.name = "matrix", .kind = FieldKind::kNumbers, .limit = 1e30f, .numbers = &TransformSpec::matrix},
    {.name = "matrix_inverse",
     .kind = FieldKind::kNumbers,
     .limit = 1e30f,
     .beside = "matrix",
     .numbers = &TransformSpec::matrix_inverse},
};

// x <- x M
void times_matrix(const float* m, int width, float* x) {
  float out[kMostWidth] = {};
  for (int i = 0; i < width; ++i) {
    const float v = x[i];
    for (int j = 0; j < width; ++j) out[j] += v * m[i * width + j];
  }
  std::copy_n(out, width, x);
}

class Dense final : public RowMap {
 public:
  Dense(std::span<const float> matrix, std::span<const float> inverse, int width)
      : matrix_(matrix), inverse_(inverse), width_(width) {}
  int width() const override { return width_; }

  void store(int kv_head, float* row) const override { times_matrix(head(matrix_, kv_head), width_, row); }
  void query(int kv_head, float* row) const override {
    const float* inverse = head(inverse_, kv_head);
    float out[kMostWidth];
    for (int i = 0; i < width_; ++i) {
      float sum = 0;
      for (int j = 0; j < width_; ++j) sum += inverse[i * width_ + j] * row[j];
      out[i] = sum;
    }
    std::copy_n(out, width_, row);
  }
  void output(int kv_head, float* row) const override { times_matrix(head(inverse_, kv_head), width_, row); }

 private:
  const float* head(std::span<const float> matrices, int kv_head) const {
    return matrices.data() + static_cast<ptrdiff_t>(kv_head) * width_ * width_;
  }

  std::span<const float> matrix_, inverse_;
  int width_;
};

std::unique_ptr<const RowMap> make(const TransformSpec& spec, const RowShape& shape, const RowMapErrors& errors) {
  if (spec.matrix.empty() && spec.matrix_inverse.empty()) return nullptr;
  if (spec.hadamard) errors.fail("a matrix and a Hadamard transform exclude each other; remove \"matrix\" or \"hadamard\"");
  const auto width = static_cast<size_t>(shape.width), count = static_cast<size_t>(shape.kv_heads) * width * width;
  errors.check_numbers("matrix", spec.matrix, count, "kv_heads x head_dim x head_dim");
  errors.check_numbers("matrix_inverse", spec.matrix_inverse, count, "kv_heads x head_dim x head_dim");
  return std::make_unique<Dense>(spec.matrix, spec.matrix_inverse, shape.width);
}

// R = D (1 - 2 v v'), a diagonal and a reflection; R^-1 = (1 - 2 v v') D^-1.
void example(const RowShape& shape, unsigned seed, TransformSpec& spec) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  std::uniform_real_distribution<double> size(0.5, 2.0);
  const int n = shape.width;
  for (int head = 0; head < shape.kv_heads; ++head) {
    std::vector<double> v(static_cast<size_t>(n)), d(v.size());
    double squares = 0;
    for (double& x : v) x = normal(random), squares += x * x;
    for (double& x : d) x = size(random);
    const auto reflection = [&](size_t i, size_t j) { return (i == j ? 1.0 : 0.0) - 2 * v[i] * v[j] / squares; };
    for (size_t i = 0; i < v.size(); ++i) {
      for (size_t j = 0; j < v.size(); ++j) {
        spec.matrix.push_back(static_cast<float>(d[i] * reflection(i, j)));
        spec.matrix_inverse.push_back(static_cast<float>(reflection(i, j) / d[j]));
      }
    }
  }
}

}  // namespace

extern const RowMapInfo kMatrixMap;
const RowMapInfo kMatrixMap = {.name = "matrix",
                               .description = "a dense matrix per KV head",
                               .keys = true,
                               .values = true,
                               .exact = true,
                               .fields = kFields,
                               .make = make,
                               .example = example};

}  // namespace kvmix
