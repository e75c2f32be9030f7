#include "profile/json_lines.h"

#include <nlohmann/json.hpp>
#include <sstream>

#include "kvmix/error.h"

namespace kvmix {
namespace {

// Calls `take(value, number)` for each line that is not blank; the value is discarded() if the line is no JSON.
template <class Take>
void for_lines(const std::string& content, const Take& take) {
  std::istringstream lines(content);
  std::string line;
  for (size_t number = 1; std::getline(lines, line); ++number) {
    if (!trimmed(line).empty()) take(nlohmann::json::parse(line, nullptr, false), number);
  }
}

// The text of a field; empty if there is none.
std::string text_of(const nlohmann::json& value, const char* key) {
  const bool there = value.is_object() && value.contains(key) && value[key].is_string();
  return there ? value[key].get<std::string>() : "";
}

}  // namespace

std::string trimmed(const std::string& text) {
  const char* spaces = " \t\r\n";
  const size_t first = text.find_first_not_of(spaces);
  return first == std::string::npos ? "" : text.substr(first, text.find_last_not_of(spaces) - first + 1);
}

std::vector<std::string> parse_texts(const std::string& content, const std::string& name) {
  std::vector<std::string> texts;
  for_lines(content, [&](const nlohmann::json& value, size_t number) {
    if (!value.is_object() || !value.contains("text") || !value["text"].is_string()) {
      throw Error(Status::kCorrupt, name + ": line " + std::to_string(number) +
                                        " is not an object with a \"text\"; write {\"text\": ...}, one a line");
    }
    texts.push_back(value["text"]);
  });
  return texts;
}

std::vector<Task> parse_tasks(const std::string& content, const std::string& name) {
  std::vector<Task> tasks;
  for_lines(content, [&](const nlohmann::json& value, size_t number) {
    const auto text = [&](const char* key) {
      std::string found = text_of(value, key);
      if (trimmed(found).empty()) {
        throw Error(Status::kCorrupt,
                    name + ": line " + std::to_string(number) + " is not an object with a \"" + key +
                        "\"; write {\"prompt\": ..., \"answer\": ...} and, if at all, \"kind\" as text, one a line");
      }
      return found;
    };
    std::string prompt = text("prompt"), answer = text("answer");
    tasks.push_back({std::move(prompt), std::move(answer), value.contains("kind") ? text("kind") : ""});
  });
  if (tasks.size() < 3) {
    throw Error(Status::kInvalidArgument,
                name + ": " + std::to_string(tasks.size()) + " tasks; give at least 3, of which the last third is held out");
  }
  return tasks;
}

}  // namespace kvmix
