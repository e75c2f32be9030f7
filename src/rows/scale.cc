// y = x S, S diagonal. A query meets it as q S^-1. Codes with a scale for each channel take no notice; those with one for all
// channels of a token, as recent rows have, keep small channels beside large ones.
#include "rows/scale.h"

#include <algorithm>
#include <random>

#include "rows/row_map.h"

namespace kvmix {
namespace {

constexpr RowMapField kFields[] = {
    {.name = kScaleField, .kind = FieldKind::kHalfText},
};

class Scale final : public RowMap {
 public:
  Scale(std::span<const float> scale, int width) : scale_(scale), width_(width) {}
  int width() const override { return width_; }

  void store(int kv_head, float* row) const override {
    const float* scale = head(kv_head);
    for (int i = 0; i < width_; ++i) row[i] *= scale[i];
  }
  void query(int kv_head, float* row) const override {
    const float* scale = head(kv_head);
    for (int i = 0; i < width_; ++i) row[i] /= scale[i];
  }
  void output(int kv_head, float* row) const override { query(kv_head, row); }

 private:
  const float* head(int kv_head) const { return scale_.data() + static_cast<ptrdiff_t>(kv_head) * width_; }

  std::span<const float> scale_;
  int width_;
};

std::unique_ptr<const RowMap> make(const TransformSpec& spec, const RowShape& shape, const RowMapErrors& errors) {
  if (!kFields[0].present(spec)) return nullptr;
  if (!spec.scales.empty())
    errors.fail("\"scale\" and \"scales\" exclude each other, since both multiply the channels; keep one of them");
  const std::span<const float> scale = scale_of(spec);
  errors.check_numbers("scale", scale, static_cast<size_t>(shape.kv_heads) * static_cast<size_t>(shape.width),
                       "kv_heads x head_dim");
  if (std::find(scale.begin(), scale.end(), 0.0f) != scale.end()) errors.fail("\"scale\" must hold numbers other than 0");
  return std::make_unique<Scale>(scale, shape.width);
}

void example(const RowShape& shape, unsigned seed, TransformSpec& spec) {
  std::mt19937 random(seed);
  std::uniform_int_distribution<int> eighths(1, 64);
  std::vector<float> scale(static_cast<size_t>(shape.kv_heads * shape.width));
  for (float& v : scale) v = static_cast<float>(eighths(random)) / (random() % 3 == 0 ? -8.0f : 8.0f);
  kFields[0].set(spec, std::move(scale));
}

}  // namespace

std::span<const float> scale_of(const TransformSpec& spec) { return kFields[0].numbers_of(spec); }
void set_scale(TransformSpec& spec, std::vector<float> scale) { kFields[0].set(spec, std::move(scale)); }

extern const RowMapInfo kScaleMap;
const RowMapInfo kScaleMap = {.name = "scale",
                              .description = "channels scaled, whatever comes after",
                              .keys = true,
                              .values = false,
                              .exact = true,
                              .fields = kFields,
                              .make = make,
                              .example = example};

}  // namespace kvmix
