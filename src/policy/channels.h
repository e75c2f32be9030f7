// The contract between a cache and a channel policy: which channels of the keys a sequence stores once its prompt has been
// seen. The choice is per layer and KV head, in the basis that is stored (after row maps), and made where a prompt ends; it
// takes hold where pages are sealed. Sinks and rows that are not sealed keep all channels, values too. A policy holds no state.
// A policy is one file src/policy/NAME.cc and one line in channels.inc.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "kvmix/policy.h"
#include "policy/parameters.h"

namespace kvmix {

// One KV head of a layer at a prompt's end.
struct ChannelView {
  int heads_per_kv = 1;
  // Mean over the window's queries of their squares, [heads_per_kv][width], as they meet stored keys.
  std::span<const float> queries;
  // Mean over the tokens that stay of the squares of their keys, [width], as stored.
  std::span<const float> keys;
};

class ChannelPolicy {
 public:
  virtual ~ChannelPolicy() = default;
  // Queries of a prompt's end that ChannelView::queries is the mean of.
  virtual int window_queries() const = 0;
  // Channels of `width` that stay.
  virtual int kept(int width) const = 0;
  // Fills `channels`, at most as many as there are, with what stays, ascending.
  virtual void choose(const ChannelView& view, std::span<uint8_t> channels) const = 0;

  // The same as pages store it: a multiple of kWidthStep, rounded up; `width` if nothing is left out.
  int stored(int width) const;
};

// Throws as check_channels does.
std::unique_ptr<ChannelPolicy> make_channel_policy(const PolicySpec& spec);

struct ChannelPolicyEntry {
  PolicyInfo info;
  std::unique_ptr<ChannelPolicy> (*make)(const PolicyValues& values);
};

}  // namespace kvmix
