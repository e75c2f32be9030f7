#include "profile/layer_errors.h"

#include <algorithm>

#include "base/parallel.h"
#include "cache/layout.h"
#include "score/stored_page.h"

namespace kvmix {
namespace {

constexpr int kSampledQueries = 96;
constexpr int64_t kNear = 10;  // tokens either side of a query

}  // namespace

LayerErrors::LayerErrors(const LayerConfig& layer, const LayerRows& rows, int threads)
    : ops_(float_ops(false)),
      layer_(layer),
      queries_(rows.queries),
      keys_(rows.keys),
      values_(rows.values),
      gradient_(rows.output_gradient),
      n_(static_cast<int64_t>(keys_.size()) / (layer.kv_heads * layer.head_dim)),
      width_(layer.q_heads * layer.head_dim) {
  const int64_t half = n_ / 2, step = std::max<int64_t>(1, (n_ - half) / kSampledQueries);
  for (int64_t t = half; t < n_; t += step) sampled_.push_back(t);
  blocks_ = blocks();
  weights_.resize(blocks_.size());
  exact_.resize(sampled_.size() * static_cast<size_t>(width_));
  parallel_for(threads, blocks_.size(), [&](size_t b) {
    const ptrdiff_t head = static_cast<ptrdiff_t>(blocks_[b].kv_head) * n_ * layer_.head_dim;
    weights_[b] = weights(blocks_[b], {keys_.data() + head, keys_.data() + head});
    attend(blocks_[b], weights_[b], {values_.data() + head, values_.data() + head}, exact_);
  });
  for (const float x : exact_) energy_ += static_cast<double>(x) * static_cast<double>(x);
}

CodecErrors LayerErrors::sealed(const SideConfig& config, Side side) const {
  const int dim = layer_.head_dim;
  StoredPage page(config, CodecSpec{}, row_shape(layer_, side));
  return errors(side, true, [&](int head, const float* rows, float* stored) {
    for (int64_t first = layer_.sinks; first + kPageTokens <= n_; first += kPageTokens)
      page.read_sealed(head, dim, rows + first * dim, stored + first * dim);
  });
}

CodecErrors LayerErrors::recent(const SideConfig& config, const CodecSpec& recent, Side side) const {
  const int dim = layer_.head_dim;
  const int64_t sinks = std::min<int64_t>(layer_.sinks, n_);
  StoredPage page(config, recent, row_shape(layer_, side));
  return errors(side, false, [&](int head, const float* rows, float* stored) {
    page.read_recent(head, n_ - sinks, dim, rows + sinks * dim, stored + sinks * dim);
  });
}

// store(KV head, rows, out) puts what is read of a head's rows in the place of those that it stores. Head by head, whose rows
// stay in the cache.
template <class Store>
CodecErrors LayerErrors::errors(Side side, bool sealed, const Store& store) const {
  const auto of_head = static_cast<size_t>(n_ * layer_.head_dim),
             per_head = blocks_.size() / static_cast<size_t>(layer_.kv_heads);
  std::vector<float> stored(of_head), changed(exact_.size());
  for (size_t b = 0; b < blocks_.size(); ++b) {
    const Block& block = blocks_[b];
    const ptrdiff_t head = static_cast<ptrdiff_t>(block.kv_head) * n_ * layer_.head_dim;
    const float* exact = (side == Side::kKey ? keys_ : values_).data() + head;
    if (b % per_head == 0) {
      std::copy_n(exact, of_head, stored.begin());
      store(block.kv_head, exact, stored.data());
    }
    const Read read = sealed ? Read{stored.data(), exact} : Read{exact, stored.data()};
    if (side == Side::kKey) {
      attend(block, weights(block, read), {values_.data() + head, values_.data() + head}, changed);
    } else {
      attend(block, weights_[b], read, changed);
    }
  }
  CodecErrors errors;
  for (size_t i = 0; i < changed.size(); ++i) {
    changed[i] -= exact_[i];
    errors.output += static_cast<double>(changed[i]) * static_cast<double>(changed[i]);
  }
  errors.output /= energy_;
  for (size_t s = 0; s < sampled_.size(); ++s) {
    const int64_t begin = std::max(n_ / 2, sampled_[s] - kNear), end = std::min(n_, sampled_[s] + kNear + 1);
    float losses[2 * kNear + 1];
    ops_.dots(changed.data() + static_cast<ptrdiff_t>(s) * width_, gradient_.data() + begin * width_,
              static_cast<int>(end - begin), width_, losses);
    double squares = 0;
    for (int64_t t = 0; t < end - begin; ++t) squares += static_cast<double>(losses[t]) * static_cast<double>(losses[t]);
    errors.fisher += squares / static_cast<double>(end - begin) / (2 * static_cast<double>(sampled_.size()));
  }
  return errors;
}

// Neighbouring queries together, which see about the same keys.
std::vector<LayerErrors::Block> LayerErrors::blocks() const {
  const int dim = layer_.head_dim, group = layer_.q_heads / layer_.kv_heads;
  std::vector<Block> blocks;
  for (int head = 0; head < layer_.kv_heads; ++head) {
    for (size_t i = 0, all = sampled_.size() * static_cast<size_t>(group); i < all; i += kLanes) {
      Block& block = blocks.emplace_back();
      block.kv_head = head;
      block.queries.resize(static_cast<size_t>(dim * kLanes));
      for (size_t j = 0; j < kLanes; ++j) {
        const size_t query = std::min(i + j, all - 1), s = query / static_cast<size_t>(group);
        const auto h = static_cast<size_t>(head * group) + query % static_cast<size_t>(group);
        const int64_t t = sampled_[s], pages = fixed_seal_target(layer_, t);
        block.out[j] = i + j < all ? s * static_cast<size_t>(width_) + h * static_cast<size_t>(dim) : kNowhere;
        block.first[j] = layer_.sliding_window > 0 ? std::max<int64_t>(0, t - layer_.sliding_window + 1) : 0;
        block.end[j] = t + 1;
        // Sinks are the same in both.
        block.sealed[j] = std::max(block.first[j], pages == 0 ? 0 : layer_.sinks + pages * kPageTokens);
        const float* q = queries_.data() + (static_cast<int64_t>(h) * n_ + t) * dim;
        for (size_t c = 0; c < static_cast<size_t>(dim); ++c) block.queries[c * kLanes + j] = q[c] * layer_.scale;
      }
    }
  }
  return blocks;
}

LayerErrors::Span LayerErrors::sealed_keys(const Block& block) {
  return {*std::ranges::min_element(block.first), *std::ranges::max_element(block.sealed)};
}
LayerErrors::Span LayerErrors::recent_keys(const Block& block) {
  return {*std::ranges::min_element(block.sealed), *std::ranges::max_element(block.end)};
}

LayerErrors::Weights LayerErrors::weights(const Block& block, const Read& keys) const {
  const int dim = layer_.head_dim;
  const Span sealed = sealed_keys(block), recent = recent_keys(block);
  const auto numbers = [](const Span& span) { return static_cast<size_t>(span.size() * kLanes); };
  std::vector<float> of_sealed(numbers(sealed)), of_recent(numbers(recent)), seen;
  ops_.multiply(keys.sealed + sealed.begin * dim, sealed.size(), dim, block.queries.data(), kLanes, of_sealed.data());
  ops_.multiply(keys.recent + recent.begin * dim, recent.size(), dim, block.queries.data(), kLanes, of_recent.data());
  Weights out{std::vector<float>(numbers(sealed)), std::vector<float>(numbers(recent))};
  for (int j = 0; j < kLanes; ++j) {
    const auto lane = static_cast<size_t>(j);
    const int64_t first = block.first[lane], middle = block.sealed[lane], end = block.end[lane];
    seen.clear();
    for (int64_t u = first; u < middle; ++u) seen.push_back(of_sealed[static_cast<size_t>((u - sealed.begin) * kLanes + j)]);
    for (int64_t u = middle; u < end; ++u) seen.push_back(of_recent[static_cast<size_t>((u - recent.begin) * kLanes + j)]);
    ops_.weigh(seen.data(), seen.size(), 1.0f, 0.0f);
    std::copy_n(seen.begin(), middle - first, out.sealed.begin() + j * sealed.size() + first - sealed.begin);
    std::copy_n(seen.begin() + middle - first, end - middle, out.recent.begin() + j * recent.size() + middle - recent.begin);
  }
  return out;
}

// The outputs of a block's queries into those of all.
void LayerErrors::attend(const Block& block, const Weights& weights, const Read& values, std::vector<float>& out) const {
  const int dim = layer_.head_dim;
  const Span sealed = sealed_keys(block), recent = recent_keys(block);
  std::vector<float> from_sealed(static_cast<size_t>(kLanes * dim)), from_recent(from_sealed.size());
  ops_.multiply(weights.sealed.data(), kLanes, sealed.size(), values.sealed + sealed.begin * dim, dim, from_sealed.data());
  ops_.multiply(weights.recent.data(), kLanes, recent.size(), values.recent + recent.begin * dim, dim, from_recent.data());
  for (size_t j = 0, row = static_cast<size_t>(dim); j < kLanes; ++j) {
    if (block.out[j] == kNowhere) continue;
    for (size_t c = 0; c < row; ++c) out[block.out[j] + c] = from_sealed[j * row + c] + from_recent[j * row + c];
  }
}

}  // namespace kvmix
