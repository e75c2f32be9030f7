// The transform of a side as fields of its JSON object, in plans and profiles alike.
#pragma once

#include "kvmix/cache.h"
#include "plan/json_reader.h"

namespace kvmix {

// Short fields first, lists of numbers last. Throws kInvalidArgument for numbers that are not finite.
void write_transform(const TransformSpec& transform, nlohmann::ordered_json& object);
// Throws like `object`'s other readers; whether sizes fit a layer is not known here.
TransformSpec read_transform(JsonObject& object);

}  // namespace kvmix
