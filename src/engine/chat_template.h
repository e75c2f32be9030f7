// Chat templates: a conversation as the text that a model expects, with what its messages say told apart.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "kvmix/engine.h"

namespace kvmix {

struct ChatPart {
  std::string text;
  bool message;  // all of it comes from what messages say
};

// The conversation up to where the assistant's answer starts. `bos` and `eos` are the texts of those tokens. A template is a
// program from outside, so it runs in a process of its own. Throws kInvalidArgument for a name that libllama does not know,
// kUnsupported naming the template and, from Jinja, the reason.
std::vector<ChatPart> render_chat(const ChatTemplate& chat_template, std::span<const ChatMessage> messages,
                                  const std::string& bos, const std::string& eos);

}  // namespace kvmix
