// Token policies: which tokens of a sequence a cache keeps, and in which precision. A plan names one with its parameters:
//     "tokens": {"policy": "snapkv", "keep": 0.25, "window": 32}
// Layers with a sliding window drop tokens by themselves: every policy leaves them alone.
//
// Channel policies: which channels of keys a sequence's sealed pages hold, chosen where its prompt ends:
//     "channels": {"policy": "think", "keep": 0.6}
#pragma once

#include <map>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "kvmix/error.h"
#include "kvmix/export.h"

namespace KVMIX_API kvmix {

struct PolicyParameter {
  enum class Kind { kNumber, kInteger, kChoice };
  std::string name;
  std::string help;  // one line, without the default
  Kind kind = Kind::kNumber;
  double fallback = 0, low = 0, high = 0;  // numbers: default and range, both ends included
  std::vector<std::string> choices;        // choices: the first is the default
};
// The default as `kvmix list` prints it: "0.25", "32", "avg".
std::string default_text(const PolicyParameter& parameter);

struct PolicyInfo {
  std::string name;         // "snapkv"
  std::string description;  // one line
  std::string paper;        // "arXiv 2404.14469"
  std::vector<PolicyParameter> parameters;
};
// The registry, for `kvmix list` and for tests that run through every policy.
std::span<const PolicyInfo> policies();

using PolicyValue = std::variant<double, std::string>;

// A policy and the parameters that differ from its defaults.
struct PolicySpec {
  std::string name;
  std::map<std::string, PolicyValue> values;
  friend bool operator==(const PolicySpec&, const PolicySpec&) = default;
};
// "snapkv keep=0.25 window=32".
std::string to_string(const PolicySpec& spec);
// The inverse, checked as check_policy does.
PolicySpec parse_policy(const std::string& text);

// Throws kInvalidArgument in one line: an unknown policy or parameter with those there are, a value out of range, a budget
// smaller than sinks and window.
void check_policy(const PolicySpec& spec);
// Whether such a policy counts what every query pays to each token, or has a second tier of tokens: what the device "cuda" does
// not do. Throws as check_policy does.
bool counts_or_tiers(const PolicySpec& spec);

// The same of channel policies.
std::span<const PolicyInfo> channel_policies();
void check_channels(const PolicySpec& spec);
// Channels of a key of head_dim that are stored under such a policy. Throws as check_channels does.
int stored_channels(const PolicySpec& spec, int head_dim);

}  // namespace kvmix
