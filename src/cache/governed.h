// A configuration with its policies: which layers they govern, in which widths, how many tokens and channels they keep.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "backend/page.h"
#include "kvmix/cache.h"
#include "policy/channels.h"
#include "policy/policy.h"

namespace kvmix {

struct Governed {
  // Throws as make_policy and make_channel_policy do, and kUnsupported for policies that this cache does not carry out.
  explicit Governed(CacheConfig given);

  bool governs(size_t layer) const { return policy != nullptr && Policy::governs(shapes[layer]); }
  // The channel policy leaves some of the layer's key channels out.
  bool thins(size_t layer) const { return channels != nullptr && thin[layer].bytes > 0; }
  // Whether channels are chosen where a prompt ends at this length: not while all of its tokens are kept as they are.
  bool chooses(size_t layer, int64_t length) const {
    const LayerConfig& l = config.layers[layer];
    return thins(layer) && length > l.sinks + (l.window.ratio_key > 0 || l.window.ratio_value > 0 ? 0 : l.window.tokens);
  }
  // The most tokens of a prompt that a KV head of the layer keeps, on average over the layer's.
  int64_t kept(size_t layer, int64_t prompt) const;
  // The same once n tokens have come in all, with what was dropped while decoding, and how many of these name their positions.
  struct Held {
    int64_t tokens, named;
  };
  Held held(size_t layer, int64_t prompt, int64_t n) const;

  // The policy wants what queries pay to each token.
  bool counts() const { return policy != nullptr && policy->needs().mass != MassReduce::kNone; }
  // Policies that act on decoded tokens are asked at the end of every kPageTokens-th step of one token behind a prompt, the
  // first a token earlier: with the token to come a page's worth has come since. So a head holds up to a page more than its
  // budget.
  bool decodes() const { return policy != nullptr && policy->needs().every_step; }
  // How often it was asked by when n tokens had come.
  static int64_t decisions(int64_t prompt, int64_t n) { return std::max<int64_t>(0, n - prompt + 1) / kPageTokens; }

  CacheConfig config;                       // with the widths that the policy asks for
  std::unique_ptr<Policy> policy;           // null: all tokens stay
  std::vector<LayerShape> shapes;           // by layer, with a policy
  std::vector<PageFormat> low;              // by layer, pages of the policy's low tier, if it has one
  std::unique_ptr<ChannelPolicy> channels;  // null: keys keep all channels
  std::vector<PageFormat> thin;             // by layer, sealed pages of chosen channels; of no bytes where all stay

 private:
  void govern_tokens();
  void govern_channels();
};

}  // namespace kvmix
