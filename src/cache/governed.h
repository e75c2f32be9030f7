// A configuration with its token policy: which layers it governs, in which widths, and how many tokens they keep.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "backend/page.h"
#include "kvmix/cache.h"
#include "policy/policy.h"

namespace kvmix {

struct Governed {
  // Throws as make_policy does, and kUnsupported for a policy that this cache does not carry out.
  explicit Governed(CacheConfig given);

  bool governs(size_t layer) const { return policy != nullptr && Policy::governs(shapes[layer]); }
  // The most tokens of a prompt that a KV head of the layer keeps, on average over the layer's.
  int64_t kept(size_t layer, int64_t prompt) const;
  // The same once n tokens have come in all, with what was dropped while decoding, and how many of these name their positions.
  struct Held {
    int64_t tokens, named;
  };
  Held held(size_t layer, int64_t prompt, int64_t n) const;

  // Policies that act on decoded tokens are asked at the end of every kPageTokens-th step of one token behind a prompt, the
  // first a token earlier: with the token to come a page's worth has come since. So a head holds up to a page more than its
  // budget.
  bool decodes() const { return policy != nullptr && policy->needs().every_step; }
  // How often it was asked by when n tokens had come.
  static int64_t decisions(int64_t prompt, int64_t n) { return std::max<int64_t>(0, n - prompt + 1) / kPageTokens; }

  CacheConfig config;              // with the widths that the policy asks for
  std::unique_ptr<Policy> policy;  // null: all tokens stay
  std::vector<LayerShape> shapes;  // by layer, with a policy
  std::vector<PageFormat> low;     // by layer, pages of the policy's low tier, if it has one
};

}  // namespace kvmix
