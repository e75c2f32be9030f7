// What a task is to the engine.
#pragma once

#include <string>
#include <vector>

#include "kvmix/measure.h"

namespace kvmix {

struct TaskTokens {
  std::vector<Token> prompt;
  int64_t most;  // tokens that a continuation has to give the answer in
};
// Throws kInvalidArgument for one beyond the model's context.
TaskTokens task_tokens(const Model& model, const Task& task);

}  // namespace kvmix
