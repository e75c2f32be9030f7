// Checked reading of JSON: every error names file, field, value and remedy; keys nobody asked for are refused.
#pragma once

#include <cmath>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "kvmix/error.h"

namespace kvmix {

// Parses text of bounded depth. Throws kCorrupt.
nlohmann::json parse_json(const std::string& text, const std::string& name);

bool is_number_within(const nlohmann::json& value, double low, double high);

class JsonObject {
 public:
  JsonObject(const nlohmann::json& value, std::string name, std::string field);
  // Call when every field has been read: throws for a key that was not asked for.
  void finish() const;

  bool has(const std::string& key) const { return value_.contains(key); }
  const nlohmann::json& get(const std::string& key);
  auto items() const { return value_.items(); }  // of an object whose keys are not known beforehand
  JsonObject object(const std::string& key) { return {get(key), name_, path(key)}; }
  std::string text(const std::string& key, size_t longest = 4096);
  bool boolean(const std::string& key);
  int64_t integer(const std::string& key, int64_t low, int64_t high);
  double number(const std::string& key, double low, double high);
  // All entries finite and within the range.
  std::vector<double> numbers(const std::string& key, size_t least, size_t most, double low, double high);
  const nlohmann::json& array(const std::string& key, size_t least, size_t most);

  [[noreturn]] void fail(const std::string& key, const std::string& what) const;
  // Of one entry of a list, such as "numbers[3]".
  [[noreturn]] void fail_entry(const std::string& entry, const nlohmann::json& value, const std::string& what) const;
  std::string path(const std::string& key) const { return field_.empty() ? key : field_ + "." + key; }
  const std::string& name() const { return name_; }

 private:
  const nlohmann::json& value_;
  std::string name_, field_;
  std::set<std::string> read_;
};

}  // namespace kvmix
