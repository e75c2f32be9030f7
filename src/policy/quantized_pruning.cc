// Quantised pruning, "More Tokens, Lower Precision" (arXiv 2412.12706): a budget in bytes of fp16 tokens is spent on more
// tokens of fewer bits. Another policy chooses them. Scales are charged: a token costs what the cache says it does.
#include <algorithm>

#include "policy/parameters.h"

namespace kvmix {

extern const PolicyEntry kStreamingPolicy, kH2oPolicy, kSnapkvPolicy, kPyramidkvPolicy;

namespace {

const PolicyEntry& host_entry(const std::string& name) {
  for (const PolicyEntry* entry : {&kSnapkvPolicy, &kPyramidkvPolicy, &kH2oPolicy, &kStreamingPolicy}) {
    if (entry->info.name == name) return *entry;
  }
  throw Error(Status::kInternal, "quantized-pruning has no host \"" + name + "\"");
}

std::unique_ptr<Policy> make_host(PolicyValues values) {
  const PolicyEntry& entry = host_entry(values.choice("host"));
  values.set_f16_bytes();
  values.budget(0);
  for (const char* name : {"window", "pooling", "kernel"}) {
    const auto& known = entry.info.parameters;
    if (!values.is_default(name) && std::none_of(known.begin(), known.end(), [&](const auto& p) { return p.name == name; })) {
      values.fail("the host " + entry.info.name + " has no " + name);
    }
  }
  return entry.make(values.for_host(entry.info));
}

class QuantizedPruning final : public Policy {
 public:
  explicit QuantizedPruning(const PolicyValues& values)
      : host_(make_host(values)), bits_{values.bits("k-bits"), values.bits("v-bits")} {}

  Needs needs() const override { return host_->needs(); }
  std::array<TierBits, kTiers> tiers() const override { return {bits_, TierBits{}}; }
  bool heads_share() const override { return host_->heads_share(); }
  Protection protection(const LayerShape& shape, int64_t prompt_length) const override {
    return host_->protection(shape, prompt_length);
  }
  int64_t most_tokens(const LayerShape& shape, int64_t prompt_length) const override {
    return host_->most_tokens(shape, prompt_length);
  }
  int64_t most_decoding(const LayerShape& shape, int64_t prompt_length) const override {
    return host_->most_decoding(shape, prompt_length);
  }

 protected:
  void decide_prompt(const PolicyView& view, PolicyScratch& scratch, Decision& decision) const override {
    host_->decide(view, scratch, decision);
  }
  void decide_token(const PolicyView& view, PolicyScratch& scratch, Decision& decision) const override {
    host_->decide(view, scratch, decision);
  }

 private:
  std::unique_ptr<Policy> host_;
  TierBits bits_;
};

}  // namespace

extern const PolicyEntry kQuantizedPruningPolicy;
const PolicyEntry kQuantizedPruningPolicy = {
    {"quantized-pruning",
     "more tokens at fewer bits for the bytes of fewer tokens at 16",
     "arXiv 2412.12706",
     {number_parameter("keep", 0.0625, 1e-6, 1, "budget: the bytes of this fraction of the prompt in fp16"),
      integer_parameter("tokens", 0, 0, 1 << 30, "the same as a count of fp16 tokens, instead of keep"),
      bits_parameter("k-bits", 4), bits_parameter("v-bits", 4),
      choice_parameter("host", {"snapkv", "pyramidkv", "h2o", "streaming"}, "the policy that chooses tokens"),
      integer_parameter("sinks", 0, 0, 4096, "first tokens always kept; 0 is the host's number"),
      window_parameter(8, "as the host's; snapkv and pyramidkv have one"),
      choice_parameter("pooling", {"max", "avg", "none"}, "as the host's"),
      integer_parameter("kernel", 7, 1, 255, "as the host's")}},
    [](const PolicyValues& values) -> std::unique_ptr<Policy> { return std::make_unique<QuantizedPruning>(values); }};

}  // namespace kvmix
