// y = x S H: S diagonal ("scales", or all 1), H orthonormal Hadamard blocks over the largest power of two that divides the
// width. A query meets it as q S^-1 H.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <random>

#include "rows/row_map.h"

namespace kvmix {
namespace {

constexpr RowMapField kFields[] = {
    {.name = "hadamard", .kind = FieldKind::kFlag, .flag = &TransformSpec::hadamard},
    {.name = "scales", .kind = FieldKind::kHalfText, .numbers = &TransformSpec::scales},
};

using Four = float __attribute__((vector_size(16)));

Four load_four(const float* x) {
  Four v;
  std::memcpy(&v, x, sizeof v);
  return v;
}
void store_four(float* x, Four v) { std::memcpy(x, &v, sizeof v); }

// Orthonormal Hadamard of each block; its own inverse. Every step of a decode transforms each head's query and output, so it
// is written with vectors; blocks have at least 16 elements.
void hadamard(int width, float* x) {
  const int block = width & -width;
  for (int i = 0; i < width; i += 4) {
    Four v = load_four(x + i);
    v = __builtin_shufflevector(v, v, 1, 0, 3, 2) + v * Four{1, -1, 1, -1};
    v = __builtin_shufflevector(v, v, 2, 3, 0, 1) + v * Four{1, 1, -1, -1};
    store_four(x + i, v);
  }
  const Four norm = Four{1, 1, 1, 1} / std::sqrt(static_cast<float>(block));
  for (int half = 4; half < block; half *= 2) {
    const Four scale = 2 * half == block ? norm : Four{1, 1, 1, 1};
    for (int i = 0; i < width; i += 2 * half) {
      for (int j = i; j < i + half; j += 4) {
        const Four a = load_four(x + j), b = load_four(x + j + half);
        store_four(x + j, (a + b) * scale);
        store_four(x + j + half, (a - b) * scale);
      }
    }
  }
}

class Hadamard final : public RowMap {
 public:
  Hadamard(std::span<const float> scales, int width) : scales_(scales), width_(width) {}
  int width() const override { return width_; }

  void store(int kv_head, float* row) const override {
    each_scaled(kv_head, row, std::multiplies<>());
    hadamard(width_, row);
  }
  void query(int kv_head, float* row) const override {
    each_scaled(kv_head, row, std::divides<>());
    hadamard(width_, row);
  }
  void output(int kv_head, float* row) const override {
    hadamard(width_, row);
    each_scaled(kv_head, row, std::divides<>());
  }

 private:
  template <class Op>
  void each_scaled(int kv_head, float* x, const Op& op) const {
    if (scales_.empty()) return;
    const float* scales = scales_.data() + static_cast<ptrdiff_t>(kv_head) * width_;
    for (int i = 0; i < width_; ++i) x[i] = op(x[i], scales[i]);
  }

  std::span<const float> scales_;
  int width_;
};

std::unique_ptr<const RowMap> make(const TransformSpec& spec, const RowShape& shape, const RowMapErrors& errors) {
  if (!spec.scales.empty()) {
    if (!spec.hadamard) errors.fail("\"scales\" belong to a Hadamard transform; set \"hadamard\" or remove them");
    const size_t count = static_cast<size_t>(shape.kv_heads) * static_cast<size_t>(shape.width);
    errors.check_numbers("scales", spec.scales, count, "kv_heads x head_dim");
    if (std::find(spec.scales.begin(), spec.scales.end(), 0.0f) != spec.scales.end()) {
      errors.fail("\"scales\" must hold numbers other than 0");
    }
  }
  if (!spec.hadamard) return nullptr;
  return std::make_unique<Hadamard>(spec.scales, shape.width);
}

void example(const RowShape& shape, unsigned seed, TransformSpec& spec) {
  spec.hadamard = true;
  if (seed % 2 == 0) return;
  std::mt19937 random(seed);
  // Powers of two and such between, as fp16 holds them.
  std::uniform_int_distribution<int> eighths(2, 32);
  spec.scales.resize(static_cast<size_t>(shape.kv_heads * shape.width));
  for (float& v : spec.scales) v = static_cast<float>(eighths(random)) / (random() % 3 == 0 ? -8.0f : 8.0f);
}

}  // namespace

extern const RowMapInfo kHadamardMap;
const RowMapInfo kHadamardMap = {.name = "hadamard",
                                 .description = "rotation by Hadamard blocks, channels scaled before it",
                                 .keys = true,
                                 .values = true,
                                 .exact = true,
                                 .fields = kFields,
                                 .make = make,
                                 .example = example};

}  // namespace kvmix
