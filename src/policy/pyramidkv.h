// PyramidKV's budgets, apart for tests.
#pragma once

#include <cstdint>

namespace kvmix {

struct Pyramid {
  enum class Rule {
    kWhole,  // whole numbers, the window on top: as the paper's code
    kReal,   // real numbers rounded once, the window inside; uniform where the top layer would not hold the window: kvpress
  };
  Rule rule = Rule::kWhole;
  int beta = 20;
  int64_t window = 32;

  // Tokens that a KV head of layer `ordinal` of `ordinals` keeps, window included, of a prompt of n tokens; `capacity` is the
  // mean over layers. At most n.
  int64_t tokens(double capacity, int64_t n, int ordinal, int ordinals) const;
};

}  // namespace kvmix
