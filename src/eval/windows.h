// The windows of a text that evaluations run over.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kvmix/engine.h"

namespace kvmix {

// `count` windows of `context` tokens spread evenly over the text, all that it has where count is 0; each starts with BOS where
// the model is used to it. Throws kInvalidArgument for a text shorter than one window.
std::vector<std::vector<Token>> text_windows(const Model& model, const std::string& text, int64_t context, int count);

}  // namespace kvmix
