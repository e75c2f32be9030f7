// Special tokens that messages spell out, told apart from those that a chat template writes: each stands between two marks
// while it goes through the template, whatever that does with the text around it.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "engine/chat_template.h"

namespace kvmix {

class SpecialText {
 public:
  // `specials`: texts of special tokens. Throws kInvalidArgument for messages that leave no marks free.
  SpecialText(std::span<const ChatMessage> messages, std::vector<std::string> specials);

  std::vector<ChatMessage> marked(std::span<const ChatMessage> messages) const;
  // What a template made of marked messages, without marks and as few parts as there can be; what was between marks is a
  // message's.
  std::vector<ChatPart> parts(std::span<const ChatPart> rendered) const;

 private:
  std::string with_marks(const std::string& text) const;
  std::string without_marks(std::string text) const;
  void split(const std::string& text, std::vector<ChatPart>& out) const;

  std::vector<std::string> specials_;  // longest first
  std::string open_, close_;           // empty: no message has any
};

}  // namespace kvmix
