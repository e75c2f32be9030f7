#include "eval/windows.h"

#include <algorithm>

#include "kvmix/error.h"

namespace kvmix {

std::vector<std::vector<Token>> text_windows(const Model& model, const std::string& text, int64_t context, int count) {
  if (context < 8) throw Error(Status::kInvalidArgument, "a window needs at least 8 tokens");
  const std::vector<Token> tokens = model.tokenize(text, false);
  const bool bos = !model.tokenize("", true).empty();
  const auto length = static_cast<size_t>(context);
  const size_t available = tokens.size() / length;
  if (available == 0) {
    throw Error(Status::kInvalidArgument, "the text has " + std::to_string(tokens.size()) +
                                              " tokens, less than one window of " + std::to_string(context) +
                                              "; give a longer text or a smaller --context");
  }
  const size_t taken = count == 0 ? available : std::min(available, static_cast<size_t>(count));
  std::vector<std::vector<Token>> windows;
  for (size_t w = 0; w < taken; ++w) {
    const auto start = tokens.begin() + static_cast<ptrdiff_t>(w * available / taken * length);
    windows.emplace_back(start, start + static_cast<ptrdiff_t>(length));
    if (bos && model.bos() >= 0) windows.back()[0] = model.bos();
  }
  return windows;
}

}  // namespace kvmix
