// The registry of channel policies.
#include "policy/channels.h"

#include <algorithm>
#include <array>
#include <vector>

#include "kvmix/codec.h"

namespace kvmix {

#define KVMIX_CHANNEL_POLICY(entry) extern const ChannelPolicyEntry entry;
#include "policy/channels.inc"
#undef KVMIX_CHANNEL_POLICY

namespace {

const std::array kPolicies = {
#define KVMIX_CHANNEL_POLICY(entry) &(entry),
#include "policy/channels.inc"
#undef KVMIX_CHANNEL_POLICY
};

}  // namespace

int ChannelPolicy::stored(int width) const {
  const int wanted = std::max(kept(width), kLeastWidth);
  return std::min(width, (wanted + kWidthStep - 1) / kWidthStep * kWidthStep);
}

std::span<const PolicyInfo> channel_policies() {
  static const std::vector<PolicyInfo> kInfos = [] {
    std::vector<PolicyInfo> infos;
    infos.reserve(std::size(kPolicies));
    for (const ChannelPolicyEntry* entry : kPolicies) infos.push_back(entry->info);
    return infos;
  }();
  return kInfos;
}

std::unique_ptr<ChannelPolicy> make_channel_policy(const PolicySpec& spec) {
  std::string names;
  for (const ChannelPolicyEntry* entry : kPolicies) {
    if (entry->info.name == spec.name) return entry->make(PolicyValues(entry->info, spec.values, "channel policy"));
    names += (names.empty() ? "" : ", ") + entry->info.name;
  }
  throw Error(Status::kInvalidArgument, "channel policy \"" + spec.name + "\" is unknown; expected one of " + names);
}

void check_channels(const PolicySpec& spec) { make_channel_policy(spec); }
int stored_channels(const PolicySpec& spec, int head_dim) { return make_channel_policy(spec)->stored(head_dim); }

}  // namespace kvmix
