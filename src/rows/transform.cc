#include "rows/transform.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

#include "kvmix/error.h"

namespace kvmix {
namespace {

constexpr int kMaxHeadDim = 256;

using Four = float __attribute__((vector_size(16)));

Four load_four(const float* x) {
  Four v;
  std::memcpy(&v, x, sizeof v);
  return v;
}
void store_four(float* x, Four v) { std::memcpy(x, &v, sizeof v); }

// Orthonormal Hadamard of each block; its own inverse. Every step of a decode transforms each head's query and output, so it
// is written with vectors; blocks have at least 16 elements.
void hadamard(int head_dim, float* x) {
  const int block = head_dim & -head_dim;
  for (int i = 0; i < head_dim; i += 4) {
    Four v = load_four(x + i);
    v = __builtin_shufflevector(v, v, 1, 0, 3, 2) + v * Four{1, -1, 1, -1};
    v = __builtin_shufflevector(v, v, 2, 3, 0, 1) + v * Four{1, 1, -1, -1};
    store_four(x + i, v);
  }
  const Four norm = Four{1, 1, 1, 1} / std::sqrt(static_cast<float>(block));
  for (int half = 4; half < block; half *= 2) {
    const Four scale = 2 * half == block ? norm : Four{1, 1, 1, 1};
    for (int i = 0; i < head_dim; i += 2 * half) {
      for (int j = i; j < i + half; j += 4) {
        const Four a = load_four(x + j), b = load_four(x + j + half);
        store_four(x + j, (a + b) * scale);
        store_four(x + j + half, (a - b) * scale);
      }
    }
  }
}

template <class Op>
void each_scaled(const TransformSpec& transform, int kv_head, int head_dim, float* x, const Op& op) {
  if (transform.scales.empty()) return;
  const float* scales = transform.scales.data() + static_cast<ptrdiff_t>(kv_head) * head_dim;
  for (int i = 0; i < head_dim; ++i) x[i] = op(x[i], scales[i]);
}

const float* head_matrix(const std::vector<float>& matrices, int kv_head, int head_dim) {
  return matrices.data() + static_cast<ptrdiff_t>(kv_head) * head_dim * head_dim;
}

// x <- x M
void times_matrix(const float* m, int head_dim, float* x) {
  float out[kMaxHeadDim] = {};
  for (int i = 0; i < head_dim; ++i) {
    const float v = x[i];
    for (int j = 0; j < head_dim; ++j) out[j] += v * m[i * head_dim + j];
  }
  std::copy_n(out, head_dim, x);
}

}  // namespace

void check_transform(const TransformSpec& transform, Side side, const LayerConfig& layer, const std::string& where) {
  const auto fail = [&](const std::string& what) { throw Error(Status::kInvalidArgument, where + ": " + what); };
  const auto values = static_cast<size_t>(layer.kv_heads) * static_cast<size_t>(layer.head_dim);
  const auto finite = [](const std::vector<float>& v) {
    return std::all_of(v.begin(), v.end(), [](float f) { return std::isfinite(f); });
  };
  if (!transform.center.empty()) {
    if (side == Side::kValue) fail("centring is for keys only; remove \"center\" from the values");
    if (layer.softcap > 0) fail("centred keys do not work with soft-capped scores; remove \"center\"");
    if (transform.center.size() != values || !finite(transform.center)) {
      fail("\"center\" must hold " + std::to_string(values) + " finite numbers (kv_heads x head_dim)");
    }
  }
  if (!transform.scales.empty()) {
    if (!transform.hadamard) fail("\"scales\" belong to a Hadamard transform; set \"hadamard\" or remove them");
    if (transform.scales.size() != values || !finite(transform.scales) ||
        std::any_of(transform.scales.begin(), transform.scales.end(), [](float s) { return s == 0; })) {
      fail("\"scales\" must hold " + std::to_string(values) + " finite numbers other than 0 (kv_heads x head_dim)");
    }
  }
  if (!transform.feedback.empty()) {
    const size_t expected = values * static_cast<size_t>(layer.head_dim - 1) / 2;
    if (transform.feedback.size() != expected || !finite(transform.feedback)) {
      fail("\"feedback\" must hold " + std::to_string(expected) + " finite numbers (kv_heads x head_dim x (head_dim - 1) / 2)");
    }
  }
  if (!transform.matrix.empty() || !transform.matrix_inverse.empty()) {
    if (transform.hadamard) fail("a matrix and a Hadamard transform exclude each other");
    const size_t expected = values * static_cast<size_t>(layer.head_dim);
    if (transform.matrix.size() != expected || transform.matrix_inverse.size() != expected || !finite(transform.matrix) ||
        !finite(transform.matrix_inverse)) {
      fail("\"matrix\" and \"matrix_inverse\" must each hold " + std::to_string(expected) + " finite numbers");
    }
  }
}

void transform_row(const TransformSpec& transform, int kv_head, int head_dim, float* row) {
  if (!transform.center.empty()) {
    const float* center = transform.center.data() + static_cast<ptrdiff_t>(kv_head) * head_dim;
    for (int i = 0; i < head_dim; ++i) row[i] -= center[i];
  }
  if (transform.hadamard) {
    each_scaled(transform, kv_head, head_dim, row, std::multiplies<>());
    hadamard(head_dim, row);
  } else if (!transform.matrix.empty()) {
    times_matrix(head_matrix(transform.matrix, kv_head, head_dim), head_dim, row);
  }
}

void transform_query(const TransformSpec& transform, int kv_head, int head_dim, float* row) {
  if (transform.hadamard) {
    each_scaled(transform, kv_head, head_dim, row, std::divides<>());
    hadamard(head_dim, row);
  } else if (!transform.matrix.empty()) {
    const float* inverse = head_matrix(transform.matrix_inverse, kv_head, head_dim);
    float out[kMaxHeadDim];
    for (int i = 0; i < head_dim; ++i) {
      float sum = 0;
      for (int j = 0; j < head_dim; ++j) sum += inverse[i * head_dim + j] * row[j];
      out[i] = sum;
    }
    std::copy_n(out, head_dim, row);
  }
}

void inverse_row(const TransformSpec& transform, int kv_head, int head_dim, float* row) {
  if (transform.hadamard) {
    hadamard(head_dim, row);
    each_scaled(transform, kv_head, head_dim, row, std::divides<>());
  } else if (!transform.matrix.empty()) {
    times_matrix(head_matrix(transform.matrix_inverse, kv_head, head_dim), head_dim, row);
  }
  if (!transform.center.empty()) {
    const float* center = transform.center.data() + static_cast<ptrdiff_t>(kv_head) * head_dim;
    for (int i = 0; i < head_dim; ++i) row[i] += center[i];
  }
}

const float* head_feedback(const TransformSpec& transform, int kv_head, int head_dim) {
  if (transform.feedback.empty()) return nullptr;
  return transform.feedback.data() + static_cast<ptrdiff_t>(kv_head) * head_dim * (head_dim - 1) / 2;
}

}  // namespace kvmix
