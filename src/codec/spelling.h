// Words of spellings and plans, and lists of accepted values in messages.
#pragma once

#include <array>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "kvmix/codec.h"

namespace kvmix {

// "1, 2 or 3", "1,2,3" (for braces).
std::string one_of(std::span<const int> values);
std::string alternatives(std::span<const int> values);

// What a Fit is called, in the order of its numbers.
inline constexpr std::array kFitNames = {"minmax", "fitted", "unbiased"};
inline const char* fit_name(Fit fit) { return kFitNames[static_cast<size_t>(fit)]; }
inline std::optional<Fit> fit_named(std::string_view name) {
  for (size_t i = 0; i < kFitNames.size(); ++i) {
    if (name == kFitNames[i]) return static_cast<Fit>(i);
  }
  return std::nullopt;
}

}  // namespace kvmix
