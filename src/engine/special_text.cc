#include "engine/special_text.h"

#include <algorithm>

#include "kvmix/error.h"

namespace kvmix {
namespace {

// Unicode's noncharacters U+FDD0 to U+FDEF in UTF-8: no text should have any.
constexpr int kFirstMark = 0xfdd0, kLastMark = 0xfdef;

std::string utf8(int c) {
  return {static_cast<char>(0xe0 | (c >> 12)), static_cast<char>(0x80 | ((c >> 6) & 0x3f)),
          static_cast<char>(0x80 | (c & 0x3f))};
}

}  // namespace

SpecialText::SpecialText(std::span<const ChatMessage> messages, std::vector<std::string> specials)
    : specials_(std::move(specials)) {
  const auto some_message = [&](const std::string& text) {
    return std::any_of(messages.begin(), messages.end(),
                       [&](const ChatMessage& m) { return m.content.find(text) != std::string::npos; });
  };
  std::erase_if(specials_, [&](const std::string& s) { return s.empty() || !some_message(s); });
  if (specials_.empty()) return;
  std::sort(specials_.begin(), specials_.end(), [](const auto& a, const auto& b) { return a.size() > b.size(); });
  for (int c = kFirstMark; c <= kLastMark && close_.empty(); ++c) {
    if (!some_message(utf8(c))) (open_.empty() ? open_ : close_) = utf8(c);
  }
  if (close_.empty()) {
    throw Error(Status::kInvalidArgument,
                "the messages have all of the characters U+FDD0 to U+FDEF, which stand for nothing; leave one out");
  }
}

std::vector<ChatMessage> SpecialText::marked(std::span<const ChatMessage> messages) const {
  std::vector<ChatMessage> out(messages.begin(), messages.end());
  for (ChatMessage& m : out) m.content = with_marks(m.content);
  return out;
}

std::string SpecialText::with_marks(const std::string& text) const {
  if (specials_.empty()) return text;
  std::string out;
  for (size_t at = 0; at < text.size();) {
    const auto special = std::find_if(specials_.begin(), specials_.end(),
                                      [&](const std::string& s) { return text.compare(at, s.size(), s) == 0; });
    if (special == specials_.end()) {
      out += text[at++];
      continue;
    }
    out += open_ + *special + close_;
    at += special->size();
  }
  return out;
}

std::string SpecialText::without_marks(std::string text) const {
  for (const std::string& mark : {open_, close_}) {
    for (size_t at = 0; !mark.empty() && (at = text.find(mark, at)) != std::string::npos;) text.erase(at, mark.size());
  }
  return text;
}

std::vector<ChatPart> SpecialText::parts(std::span<const ChatPart> rendered) const {
  std::vector<ChatPart> split_up;
  for (const ChatPart& part : rendered) {
    if (specials_.empty()) {
      split_up.push_back({part.text, false});  // nothing to tell apart: a tokenizer is given all at once
    } else if (part.message) {
      split_up.push_back({without_marks(part.text), true});
    } else {
      split(part.text, split_up);
    }
  }
  std::vector<ChatPart> out;
  for (ChatPart& part : split_up) {
    if (part.text.empty()) continue;
    if (!out.empty() && out.back().message == part.message) {
      out.back().text += part.text;
    } else {
      out.push_back(std::move(part));
    }
  }
  return out;
}

void SpecialText::split(const std::string& text, std::vector<ChatPart>& out) const {
  size_t done = 0;
  for (size_t open = text.find(open_); open != std::string::npos; open = text.find(open_, open + 1)) {
    const size_t begin = open + open_.size(), close = text.find(close_, begin);
    // A template may have taken out a mark's other end; two ends that do not belong together are not taken for a pair.
    const std::string between = close == std::string::npos ? "" : text.substr(begin, close - begin);
    if (std::find(specials_.begin(), specials_.end(), between) == specials_.end()) continue;
    out.push_back({without_marks(text.substr(done, open - done)), false});
    out.push_back({between, true});
    done = close + close_.size();
  }
  out.push_back({without_marks(text.substr(done)), false});
}

}  // namespace kvmix
