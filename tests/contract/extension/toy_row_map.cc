// A row map for scripts/extend that keeps a part of a row: the even channels, times a number of the head.
#include <algorithm>

#include "rows/row_map.h"

namespace kvmix {
namespace {

constexpr RowMapField kFields[] = {
    {.name = "toy_even", .kind = FieldKind::kFlag},
    {.name = "toy_gain", .kind = FieldKind::kNumbers, .limit = 100},
};

class Toy final : public RowMap {
 public:
  Toy(std::span<const float> gain, int width) : gain_(gain), width_(width) {}
  int width() const override { return width_ / 2; }
  void store(int kv_head, float* row) const override {
    for (int i = 0; i < width_ / 2; ++i) row[i] = row[2 * i] * gain(kv_head);
  }
  void query(int kv_head, float* row) const override {
    for (int i = 0; i < width_ / 2; ++i) row[i] = row[2 * i] / gain(kv_head);
  }
  void output(int kv_head, float* row) const override {
    for (int i = width_ / 2; i-- > 0;) {
      row[2 * i] = row[i] / gain(kv_head);
      row[2 * i + 1] = 0;
    }
  }

 private:
  float gain(int kv_head) const { return gain_[static_cast<size_t>(kv_head)]; }

  std::span<const float> gain_;
  int width_;
};

std::unique_ptr<const RowMap> make(const TransformSpec& spec, const RowShape& shape, const RowMapErrors& errors) {
  const std::span<const float> gain = kFields[1].numbers_of(spec);
  if (!kFields[0].present(spec)) {
    if (!gain.empty()) errors.fail("\"toy_gain\" belongs to \"toy_even\"; set it");
    return nullptr;
  }
  errors.check_numbers("toy_gain", gain, static_cast<size_t>(shape.kv_heads), "kv_heads");
  if (std::find(gain.begin(), gain.end(), 0.0f) != gain.end()) errors.fail("\"toy_gain\" must not be 0");
  return std::make_unique<Toy>(gain, shape.width);
}

void example(const RowShape& shape, unsigned seed, TransformSpec& spec) {
  kFields[0].set(spec, {});
  std::vector<float> gain;
  for (int head = 0; head < shape.kv_heads; ++head) gain.push_back(0.5f + static_cast<float>(head) + static_cast<float>(seed));
  kFields[1].set(spec, gain);
}

}  // namespace

extern const RowMapInfo kToyMap;
const RowMapInfo kToyMap = {.name = "toy",
                            .description = "the even channels",
                            .keys = true,
                            .values = true,
                            .exact = false,
                            .fields = kFields,
                            .make = make,
                            .example = example};

}  // namespace kvmix
