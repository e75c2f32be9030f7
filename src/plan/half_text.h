// Many numbers in a JSON file: fp16, little endian, base64.
#pragma once

#include <string>
#include <vector>

#include "plan/json_reader.h"

namespace kvmix {

std::string half_text(const std::vector<float>& values);
// At most `most` finite numbers. Throws like `object`'s other readers.
std::vector<float> read_half_text(JsonObject& object, const std::string& key, size_t most);

}  // namespace kvmix
