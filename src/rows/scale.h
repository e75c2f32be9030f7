// The "scale" map's numbers in a TransformSpec.
#pragma once

#include <span>
#include <vector>

#include "kvmix/cache.h"

namespace kvmix {

inline constexpr const char* kScaleField = "scale";
// What channels are multiplied by, [kv_heads * width] numbers other than 0; empty without the map.
std::span<const float> scale_of(const TransformSpec& spec);
void set_scale(TransformSpec& spec, std::vector<float> scale);

}  // namespace kvmix
