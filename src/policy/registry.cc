// The registry of policies, and what holds for all of them.
#include <algorithm>
#include <iterator>

#include "policy/parameters.h"

namespace kvmix {

#define KVMIX_POLICY(entry) extern const PolicyEntry entry;
#include "policy/registry.inc"
#undef KVMIX_POLICY

namespace {

const std::array kPolicies = {
#define KVMIX_POLICY(entry) &(entry),
#include "policy/registry.inc"
#undef KVMIX_POLICY
};

[[noreturn]] void broken(const PolicyView& view, const std::string& what) {
  throw Error(Status::kInternal, "token policy: the view of layer " + std::to_string(view.shape.layer) + " " + what);
}

}  // namespace

std::span<const PolicyInfo> policies() {
  static const std::vector<PolicyInfo> kInfos = [] {
    std::vector<PolicyInfo> infos;
    std::transform(kPolicies.begin(), kPolicies.end(), std::back_inserter(infos), [](const PolicyEntry* p) { return p->info; });
    return infos;
  }();
  return kInfos;
}

std::unique_ptr<Policy> make_policy(const PolicySpec& spec) {
  std::string names;
  for (const PolicyEntry* entry : kPolicies) {
    if (entry->info.name == spec.name) return entry->make(PolicyValues(entry->info, spec.values));
    names += (names.empty() ? "" : ", ") + entry->info.name;
  }
  throw Error(Status::kInvalidArgument, "token policy \"" + spec.name + "\" is unknown; expected one of " + names);
}

void check_policy(const PolicySpec& spec) { make_policy(spec); }

bool counts_or_tiers(const PolicySpec& spec) {
  const std::unique_ptr<Policy> policy = make_policy(spec);
  return policy->needs().mass != MassReduce::kNone || policy->has_low_tier();
}

bool Decision::empty() const {
  return std::all_of(heads.begin(), heads.end(), [](const HeadDecision& h) { return h.drop.empty() && h.move.empty(); });
}

void Decision::clear(size_t kv_heads) {
  heads.resize(kv_heads);
  for (HeadDecision& head : heads) {
    head.drop.clear();
    head.move.clear();
    // Enough for any step of decoding, from the first on.
    head.drop.reserve(8);
    head.move.reserve(8);
  }
}

void Policy::decide(const PolicyView& view, PolicyScratch& scratch, Decision& decision) const {
  const LayerShape& shape = view.shape;
  if (!governs(shape)) {
    throw Error(Status::kUnsupported, "layer " + std::to_string(shape.layer) + " has a sliding window of " +
                                          std::to_string(shape.sliding_window) +
                                          " tokens and drops them by itself; token policies leave it alone");
  }
  const Needs wanted = needs();
  const bool prompt_end = view.moment == Moment::kPromptEnd;
  if (view.heads.size() != static_cast<size_t>(shape.kv_heads)) {
    broken(view, "has " + std::to_string(view.heads.size()) + " of " + std::to_string(shape.kv_heads) + " KV heads");
  }
  decision.clear(view.heads.size());
  if (prompt_end ? view.length != view.prompt_length || view.incoming != 0 : view.incoming < 1) {
    broken(view, "mixes up the end of a prompt with a token to come");
  }
  if (!prompt_end && !wanted.every_step) return;
  for (const HeadView& head : view.heads) {
    const size_t n = head.size();
    if (wanted.mass != MassReduce::kNone && (head.mass.size() != n || head.queries.size() != n)) broken(view, "lacks mass");
    if (head.tiers.size() != n) broken(view, "lacks tiers");
    if (prompt_end && wanted.window_queries > 0 && (head.window.size() != n * shape.heads_per_kv || view.window_rows < 1)) {
      broken(view, "lacks the window's rows");
    }
  }
  if (prompt_end) {
    decide_prompt(view, scratch, decision);
  } else {
    decide_token(view, scratch, decision);
  }
}

}  // namespace kvmix
