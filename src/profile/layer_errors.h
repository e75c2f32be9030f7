// What a codec does to one layer's attention output, and what that costs by the gradients of one pass.
#pragma once

#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include "kvmix/cache.h"
#include "profile/gradients.h"

namespace kvmix {

struct CodecErrors {
  double output = 0;  // squared error of the attention output, relative to the output's energy
  // Second-order loss in nats per token: half the mean of (output gradient . output error)^2, heads together, over pairs of a
  // query and a token near it that the gradient is taken of. A query's own gradient alone is one draw, and noisy; those of the
  // whole text lose that errors and gradients are large in the same places.
  double fisher = 0;
  // Of answers only: what the errors at their queries cost one that stands at even odds, in nats. With d the rise of its
  // log-odds loss, log (1 + e^d) - log 2 = d / 2 + d^2 / 8 + ..., the mean of which is taken; of the first term what exceeds
  // its standard error, for errors are draws, and only a shift that all answers share adds up over layers.
  double recall = NAN;  // not measured
};

// One layer of one pass with nothing quantised. Attention is computed for queries spread over the second half; each reads rows
// from sealed pages where the running cache would.
class LayerErrors {
 public:
  // `layer` has the sinks and window of the running cache. Keeps both references. `answers`: as of the pass; then the queries
  // that say them are taken, and `recall` alone is measured.
  LayerErrors(const LayerConfig& layer, const LayerRows& rows, std::span<const int64_t> answers = {});
  // Of this side quantised alone, recent rows exact; of `recent` rows of this side alone, stored through the config's maps and
  // feedback. From several threads at once.
  CodecErrors sealed(const SideConfig& config, Side side) const;
  CodecErrors recent(const SideConfig& config, const CodecSpec& recent, Side side) const;

 private:
  // Rows of both sides as queries read them, sealed or not, [kv_head][n][head_dim].
  struct Read {
    const float *sealed_keys, *sealed_values, *keys, *values;
  };
  Read exact() const { return {keys_.data(), values_.data(), keys_.data(), values_.data()}; }
  std::vector<float> outputs(const Read& read) const;
  CodecErrors errors(const Read& read) const;
  double recall(const std::vector<float>& changed) const;

  const LayerConfig& layer_;
  const std::vector<float>&queries_, &keys_, &values_, &gradient_;
  int64_t n_;
  int width_;  // of the attention output, q_heads * head_dim
  bool asked_;
  std::vector<int64_t> sampled_;
  std::vector<float> exact_;
  double energy_ = 1e-30;
};

}  // namespace kvmix
