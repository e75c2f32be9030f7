// Text that asks for what stands far back in it.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kvmix/engine.h"

namespace kvmix {

struct RecallText {
  std::vector<Token> tokens;
  std::vector<int64_t> answers;  // positions of tokens that can be known from an earlier place alone, at most kMostAnswers
};
inline constexpr size_t kMostAnswers = 96;

// As many tokens as `text`, which it is made of: statements of invented people's numbers and words are put in all over, and at
// the end they are said again in another order, then passages of the text. Answers are the numbers and words, and each passage
// behind its first tokens.
RecallText recall_text(const Model& model, std::span<const Token> text, uint64_t seed);

}  // namespace kvmix
