// y = x - center, for keys: q.(x - center) differs from q.x by what is the same for every key, which softmax does not see.
#include <random>

#include "rows/row_map.h"

namespace kvmix {
namespace {

constexpr RowMapField kFields[] = {
    {.name = "center", .kind = FieldKind::kNumbers, .numbers = &TransformSpec::center},
};

class Center final : public RowMap {
 public:
  Center(std::span<const float> center, int width) : center_(center), width_(width) {}
  int width() const override { return width_; }

  void store(int kv_head, float* row) const override {
    const float* center = head(kv_head);
    for (int i = 0; i < width_; ++i) row[i] -= center[i];
  }
  void query(int, float*) const override {}
  void output(int kv_head, float* row) const override {
    const float* center = head(kv_head);
    for (int i = 0; i < width_; ++i) row[i] += center[i];
  }

 private:
  const float* head(int kv_head) const { return center_.data() + static_cast<ptrdiff_t>(kv_head) * width_; }

  std::span<const float> center_;
  int width_;
};

std::unique_ptr<const RowMap> make(const TransformSpec& spec, const RowShape& shape, const RowMapErrors& errors) {
  if (spec.center.empty()) return nullptr;
  if (shape.softcap > 0) errors.fail("centred keys do not work with soft-capped scores; remove \"center\"");
  errors.check_numbers("center", spec.center, static_cast<size_t>(shape.kv_heads) * static_cast<size_t>(shape.width),
                       "kv_heads x head_dim");
  return std::make_unique<Center>(spec.center, shape.width);
}

void example(const RowShape& shape, unsigned seed, TransformSpec& spec) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  spec.center.resize(static_cast<size_t>(shape.kv_heads * shape.width));
  for (float& v : spec.center) v = normal(random);
}

}  // namespace

extern const RowMapInfo kCenterMap;
const RowMapInfo kCenterMap = {.name = "center",
                               .description = "keys less their mean",
                               .keys = true,
                               .values = false,
                               .exact = true,
                               .fields = kFields,
                               .make = make,
                               .example = example};

}  // namespace kvmix
