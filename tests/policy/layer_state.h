// A layer's stored tokens as a test holds them: hands out views and carries decisions out.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "policy/policy.h"

namespace kvmix {

struct LayerState {
  struct Head {
    std::vector<int64_t> positions;
    std::vector<Tier> tiers;
    std::vector<float> mass;
    std::vector<int32_t> queries;
    std::vector<float> window;  // [heads_per_kv][n]

    void append(int64_t position) {
      positions.push_back(position);
      tiers.push_back(Tier::kHigh);
      mass.push_back(0);
      queries.push_back(0);
    }
    size_t count(Tier tier) const { return static_cast<size_t>(std::count(tiers.begin(), tiers.end(), tier)); }
  };

  LayerShape shape;
  int64_t length = 0, prompt_length = 0;
  int window_rows = 0;
  std::vector<Head> heads;
  std::vector<HeadView> views;

  // A prompt of n tokens, every token in the high tier, no scores yet.
  LayerState(int64_t n, int kv_heads, int heads_per_kv = 1) : length(n), prompt_length(n), heads(kv_heads) {
    shape.kv_heads = kv_heads;
    shape.heads_per_kv = heads_per_kv;
    shape.head_dim = 64;
    shape.token_bytes = {256, 72};
    for (Head& head : heads) {
      for (int64_t p = 0; p < n; ++p) head.append(p);
      head.window.assign(n * heads_per_kv, 0);
    }
  }

  PolicyView view(Moment moment = Moment::kPromptEnd) {
    views.clear();
    const bool prompt_end = moment == Moment::kPromptEnd;
    for (const Head& head : heads) {
      views.push_back({.positions = head.positions,
                       .tiers = head.tiers,
                       .mass = head.mass,
                       .queries = head.queries,
                       .window = prompt_end ? std::span<const float>(head.window) : std::span<const float>()});
    }
    return {.shape = shape,
            .moment = moment,
            .length = length,
            .prompt_length = prompt_length,
            .incoming = prompt_end ? 0 : 1,
            .window_rows = prompt_end ? std::max(1, window_rows) : 0,
            .heads = views};
  }

  // Checks what every decision promises, then does it.
  void apply(const Decision& decision) {
    ASSERT_EQ(decision.heads.size(), heads.size());
    for (size_t h = 0; h < heads.size(); ++h) {
      Head& head = heads[h];
      const size_t n = head.positions.size();
      const HeadDecision& out = decision.heads[h];
      std::set<int32_t> dropped;
      int32_t last = -1;
      for (const int32_t token : out.drop) {
        ASSERT_GT(token, last) << "drops ascend";
        ASSERT_LT(token, static_cast<int32_t>(n));
        dropped.insert(last = token);
      }
      last = -1;
      for (const Move& move : out.move) {
        ASSERT_GT(move.token, last) << "moves ascend";
        ASSERT_LT(move.token, static_cast<int32_t>(n));
        ASSERT_FALSE(dropped.contains(move.token)) << "moved and dropped";
        ASSERT_NE(head.tiers[move.token], move.to) << "moved to where it is";
        head.tiers[last = move.token] = move.to;
      }
      Head left;
      for (size_t i = 0; i < n; ++i) {
        if (dropped.contains(static_cast<int32_t>(i))) continue;
        left.positions.push_back(head.positions[i]);
        left.tiers.push_back(head.tiers[i]);
        left.mass.push_back(head.mass[i]);
        left.queries.push_back(head.queries[i]);
      }
      const size_t rows = n == 0 ? 0 : head.window.size() / n;
      for (size_t r = 0; r < rows; ++r) {
        for (size_t i = 0; i < n; ++i) {
          if (!dropped.contains(static_cast<int32_t>(i))) left.window.push_back(head.window[r * n + i]);
        }
      }
      head = std::move(left);
    }
  }

  Decision decide(const Policy& policy, Moment moment = Moment::kPromptEnd) {
    PolicyScratch scratch;
    Decision decision;
    policy.decide(view(moment), scratch, decision);
    return decision;
  }
  void run(const Policy& policy, Moment moment = Moment::kPromptEnd) { apply(decide(policy, moment)); }

  std::vector<int64_t> kept(size_t head) const { return heads[head].positions; }
};

inline std::vector<int64_t> range(int64_t first, int64_t end) {
  std::vector<int64_t> all(static_cast<size_t>(end - first));
  std::iota(all.begin(), all.end(), first);
  return all;
}

inline std::vector<int64_t> join(std::vector<int64_t> a, const std::vector<int64_t>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

// The generator of the papers' traces: s = s * 1664525 + 1013904223, its upper 24 bits as a number in [0, 1).
class Lcg {
 public:
  explicit Lcg(uint32_t seed) : state_(seed) {}
  double uniform() {
    state_ = state_ * 1664525u + 1013904223u;
    return static_cast<double>(state_ >> 8) / 16777216.0;
  }
  double symmetric() { return 2 * uniform() - 1; }

 private:
  uint32_t state_;
};

}  // namespace kvmix
