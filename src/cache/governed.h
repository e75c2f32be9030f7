// A configuration with its token policy: which layers it governs, in which widths, and how many tokens they keep.
#pragma once

#include <memory>
#include <vector>

#include "kvmix/cache.h"
#include "policy/policy.h"

namespace kvmix {

struct Governed {
  // Throws as make_policy does, and kUnsupported for a policy that this cache does not carry out.
  explicit Governed(CacheConfig given);

  bool governs(size_t layer) const { return policy != nullptr && Policy::governs(shapes[layer]); }
  // The most tokens of a prompt that a KV head of the layer keeps, on average over the layer's.
  int64_t kept(size_t layer, int64_t prompt) const;

  CacheConfig config;              // with the widths that the policy asks for
  std::unique_ptr<Policy> policy;  // null: all tokens stay
  std::vector<LayerShape> shapes;  // by layer, with a policy
};

}  // namespace kvmix
