// Which positions of a text a plan's token policy keeps, by layer and KV head.
#pragma once

#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "kvmix/engine.h"

namespace kvmix::app {

struct LiveHead {
  int layer, head;
  std::vector<int64_t> positions, low;  // ascending; those in the policy's low tier stand in both
};
struct LiveTokens {
  std::string plan, policy;
  int64_t length = 0;           // of the text
  std::vector<LiveHead> heads;  // of the layers that the policy governs
};

// The text as a prompt to a cache of the plan, which has a token policy.
LiveTokens live_tokens(const std::shared_ptr<const Model>& model, const std::string& name, const Plan& plan,
                       std::span<const Token> text, int threads, bool force);

// A line a head: its part of the tokens and a strip of the text from left to right, darker where more stay.
std::string live_table(const LiveTokens& live, int columns);
// Positions as ranges [first, last].
nlohmann::json live_json(const LiveTokens& live);

}  // namespace kvmix::app
