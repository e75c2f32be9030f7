// Lists of accepted values in messages.
#pragma once

#include <span>
#include <string>

#include "kvmix/codec.h"

namespace kvmix {

// "1, 2 or 3", "1,2,3" (for braces).
std::string one_of(std::span<const int> values);
std::string alternatives(std::span<const int> values);

}  // namespace kvmix
