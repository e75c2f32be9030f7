#include "plan/transform_json.h"

#include <algorithm>
#include <cmath>
#include <span>
#include <vector>

#include "plan/half_text.h"
#include "rows/row_map.h"

namespace kvmix {
namespace {

constexpr size_t kMostValues = size_t{1} << 22;

// Visits the fields of all row maps of a kind.
template <class Visit>
void for_fields(FieldKind kind, const Visit& visit) {
  for (const RowMapInfo* map : row_map_registry()) {
    for (const RowMapField& field : map->fields) {
      if (field.kind == kind) visit(field);
    }
  }
}

}  // namespace

void write_transform(const TransformSpec& transform, nlohmann::ordered_json& object) {
  for_fields(FieldKind::kFlag, [&](const RowMapField& field) {
    if (field.present(transform)) object[field.name] = true;
  });
  for_fields(FieldKind::kHalfText, [&](const RowMapField& field) {
    const std::span<const float> values = field.numbers_of(transform);
    if (field.present(transform)) object[field.name] = half_text({values.begin(), values.end()});
  });
  if (!transform.feedback.empty()) object["feedback"] = half_text(transform.feedback);
  for_fields(FieldKind::kNumbers, [&](const RowMapField& field) {
    const std::span<const float> values = field.numbers_of(transform);
    if (!field.present(transform)) return;
    if (!std::all_of(values.begin(), values.end(), [](float x) { return std::isfinite(x); }))
      throw Error(Status::kInvalidArgument, "the numbers of \"" + std::string(field.name) +
                                                "\" are not finite; measure the model and make the plan again");
    object[field.name] = std::vector<float>(values.begin(), values.end());
  });
}

TransformSpec read_transform(JsonObject& object) {
  TransformSpec transform;
  for_fields(FieldKind::kFlag, [&](const RowMapField& field) {
    if (object.has(field.name) && object.boolean(field.name)) field.set(transform, {});
  });
  for_fields(FieldKind::kHalfText, [&](const RowMapField& field) {
    if (object.has(field.name)) field.set(transform, read_half_text(object, field.name, kMostValues));
  });
  if (object.has("feedback")) transform.feedback = read_half_text(object, "feedback", kMostValues);
  for_fields(FieldKind::kNumbers, [&](const RowMapField& field) {
    if (!object.has(field.beside == nullptr ? field.name : field.beside)) return;
    size_t least = 1, most = kMostValues;
    if (field.beside != nullptr) least = most = object.get(field.beside).size();
    const auto limit = static_cast<double>(field.limit);
    const std::vector<double> values = object.numbers(field.name, least, most, -limit, limit);
    field.set(transform, {values.begin(), values.end()});
  });
  return transform;
}

}  // namespace kvmix
