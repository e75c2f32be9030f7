#include "rows/row_map.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <string_view>

#include "kvmix/error.h"

namespace kvmix {

#define KVMIX_ROW_MAP(name) extern const RowMapInfo name;
#include "rows/registry.inc"
#undef KVMIX_ROW_MAP

namespace {

const std::array kMaps = {
#define KVMIX_ROW_MAP(name) &name,
#include "rows/registry.inc"
#undef KVMIX_ROW_MAP
};

auto find_more(auto& spec, const char* name) {
  return std::find_if(spec.more.begin(), spec.more.end(), [name](const TransformSpec::Field& f) { return f.name == name; });
}

std::string quoted(std::string_view name) {
  std::string text = "\"";
  text += name.substr(0, 60);
  text += '"';
  return text;
}

bool has_field(const RowMapInfo& map, const std::string& name) {
  return std::any_of(map.fields.begin(), map.fields.end(), [&](const RowMapField& f) { return f.name == name; });
}

}  // namespace

std::span<const RowMapInfo* const> row_map_registry() { return kMaps; }

std::vector<RowMapListing> row_maps() {
  std::vector<RowMapListing> all;
  for (const RowMapInfo* map : kMaps) {
    RowMapListing& listing = all.emplace_back(RowMapListing{map->name, map->description, map->keys, map->values, {}});
    for (const RowMapField& field : map->fields) listing.fields.emplace_back(field.name);
  }
  return all;
}

bool RowMapField::present(const TransformSpec& spec) const {
  if (flag != nullptr) return spec.*flag;
  if (numbers != nullptr) return !(spec.*numbers).empty();
  return find_more(spec, name) != spec.more.end();
}

std::span<const float> RowMapField::numbers_of(const TransformSpec& spec) const {
  if (flag != nullptr) return {};
  if (numbers != nullptr) return spec.*numbers;
  const auto at = find_more(spec, name);
  return at == spec.more.end() ? std::span<const float>() : std::span<const float>(at->values);
}

void RowMapField::set(TransformSpec& spec, std::vector<float> values) const {
  if (flag != nullptr) {
    spec.*flag = true;
  } else if (numbers != nullptr) {
    spec.*numbers = std::move(values);
  } else if (const auto at = find_more(spec, name); at != spec.more.end()) {
    at->values = std::move(values);
  } else {
    // By name, so that equal parameters are equal specs.
    const auto after = std::find_if(spec.more.begin(), spec.more.end(), [this](const auto& f) { return f.name > name; });
    spec.more.insert(after, {name, std::move(values)});
  }
}

void RowMapErrors::fail(const std::string& what) const { throw Error(Status::kInvalidArgument, where_ + ": " + what); }

void RowMapErrors::check_numbers(const char* field, std::span<const float> values, size_t count, const char* meaning) const {
  if (values.size() == count && std::all_of(values.begin(), values.end(), [](float v) { return std::isfinite(v); })) return;
  fail(quoted(field) + " must hold " + std::to_string(count) + " finite numbers (" + meaning + ")");
}

RowMapChain::RowMapChain(const TransformSpec& spec, const RowShape& shape, const std::string& where)
    : width_(shape.width), room_(shape.width) {
  const RowMapErrors errors(where);
  for (const TransformSpec::Field& field : spec.more) {
    if (std::none_of(kMaps.begin(), kMaps.end(), [&](const RowMapInfo* map) { return has_field(*map, field.name); })) {
      errors.fail(quoted(field.name) + " belongs to no row map; remove it or check its spelling");
    }
  }
  for (const RowMapInfo* map : kMaps) {
    if (!(shape.side == Side::kKey ? map->keys : map->values)) {
      for (const RowMapField& field : map->fields) {
        if (!field.present(spec)) continue;
        errors.fail(quoted(field.name) + " is for " + (shape.side == Side::kKey ? "values" : "keys") + " only; remove it");
      }
      continue;
    }
    RowShape given = shape;
    given.width = width_;
    std::unique_ptr<const RowMap> made = map->make(spec, given, errors);
    if (made == nullptr) continue;
    width_ = made->width();
    room_ = std::max(room_, width_);
    maps_.push_back(std::move(made));
  }
  feedback_ = spec.feedback;
  if (!feedback_.empty()) {
    const auto heads = static_cast<size_t>(shape.kv_heads), width = static_cast<size_t>(width_);
    errors.check_numbers("feedback", feedback_, heads * width * (width - 1) / 2, "kv_heads x head_dim x (head_dim - 1) / 2");
  }
}

void RowMapChain::store(int kv_head, float* row) const {
  for (const auto& map : maps_) map->store(kv_head, row);
}

void RowMapChain::query(int kv_head, float* row) const {
  for (const auto& map : maps_) map->query(kv_head, row);
}

void RowMapChain::output(int kv_head, float* row) const {
  for (auto map = maps_.rbegin(); map != maps_.rend(); ++map) (*map)->output(kv_head, row);
}

const float* RowMapChain::feedback(int kv_head) const {
  if (feedback_.empty()) return nullptr;
  return feedback_.data() + static_cast<ptrdiff_t>(kv_head) * width_ * (width_ - 1) / 2;
}

}  // namespace kvmix
