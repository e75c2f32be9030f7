#include "engine/chat_template.h"

#include <jinja/caps.h>
#include <jinja/lexer.h>
#include <jinja/parser.h>
#include <jinja/runtime.h>
#include <llama.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <string_view>

#include "base/child.h"
#include "engine/library_call.h"
#include "kvmix/error.h"

namespace kvmix {
namespace {

constexpr char kRendered = 'r', kRefused = 'e';

// The engine's messages show the source around the place over several lines; kept are the place and the reason.
std::string reason_of(const std::string& message) {
  const auto line_at = [&](size_t at) { return message.substr(at, message.find('\n', at) - at); };
  const size_t error = message.rfind("Error: ");
  std::string reason = line_at(error == std::string::npos ? message.find_first_not_of('\n') : error + std::strlen("Error: "));
  constexpr const char* kRaised = "Jinja Exception: ";
  if (reason.starts_with(kRaised)) return "it says: " + reason.substr(std::strlen(kRaised));
  if (const size_t place = message.find(" at line "); place != std::string::npos) {
    const std::string where = line_at(place + std::strlen(" at "));
    reason += " (" + where.substr(0, where.find(" in source")) + ")";
  }
  return reason;
}

jinja::value text_value(const std::string& text, bool message) {
  auto value = jinja::mk_val<jinja::value_string>(text);
  if (message) value->mark_input();
  return value;
}

jinja::value message_value(const ChatMessage& message, bool typed) {
  auto value = jinja::mk_val<jinja::value_object>();
  value->insert("role", text_value(message.role, false));
  jinja::value content = text_value(message.content, true);
  if (typed) {  // a list of pieces of text, pictures and so on
    auto piece = jinja::mk_val<jinja::value_object>();
    piece->insert("type", text_value("text", false));
    piece->insert("text", content);
    auto pieces = jinja::mk_val<jinja::value_array>();
    pieces->push_back(piece);
    content = pieces;
  }
  value->insert("content", content);
  return value;
}

// Parts as bytes: length, whether it is a message's, text.
std::string packed(const jinja::string& rendered) {
  std::string out(1, kRendered);
  for (const jinja::string_part& part : rendered.parts) {
    const uint64_t size = part.val.size();
    out.append(reinterpret_cast<const char*>(&size), sizeof size);
    out += part.is_input ? '\1' : '\0';
    out += part.val;
  }
  return out;
}

std::vector<ChatPart> unpacked(const std::string& bytes) {
  std::vector<ChatPart> parts;
  for (size_t at = 1; at < bytes.size();) {
    uint64_t size = 0;
    std::memcpy(&size, bytes.data() + at, sizeof size);
    at += sizeof size;
    parts.push_back({bytes.substr(at + 1, size), bytes[at] != '\0'});
    at += 1 + size;
  }
  return parts;
}

std::string rendered_by_jinja(const std::string& source, std::span<const ChatMessage> messages, const std::string& bos,
                              const std::string& eos) {
  try {
    jinja::lexer lexer;
    const jinja::lexer_result tokens = lexer.tokenize(source);
    jinja::program program = jinja::parse_from_tokens(tokens);
    const jinja::caps caps = jinja::caps_get(program);
    const bool typed = caps.supports_typed_content && !caps.supports_string_content;
    jinja::context context(source);
    auto list = jinja::mk_val<jinja::value_array>();
    for (const ChatMessage& message : messages) list->push_back(message_value(message, typed));
    context.set_val("messages", list);
    context.set_val("bos_token", text_value(bos, false));
    context.set_val("eos_token", text_value(eos, false));
    context.set_val("add_generation_prompt", jinja::mk_val<jinja::value_bool>(true));
    jinja::runtime runtime(context);
    return packed(jinja::runtime::gather_string_parts(runtime.execute(program))->val_str);
  } catch (const std::bad_alloc&) {
    throw;  // the limit of memory
  } catch (const std::exception& e) {
    // The engine makes an error of a line of what it catches there.
    if (std::string_view(e.what()).find(std::bad_alloc().what()) != std::string_view::npos) throw std::bad_alloc();
    return kRefused + reason_of(e.what());
  }
}

std::vector<ChatPart> render_jinja(const ChatTemplate& chat_template, std::span<const ChatMessage> messages,
                                   const std::string& bos, const std::string& eos) {
  const auto answer = run_in_child([&] { return rendered_by_jinja(chat_template.source, messages, bos, eos); }, ChildLimits{});
  if (!answer) {
    throw Error(Status::kUnsupported,
                chat_template.name + " does not come to an end within its time and memory, so it is damaged; give another");
  }
  if (answer->front() == kRefused)
    throw Error(Status::kUnsupported, chat_template.name + " cannot write this conversation: " + answer->substr(1));
  return unpacked(*answer);
}

std::vector<ChatPart> render_named(const std::string& name, std::span<const ChatMessage> messages) {
  const auto names = chat_template_names();
  if (std::find(names.begin(), names.end(), name) == names.end()) {
    std::string known;
    for (const std::string& n : names) known += (known.empty() ? "" : ", ") + n;
    throw Error(Status::kInvalidArgument,
                "'" + name + "' is no chat template: give a file with Jinja, or a name that llama.cpp knows (" + known + ")");
  }
  std::vector<llama_chat_message> chat;
  for (const ChatMessage& m : messages) chat.push_back({m.role.c_str(), m.content.c_str()});
  std::string out(1024, '\0');
  const LibraryCall guard;
  for (;;) {
    const int n =
        llama_chat_apply_template(name.c_str(), chat.data(), chat.size(), true, out.data(), static_cast<int32_t>(out.size()));
    if (n < 0) throw Error(Status::kUnsupported, "chat template '" + name + "' cannot write this conversation");
    const bool whole = static_cast<size_t>(n) <= out.size();
    out.resize(static_cast<size_t>(n));
    if (whole) return {{out, false}};
  }
}

}  // namespace

std::vector<std::string> chat_template_names() {
  std::vector<const char*> names(static_cast<size_t>(llama_chat_builtin_templates(nullptr, 0)));
  llama_chat_builtin_templates(names.data(), names.size());
  return {names.begin(), names.end()};
}

std::vector<ChatPart> render_chat(const ChatTemplate& chat_template, std::span<const ChatMessage> messages,
                                  const std::string& bos, const std::string& eos) {
  return chat_template.source.empty() ? render_named(chat_template.name, messages)
                                      : render_jinja(chat_template, messages, bos, eos);
}

}  // namespace kvmix
