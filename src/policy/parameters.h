// A policy's parameters as typed values, and the budget that most policies share.
#pragma once

#include <string>
#include <vector>

#include "policy/policy.h"

namespace kvmix {

// How many tokens a KV head may hold.
struct Budget {
  double keep = 1;     // fraction of the prompt; used where
  int64_t tokens = 0;  // a count is not given
  // What is spent is the bytes of so many fp16 tokens, on tokens of the high tier (quantised pruning, arXiv 2412.12706).
  bool f16_bytes = false;

  // Never less than the protected tokens, or one.
  int64_t capacity(const LayerShape& shape, int64_t prompt_length, const Protection& protection) const;
  // The same before it is rounded down, without that floor.
  double exact(const LayerShape& shape, int64_t prompt_length) const;
};

// Checks names and ranges once, when made; throws kInvalidArgument. `kind` is what messages call the policy.
class PolicyValues {
 public:
  PolicyValues(const PolicyInfo& info, const std::map<std::string, PolicyValue>& values, const char* kind = "token policy");

  double number(const std::string& name) const;
  int integer(const std::string& name) const;
  const std::string& choice(const std::string& name) const;
  int bits(const std::string& name) const;  // a width there is, or 0
  bool is_default(const std::string& name) const { return !values_.contains(name); }
  // `keep` or `tokens`. Throws if both are given, or a count below the tokens that are always kept.
  Budget budget(int64_t always_kept) const;
  // What another policy gets of these: every parameter that both have, defaults included, and the budget that was given. Sinks
  // of 0 leave it its own.
  PolicyValues for_host(const PolicyInfo& host) const;

  void set_f16_bytes() { f16_bytes_ = true; }
  [[noreturn]] void fail(const std::string& what) const;

 private:
  const PolicyParameter& find(const std::string& name) const;
  const PolicyInfo& info_;
  const char* kind_;
  std::map<std::string, PolicyValue> values_;
  bool f16_bytes_ = false;
};

// A line of the registry.
struct PolicyEntry {
  PolicyInfo info;
  std::unique_ptr<Policy> (*make)(const PolicyValues& values);
};

// Parameters that mean the same in every policy that has them.
PolicyParameter number_parameter(const char* name, double fallback, double low, double high, const char* help);
PolicyParameter integer_parameter(const char* name, int fallback, int low, int high, const char* help);
PolicyParameter choice_parameter(const char* name, std::vector<std::string> choices, const char* help);
PolicyParameter keep_parameter();
PolicyParameter tokens_parameter();
PolicyParameter sinks_parameter(int fallback);
PolicyParameter window_parameter(int fallback, const char* help = "newest tokens always kept");
PolicyParameter decode_parameter();
PolicyParameter every_parameter();  // Needs::mass_every
PolicyParameter bits_parameter(const char* name, int fallback);

}  // namespace kvmix
