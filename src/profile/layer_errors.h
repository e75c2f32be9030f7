// What codecs do to one layer's attention output, and what that costs by the gradients of one pass.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "attention/cpu/float_ops.h"
#include "kvmix/cache.h"
#include "profile/gradients.h"
#include "rows/row_map.h"

namespace kvmix {

struct CodecErrors {
  double output = 0;  // squared error of the attention output, relative to the output's energy
  // Second-order loss in nats per token: half the mean of (output gradient . output error)^2, heads together, over pairs of a
  // query and a token near it that the gradient is taken of. A query's own gradient alone is one draw, and noisy; those of the
  // whole text lose that errors and gradients are large in the same places.
  double fisher = 0;
};

// A side of a layer as it is stored.
struct StoredSide {
  Side side;
  const TransformSpec* transform;  // rows are mapped once for those that share one
  CodecSpec codec;
  bool recent;  // rows that are not sealed yet are stored so, and no others; else rows of sealed pages
};

// One layer of one pass with nothing quantised. Attention is computed for queries spread over the second half; each reads rows
// from sealed pages where the running cache would. Queries meet keys as they are stored, and outputs are mapped back, not rows.
class LayerErrors {
 public:
  // `layer` has the sinks and window of the running cache. Keeps both references.
  LayerErrors(const LayerConfig& layer, const LayerRows& rows, int threads);
  // Of each of these alone, all else exact.
  std::vector<CodecErrors> errors(std::span<const StoredSide> all) const;

 private:
  static constexpr int kLanes = 32;
  static constexpr int64_t kNear = 10, kNeighbours = 2 * kNear + 1;  // tokens either side of a query, and with it
  // Keys that some query of a block reads from sealed pages, or else.
  struct Span {
    int64_t begin, end;
    int size() const { return static_cast<int>(end - begin); }
  };
  // Of the keys of a span with nothing quantised, 0 where a query reads the other kind or none, by lanes.
  struct Part {
    Span keys;
    std::vector<float> scores, weights;  // [rows][keys]
    std::array<float, kLanes> mass;      // sum of the weights
    std::vector<float> output;           // [rows][head_dim]
  };
  // Queries of one KV head, which are computed together: a key is read once for all.
  struct Block {
    int kv_head, lanes;
    int rows, columns;                               // lanes as products take them, rounded up; what is behind them is not read
    std::array<size_t, kLanes> sample, head;         // which of the sampled queries, and its query head
    std::array<int64_t, kLanes> first, end, sealed;  // keys it sees, and before which of them it reads sealed pages
    std::vector<float> queries;                      // [columns][head_dim], times the scale
    Part of_sealed, of_recent;
  };
  struct Task;
  struct HeadErrors;

  const float* head_of(const std::vector<float>& rows, int head) const {
    return rows.data() + static_cast<ptrdiff_t>(head) * n_ * layer_.head_dim;
  }
  std::vector<Block> blocks() const;
  void attend(Block& block) const;
  // Weights [rows][keys that the block sees] of scores.
  void weigh(const Block& block, const float* sealed, const float* recent, std::vector<float>& weights) const;
  // Scores [columns][keys] of keys [n][width] and queries [width][columns].
  void score(const Block& block, const float* keys, const Span& span, const float* queries, int width, std::vector<float>& room,
             std::vector<float>& scores) const;
  void measure(const Task& task, std::span<const StoredSide> all, std::span<HeadErrors> errors) const;
  void add_errors(const Block& block, const float* changed, HeadErrors& errors) const;

  const FloatOps& ops_;  // products of rows are those of latents
  const LayerConfig& layer_;
  const LayerRows& rows_;
  int64_t n_;
  int threads_;
  std::vector<int64_t> sampled_;
  std::vector<Block> blocks_;    // those of a head side by side
  std::vector<float> gradient_;  // of the second half, [q_head][n - n / 2][head_dim]
  double energy_ = 1e-30;
};

}  // namespace kvmix
