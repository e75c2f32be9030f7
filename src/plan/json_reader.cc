#include "plan/json_reader.h"

#include <algorithm>

namespace kvmix {
namespace {

constexpr int kDeepest = 16;

std::string shown(const nlohmann::json& value) {
  std::string text = value.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace);
  if (text.size() > 60) text = text.substr(0, 57) + "...";
  return text;
}

}  // namespace

nlohmann::json parse_json(const std::string& text, const std::string& name) {
  // The parser recurses, so depth is checked before it runs.
  int depth = 0, deepest = 0;
  bool quoted = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (quoted) {
      if (c == '\\') ++i;
      if (c == '"') quoted = false;
    } else if (c == '"') {
      quoted = true;
    } else if (c == '{' || c == '[') {
      deepest = std::max(deepest, ++depth);
    } else if (c == '}' || c == ']') {
      --depth;
    }
  }
  if (deepest > kDeepest)
    throw Error(Status::kCorrupt, name + ": nested deeper than " + std::to_string(kDeepest) + "; this is no kvmix file");
  try {
    return nlohmann::json::parse(text);
  } catch (const nlohmann::json::exception& e) {
    std::string what = e.what();
    if (const size_t tag = what.find("] "); what.starts_with('[') && tag != std::string::npos) what.erase(0, tag + 2);
    std::string clean;
    for (const char c : what.substr(0, 160))
      clean += static_cast<unsigned char>(c) < 0x20 || static_cast<unsigned char>(c) > 0x7e ? '?' : c;
    throw Error(Status::kCorrupt, name + ": not valid JSON (" + clean + "); write the file again");
  }
}

bool is_number_within(const nlohmann::json& value, double low, double high) {
  return value.is_number() && std::isfinite(value.get<double>()) && value.get<double>() >= low && value.get<double>() <= high;
}

JsonObject::JsonObject(const nlohmann::json& value, std::string name, std::string field)
    : value_(value), name_(std::move(name)), field_(std::move(field)) {
  if (!value_.is_object()) {
    throw Error(Status::kCorrupt,
                name_ + ": " + (field_.empty() ? "the file" : field_) + " is " + shown(value_) + "; expected an object");
  }
}

void JsonObject::fail(const std::string& key, const std::string& what) const {
  const auto it = value_.find(key);
  throw Error(Status::kCorrupt,
              name_ + ": " + path(key) + (it == value_.end() ? " is missing; " : " is " + shown(*it) + "; ") + what);
}

void JsonObject::fail_entry(const std::string& entry, const nlohmann::json& value, const std::string& what) const {
  throw Error(Status::kCorrupt, name_ + ": " + path(entry) + " is " + shown(value) + "; " + what);
}

void JsonObject::finish() const {
  for (const auto& [key, value] : value_.items()) {
    if (!read_.contains(key)) {
      throw Error(Status::kCorrupt,
                  name_ + ": " + path(key.substr(0, 60)) + " is not a known field; remove it or check its spelling");
    }
  }
}

const nlohmann::json& JsonObject::get(const std::string& key) {
  read_.insert(key);
  const auto it = value_.find(key);
  if (it == value_.end()) fail(key, "add it or make the file again");
  return *it;
}

std::string JsonObject::text(const std::string& key, size_t longest) {
  const nlohmann::json& v = get(key);
  if (!v.is_string() || v.get_ref<const std::string&>().size() > longest)
    fail(key, "expected text of at most " + std::to_string(longest) + " bytes");
  const std::string& text = v.get_ref<const std::string&>();  // terminals obey control characters
  if (std::any_of(text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7f; }))
    fail(key, "expected text without control characters");
  return text;
}

bool JsonObject::boolean(const std::string& key) {
  const nlohmann::json& v = get(key);
  if (!v.is_boolean()) fail(key, "expected true or false");
  return v;
}

int64_t JsonObject::integer(const std::string& key, int64_t low, int64_t high) {
  const nlohmann::json& v = get(key);
  const bool fits = v.is_number_unsigned() ? v.get<uint64_t>() <= static_cast<uint64_t>(INT64_MAX) : v.is_number_integer();
  if (!fits || v.get<int64_t>() < low || v.get<int64_t>() > high) {
    fail(key, "expected a whole number from " + std::to_string(low) + " to " + std::to_string(high));
  }
  return v;
}

double JsonObject::number(const std::string& key, double low, double high) {
  const nlohmann::json& v = get(key);
  if (!is_number_within(v, low, high)) {
    fail(key, "expected a number from " + nlohmann::json(low).dump() + " to " + nlohmann::json(high).dump());
  }
  return v;
}

const nlohmann::json& JsonObject::array(const std::string& key, size_t least, size_t most) {
  const nlohmann::json& v = get(key);
  if (!v.is_array() || v.size() < least || v.size() > most) {
    fail(key,
         "expected a list of " + std::to_string(least) + (most == least ? "" : " to " + std::to_string(most)) + " entries");
  }
  return v;
}

std::vector<double> JsonObject::numbers(const std::string& key, size_t least, size_t most, double low, double high) {
  std::vector<double> out;
  const nlohmann::json& values = array(key, least, most);
  for (size_t i = 0; i < values.size(); ++i) {
    if (!is_number_within(values[i], low, high)) {
      fail_entry(key + "[" + std::to_string(i) + "]", values[i],
                 "expected numbers from " + nlohmann::json(low).dump() + " to " + nlohmann::json(high).dump() + " only");
    }
    out.push_back(values[i].get<double>());
  }
  return out;
}

}  // namespace kvmix
