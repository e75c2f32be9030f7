#include "policy/parameters.h"

#include <algorithm>
#include <charconv>
#include <cmath>

namespace kvmix {
namespace {

constexpr int kMostTokens = 1 << 30;

std::string number_text(double value) {
  char text[64];
  const auto end = std::to_chars(text, text + sizeof text, value);
  return {text, end.ptr};
}

std::string joined(const std::vector<std::string>& words) {
  std::string all;
  for (const std::string& word : words) all += (all.empty() ? "" : ", ") + word;
  return all;
}

std::string value_text(const PolicyValue& value) {
  if (const double* number = std::get_if<double>(&value)) return number_text(*number);
  return "\"" + std::get<std::string>(value) + "\"";
}

// A number may come as text, from a command line.
bool as_number(const PolicyValue& value, double& number) {
  if (const double* given = std::get_if<double>(&value)) {
    number = *given;
    return true;
  }
  const std::string& text = std::get<std::string>(value);
  const auto [at, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  return error == std::errc{} && at == text.data() + text.size();
}

}  // namespace

double Budget::exact(const LayerShape& shape, int64_t prompt_length) const {
  double count = tokens > 0 ? static_cast<double>(tokens) : keep * static_cast<double>(prompt_length);
  if (!f16_bytes) return count;
  const double bytes = shape.token_bytes[static_cast<int>(Tier::kHigh)];
  if (!(bytes > 0) || shape.head_dim < 1) {
    throw Error(Status::kInternal, "token policy: layer " + std::to_string(shape.layer) + " does not say the bytes of a token");
  }
  // Fractions of a token buy nothing in fp16, and nothing in another format.
  count = std::floor(count + 1e-9);
  return count * 4 * shape.head_dim / bytes;
}

int64_t Budget::capacity(const LayerShape& shape, int64_t prompt_length, const Protection& protection) const {
  // 0.29 * 100 is 28.999...: the sum is meant, not its rounding.
  const auto count = static_cast<int64_t>(std::floor(std::min(exact(shape, prompt_length), 1e15) + 1e-9));
  return std::max({count, protection.sinks + protection.window, int64_t{1}});
}

PolicyValues::PolicyValues(const PolicyInfo& info, const std::map<std::string, PolicyValue>& values, const char* kind)
    : info_(info), kind_(kind) {
  for (const auto& [name, value] : values) {
    const PolicyParameter& parameter = find(name);
    const std::string given = name + " is " + value_text(value) + "; expected ";
    if (parameter.kind == PolicyParameter::Kind::kChoice) {
      const std::string* text = std::get_if<std::string>(&value);
      if (text == nullptr || std::find(parameter.choices.begin(), parameter.choices.end(), *text) == parameter.choices.end()) {
        fail(given + "one of " + joined(parameter.choices));
      }
      values_[name] = value;
      continue;
    }
    double number = 0;
    const bool whole = parameter.kind == PolicyParameter::Kind::kInteger;
    if (!as_number(value, number) || !(number >= parameter.low && number <= parameter.high) ||
        (whole && number != std::floor(number))) {
      fail(given + (whole ? "a whole number from " : "a number from ") + number_text(parameter.low) + " to " +
           number_text(parameter.high));
    }
    values_[name] = number;
  }
}

void PolicyValues::fail(const std::string& what) const {
  throw Error(Status::kInvalidArgument, std::string(kind_) + " " + info_.name + ": " + what);
}

const PolicyParameter& PolicyValues::find(const std::string& name) const {
  std::vector<std::string> names;
  for (const PolicyParameter& parameter : info_.parameters) {
    if (parameter.name == name) return parameter;
    names.push_back(parameter.name);
  }
  fail("has no parameter \"" + name + "\"; it has " + joined(names));
}

double PolicyValues::number(const std::string& name) const {
  const auto it = values_.find(name);
  return it == values_.end() ? find(name).fallback : std::get<double>(it->second);
}

int PolicyValues::integer(const std::string& name) const { return static_cast<int>(number(name)); }

const std::string& PolicyValues::choice(const std::string& name) const {
  const auto it = values_.find(name);
  return it == values_.end() ? find(name).choices.front() : std::get<std::string>(it->second);
}

Budget PolicyValues::budget(int64_t always_kept) const {
  if (!is_default("keep") && !is_default("tokens")) fail("both keep and tokens are given; a budget is one of them");
  Budget budget{.keep = number("keep"), .tokens = integer("tokens"), .f16_bytes = f16_bytes_};
  // Bytes of fp16 tokens may buy enough tokens of fewer bits.
  if (!f16_bytes_ && budget.tokens > 0 && budget.tokens < always_kept) {
    fail("tokens is " + std::to_string(budget.tokens) + ", fewer than the " + std::to_string(always_kept) +
         " that sinks and window always keep; raise tokens or lower those");
  }
  return budget;
}

int PolicyValues::bits(const std::string& name) const {
  const int width = integer(name);
  if (width == 7 || (width > 8 && width < 16)) {
    fail(name + " is " + std::to_string(width) + "; expected 1 to 6, 8 or 16, or 0 for the plan's");
  }
  return width;
}

PolicyValues PolicyValues::for_host(const PolicyInfo& host) const {
  PolicyValues values(host, {});
  values.f16_bytes_ = f16_bytes_;
  for (const PolicyParameter& parameter : info_.parameters) {
    const std::string& name = parameter.name;
    const bool known = std::any_of(host.parameters.begin(), host.parameters.end(),
                                   [&](const PolicyParameter& theirs) { return theirs.name == name; });
    if (!known || (name == "sinks" && integer(name) == 0) || name == (integer("tokens") > 0 ? "keep" : "tokens")) continue;
    if (parameter.kind == PolicyParameter::Kind::kChoice) {
      values.values_[name] = choice(name);
    } else {
      values.values_[name] = number(name);
    }
  }
  return values;
}

PolicyParameter number_parameter(const char* name, double fallback, double low, double high, const char* help) {
  return {.name = name,
          .help = help,
          .kind = PolicyParameter::Kind::kNumber,
          .fallback = fallback,
          .low = low,
          .high = high,
          .choices = {}};
}
PolicyParameter integer_parameter(const char* name, int fallback, int low, int high, const char* help) {
  PolicyParameter parameter = number_parameter(name, fallback, low, high, help);
  parameter.kind = PolicyParameter::Kind::kInteger;
  return parameter;
}
PolicyParameter choice_parameter(const char* name, std::vector<std::string> choices, const char* help) {
  PolicyParameter parameter = number_parameter(name, 0, 0, 0, help);
  parameter.kind = PolicyParameter::Kind::kChoice;
  parameter.choices = std::move(choices);
  return parameter;
}
PolicyParameter keep_parameter() {
  return number_parameter("keep", 0.25, 1e-6, 1, "fraction of the prompt that a KV head keeps, sinks and window included");
}
PolicyParameter tokens_parameter() {
  return integer_parameter("tokens", 0, 0, kMostTokens, "the same as a count, instead of keep");
}
PolicyParameter sinks_parameter(int fallback) {
  return integer_parameter("sinks", fallback, 0, 4096, "first tokens always kept");
}
PolicyParameter window_parameter(int fallback, const char* help) {
  return integer_parameter("window", fallback, 1, 1 << 16, help);
}
PolicyParameter decode_parameter() {
  return choice_parameter("decode", {"evict", "append"}, "new tokens push others out (evict) or add to the prompt's (append)");
}
PolicyParameter every_parameter() {
  return integer_parameter("every", 1, 1, 1 << 16,
                           "decoded tokens whose attention counts: one in so many, that many times; 1 counts every one");
}
PolicyParameter bits_parameter(const char* name, int fallback) {
  return integer_parameter(name, fallback, 0, 16, "width: 1 to 6, 8 or 16 bits; 0 is the plan's");
}

std::string default_text(const PolicyParameter& parameter) {
  return parameter.kind == PolicyParameter::Kind::kChoice ? parameter.choices.front() : number_text(parameter.fallback);
}

PolicySpec parse_policy(const std::string& text) {
  PolicySpec spec;
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find(' ', at), text.size());
    const std::string word = text.substr(at, end - at);
    at = end + 1;
    if (word.empty()) continue;
    if (spec.name.empty()) {
      spec.name = word;
      continue;
    }
    const size_t equals = word.find('=');
    if (equals == std::string::npos || equals == 0) {
      throw Error(Status::kInvalidArgument, "token policy " + spec.name + ": '" + word +
                                                "' is no parameter; write name=value after the policy, e.g. keep=0.25");
    }
    const std::string name = word.substr(0, equals), value = word.substr(equals + 1);
    if (spec.values.contains(name))
      throw Error(Status::kInvalidArgument, "token policy " + spec.name + ": " + name + " is given twice");
    double number = 0;
    spec.values[name] = as_number(value, number) ? PolicyValue(number) : PolicyValue(value);
  }
  check_policy(spec);
  return spec;
}

std::string to_string(const PolicySpec& spec) {
  std::string text = spec.name;
  for (const auto& [name, value] : spec.values) {
    const std::string* word = std::get_if<std::string>(&value);
    text += " " + name + "=" + (word != nullptr ? *word : value_text(value));
  }
  return text;
}

}  // namespace kvmix
