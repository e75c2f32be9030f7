// The contract between a cache and a token policy. A policy decides and touches no memory: it is handed what a layer stores and
// what attention measured, and says what to drop and what to move to another tier. It has no state, so the same view gives the
// same decision on any thread, and a sequence can be forked, saved or aborted without asking it.
// A policy is one file src/policy/NAME.cc and one line in registry.inc.
//
// When a cache asks, for each layer that governs() accepts:
//   kPromptEnd    once, when the last chunk of a prompt has been attended to; never between chunks, so that chunked and whole
//                 prompts give the same result. A sequence's second prompt ends like its first.
//   kBeforeToken  only with needs().every_step: before tokens that are decoded, when the mass of the token before is in. A
//   cache
//                 may ask before each token, or once for so many (`since`). If a step brings several tokens, once for all of
//                 them (`incoming`).
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "kvmix/policy.h"

namespace kvmix {

// How the query heads of one KV head become one number.
enum class MassReduce : uint8_t { kNone, kMean, kMax };

// What a policy wants from attention; nothing else is measured.
struct Needs {
  // Mass of a stored token and KV head, accumulated over queries: for each query, the mean or max over the KV head's query
  // heads of its softmax weight.
  MassReduce mass = MassReduce::kNone;
  // At a prompt's end the mass is not that of all its queries but of its window rows: the mean or max over query heads of
  // their sums. Then prompts need the window pass only.
  bool mass_from_window = false;
  // Decoded tokens pay where their position is a multiple of this, so many times: an unbiased estimate of what all of them pay.
  // 1 counts every one.
  int mass_every = 1;
  // Softmax rows of the last this many queries of a prompt, summed, per query head.
  int window_queries = 0;
  bool every_step = false;
};

enum class Tier : uint8_t { kHigh, kLow };
inline constexpr int kTiers = 2;
// Widths that a policy asks for in a tier; 0: the plan's own.
struct TierBits {
  int key = 0, value = 0;
  friend bool operator==(const TierBits&, const TierBits&) = default;
};

struct LayerShape {
  int layer = 0, layers = 1;  // of the model
  // The same among the layers that policies govern: budgets that depend on depth go by these.
  int ordinal = 0, ordinals = 1;
  int kv_heads = 1, heads_per_kv = 1, head_dim = 0;
  int sliding_window = 0;  // 0: full attention
  // Bytes of one token of one KV head in each tier, key and value, with scales: what a page's bytes divided by its slots are.
  std::array<double, kTiers> token_bytes{};
};

// The n stored tokens of one KV head. Spans that the policy did not ask for are empty.
struct HeadView {
  std::span<const int64_t> positions;  // [n] ascending; the original ones
  std::span<const Tier> tiers;         // [n]
  std::span<const float> mass;         // [n] Needs::mass
  std::span<const int32_t> queries;    // [n] how many queries `mass` has counted of each token; with Needs::mass
  // [heads_per_kv][n], row after row: Needs::window_queries; only at a prompt's end.
  std::span<const float> window;
  size_t size() const { return positions.size(); }
};

enum class Moment : uint8_t { kPromptEnd, kBeforeToken };

struct PolicyView {
  LayerShape shape;
  Moment moment = Moment::kPromptEnd;
  int64_t length = 0;         // tokens the sequence has seen; the next position
  int64_t prompt_length = 0;  // `length` when its last prompt ended: what `keep` is a fraction of
  int incoming = 0;           // kBeforeToken: tokens about to be appended
  // kBeforeToken: tokens that have come since the policy was asked before. One that acts on a token at a time acts as often.
  int64_t since = 1;
  int window_rows = 0;              // queries in HeadView::window: window_queries, or fewer if the prompt was shorter
  std::span<const HeadView> heads;  // [kv_heads]
};

struct Move {
  int32_t token;  // index into the HeadView's spans
  Tier to;
  friend bool operator==(const Move&, const Move&) = default;
};
struct HeadDecision {
  std::vector<int32_t> drop;  // indices into the HeadView's spans, ascending, none twice
  std::vector<Move> move;     // likewise; no token that is dropped, none that is in that tier
};
struct Decision {
  std::vector<HeadDecision> heads;  // [kv_heads]
  bool empty() const;
  void clear(size_t kv_heads);  // keeps memory
};

// Working memory of decisions. Reuse one per thread: after warm-up a decision at a decode step allocates nothing.
struct PolicyScratch {
  std::vector<double> score, pooled, more;
  std::vector<int32_t> order, count;
  std::vector<uint8_t> keep;
};

// Tokens that a decision never touches, counted by position.
struct Protection {
  int64_t sinks = 0;   // positions below this
  int64_t window = 0;  // the newest, counting those about to be appended
};

class Policy {
 public:
  virtual ~Policy() = default;
  virtual Needs needs() const = 0;
  // kHigh, kLow. A policy with one tier moves nothing.
  virtual std::array<TierBits, kTiers> tiers() const { return {}; }
  virtual bool has_low_tier() const { return false; }
  // All KV heads of a layer keep the same tokens.
  virtual bool heads_share() const { return false; }
  virtual Protection protection(const LayerShape& shape, int64_t prompt_length) const = 0;
  // The most tokens that the layer's KV heads hold together after a prompt of this length (of a sequence's first prompt), for
  // size predictions; kv_heads * prompt_length where it depends on what attention sees.
  virtual int64_t most_tokens(const LayerShape& shape, int64_t prompt_length) const = 0;
  // The same after a decision before a token that is decoded; kUnbounded where that depends on what attention sees.
  static constexpr int64_t kUnbounded = INT64_MAX;
  virtual int64_t most_decoding(const LayerShape&, int64_t /*prompt_length*/) const { return kUnbounded; }

  // The one rule for sliding-window layers: caches do not ask about them.
  static bool governs(const LayerShape& shape) { return shape.sliding_window == 0; }

  // Overwrites `decision`. Scores may be anything: NaN counts as 0, infinities as the largest float. Ties keep the lower index.
  // Throws kUnsupported for a layer it does not govern, kInternal for a view without what needs() asks for.
  void decide(const PolicyView& view, PolicyScratch& scratch, Decision& decision) const;

 protected:
  virtual void decide_prompt(const PolicyView& view, PolicyScratch& scratch, Decision& decision) const = 0;
  virtual void decide_token(const PolicyView&, PolicyScratch&, Decision&) const {}
};

// Throws as check_policy does.
std::unique_ptr<Policy> make_policy(const PolicySpec& spec);

}  // namespace kvmix
