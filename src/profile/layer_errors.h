// What a codec does to one layer's attention output, and what that costs by the gradients of one pass.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "attention/cpu/float_ops.h"
#include "kvmix/cache.h"
#include "profile/gradients.h"

namespace kvmix {

struct CodecErrors {
  double output = 0;  // squared error of the attention output, relative to the output's energy
  // Second-order loss in nats per token: half the mean of (output gradient . output error)^2, heads together, over pairs of a
  // query and a token near it that the gradient is taken of. A query's own gradient alone is one draw, and noisy; those of the
  // whole text lose that errors and gradients are large in the same places.
  double fisher = 0;
};

// One layer of one pass with nothing quantised. Attention is computed for queries spread over the second half; each reads rows
// from sealed pages where the running cache would.
class LayerErrors {
 public:
  // `layer` has the sinks and window of the running cache. Keeps both references.
  LayerErrors(const LayerConfig& layer, const LayerRows& rows, int threads);
  // Of this side quantised alone, recent rows exact; of `recent` rows of this side alone, stored through the config's maps and
  // feedback. From several threads at once.
  CodecErrors sealed(const SideConfig& config, Side side) const;
  CodecErrors recent(const SideConfig& config, const CodecSpec& recent, Side side) const;

 private:
  static constexpr int kLanes = 16;
  // Queries of one KV head, which are computed together: a key is read once for all.
  struct Block {
    int kv_head;
    std::array<size_t, kLanes> out;                  // where a query's output begins, or, of lanes that are left over, kNowhere
    std::array<int64_t, kLanes> first, end, sealed;  // keys it sees, and before which of them it reads sealed pages
    std::vector<float> queries;                      // [head_dim][kLanes], times the scale
  };
  static constexpr size_t kNowhere = SIZE_MAX;
  // Rows of a side of one KV head as queries read them, sealed or not, [n][head_dim].
  struct Read {
    const float *sealed, *recent;
  };
  // Keys that some query of a block reads so.
  struct Span {
    int64_t begin, end;
    int size() const { return static_cast<int>(end - begin); }
  };
  static Span sealed_keys(const Block& block);
  static Span recent_keys(const Block& block);
  // [kLanes][keys]: of those spans, 0 where a query reads the other or none.
  struct Weights {
    std::vector<float> sealed, recent;
  };
  std::vector<Block> blocks() const;
  Weights weights(const Block& block, const Read& keys) const;
  void attend(const Block& block, const Weights& weights, const Read& values, std::vector<float>& out) const;
  template <class Store>
  CodecErrors errors(Side side, bool sealed, const Store& store) const;

  const FloatOps& ops_;  // products of rows are those of latents
  const LayerConfig& layer_;
  const std::vector<float>&queries_, &keys_, &values_, &gradient_;
  int64_t n_;
  int width_;  // of the attention output, q_heads * head_dim
  std::vector<int64_t> sampled_;
  std::vector<Block> blocks_;     // those of a head side by side
  std::vector<Weights> weights_;  // of each block with exact keys
  std::vector<float> exact_;      // attention output of the sampled queries, [query][q_head][head_dim]
  double energy_ = 1e-30;
};

}  // namespace kvmix
