#include "profile/layer_errors.h"

#include <algorithm>
#include <cmath>

#include "cache/layout.h"
#include "score/stored_page.h"

namespace kvmix {
namespace {

constexpr int kSampledQueries = 96;
constexpr int64_t kNear = 10;  // tokens either side of a query

double dot(const float* a, const float* b, int n) {  // n a multiple of 16
  float lanes[16] = {};
  for (int c = 0; c < n; c += 16) {
    for (int j = 0; j < 16; ++j) lanes[j] += a[c + j] * b[c + j];
  }
  float sum = 0;
  for (const float lane : lanes) sum += lane;
  return static_cast<double>(sum);
}

// Room for a side's rows, kept by each thread: of a wide layer, tens of MB that take longer to map anew than to fill.
std::vector<float>& room(size_t numbers) {
  thread_local std::vector<float> rows;
  rows.resize(numbers);
  return rows;
}

}  // namespace

LayerErrors::LayerErrors(const LayerConfig& layer, const LayerRows& rows)
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
  const Read keys{keys_.data(), keys_.data()};
  for (const Block& block : blocks_) weights_.push_back(weights(block, keys));
  exact_ = outputs(nullptr, {values_.data(), values_.data()});
  for (const float x : exact_) energy_ += static_cast<double>(x) * static_cast<double>(x);
}

CodecErrors LayerErrors::sealed(const SideConfig& config, Side side) const {
  const std::vector<float>& exact = side == Side::kKey ? keys_ : values_;
  std::vector<float>& stored = room(exact.size());
  const int dim = layer_.head_dim;
  const int64_t sinks = std::min<int64_t>(layer_.sinks, n_), end = sinks + (n_ - sinks) / kPageTokens * kPageTokens;
  StoredPage page(config, CodecSpec{}, row_shape(layer_, side));
  for (int head = 0; head < layer_.kv_heads; ++head) {
    const float* from = exact.data() + static_cast<ptrdiff_t>(head) * n_ * dim;
    float* to = stored.data() + static_cast<ptrdiff_t>(head) * n_ * dim;
    std::copy_n(from, sinks * dim, to);
    for (int64_t first = sinks; first < end; first += kPageTokens)
      page.read_sealed(head, dim, from + first * dim, to + first * dim);
    std::copy_n(from + end * dim, (n_ - end) * dim, to + end * dim);  // the last, partial page
  }
  return errors(side, {stored.data(), exact.data()});
}

CodecErrors LayerErrors::recent(const SideConfig& config, const CodecSpec& recent, Side side) const {
  const std::vector<float>& exact = side == Side::kKey ? keys_ : values_;
  std::vector<float>& stored = room(exact.size());
  const int dim = layer_.head_dim;
  const int64_t sinks = std::min<int64_t>(layer_.sinks, n_);
  StoredPage page(config, recent, row_shape(layer_, side));
  for (int head = 0; head < layer_.kv_heads; ++head) {
    const float* from = exact.data() + static_cast<ptrdiff_t>(head) * n_ * dim;
    float* to = stored.data() + static_cast<ptrdiff_t>(head) * n_ * dim;
    std::copy_n(from, sinks * dim, to);
    page.read_recent(head, n_ - sinks, dim, from + sinks * dim, to + sinks * dim);
  }
  return errors(side, {exact.data(), stored.data()});
}

CodecErrors LayerErrors::errors(Side side, const Read& read) const {
  std::vector<float> changed = side == Side::kKey ? outputs(&read, {values_.data(), values_.data()}) : outputs(nullptr, read);
  CodecErrors errors;
  for (size_t i = 0; i < changed.size(); ++i) {
    changed[i] -= exact_[i];
    errors.output += static_cast<double>(changed[i]) * static_cast<double>(changed[i]);
  }
  errors.output /= energy_;
  for (size_t s = 0; s < sampled_.size(); ++s) {
    const float* error = changed.data() + static_cast<ptrdiff_t>(s) * width_;
    const int64_t begin = std::max(n_ / 2, sampled_[s] - kNear), end = std::min(n_, sampled_[s] + kNear + 1);
    double squares = 0;
    for (int64_t t = begin; t < end; ++t) {
      const double loss = dot(gradient_.data() + t * width_, error, width_);
      squares += loss * loss;
    }
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
        block.last[j] = t;
        block.sealed[j] = pages == 0 ? 0 : layer_.sinks + pages * kPageTokens;  // sinks are the same in both
        const float* q = queries_.data() + (static_cast<int64_t>(h) * n_ + t) * dim;
        for (size_t c = 0; c < static_cast<size_t>(dim); ++c) block.queries[c * kLanes + j] = q[c] * layer_.scale;
      }
    }
  }
  return blocks;
}

// Of a block's keys from its first on, [key][kLanes].
std::vector<float> LayerErrors::weights(const Block& block, const Read& keys) const {
  const int dim = layer_.head_dim;
  const ptrdiff_t head = static_cast<ptrdiff_t>(block.kv_head) * n_ * dim;
  const auto [least, most] = std::ranges::minmax(block.sealed);
  const int64_t begin = block.begin(), end = block.end();
  const int64_t from = std::clamp(least, begin, end), to = std::clamp(most, begin, end);
  std::vector<float> scores(static_cast<size_t>((end - begin) * kLanes)), apart(static_cast<size_t>((to - from) * kLanes));
  const auto at = [&](int64_t u) { return (u - begin) * kLanes; };
  const auto score = [&](const float* rows, int64_t first, int64_t last, float* out) {
    ops_.multiply(rows + head + first * dim, static_cast<int>(last - first), dim, block.queries.data(), kLanes, out);
  };
  score(keys.sealed, begin, to, scores.data());
  score(keys.recent, to, end, scores.data() + at(to));
  score(keys.recent, from, to, apart.data());  // keys that only some of the queries read from sealed pages
  float top[kLanes], norm[kLanes] = {};
  std::fill_n(top, kLanes, -INFINITY);
  for (int64_t u = begin; u < end; ++u) {
    float* row = &scores[static_cast<size_t>(at(u))];
    for (size_t j = 0; j < kLanes; ++j) {
      if (u >= from && u < to && u >= block.sealed[j]) row[j] = apart[static_cast<size_t>((u - from) * kLanes) + j];
      if (u < block.first[j] || u > block.last[j]) row[j] = -INFINITY;
      top[j] = std::max(top[j], row[j]);
    }
  }
  for (size_t i = 0; i < scores.size(); ++i) {
    scores[i] = std::exp(scores[i] - top[i % kLanes]);
    norm[i % kLanes] += scores[i];
  }
  for (size_t i = 0; i < scores.size(); ++i) scores[i] /= norm[i % kLanes];
  return scores;
}

// Attention outputs of the sampled queries, [query][q_head][head_dim]; keys null: the exact ones.
std::vector<float> LayerErrors::outputs(const Read* keys, const Read& values) const {
  const int dim = layer_.head_dim;
  std::vector<float> out(sampled_.size() * static_cast<size_t>(width_));
  std::vector<float> changed, apart, sum;
  for (size_t b = 0; b < blocks_.size(); ++b) {
    const Block& block = blocks_[b];
    if (keys != nullptr) changed = weights(block, *keys);
    const std::vector<float>& all = keys != nullptr ? changed : weights_[b];
    const int64_t begin = block.begin(), end = block.end();
    const auto [least, most] = std::ranges::minmax(block.sealed);
    const int64_t from = std::clamp(least, begin, end), to = std::clamp(most, begin, end);
    const float* sealed = values.sealed + static_cast<ptrdiff_t>(block.kv_head) * n_ * dim;
    const float* recent = values.recent + static_cast<ptrdiff_t>(block.kv_head) * n_ * dim;
    sum.assign(static_cast<size_t>(kLanes * dim), 0.0f);
    // Some rows at a time, which stay in the L1 while each query adds them.
    const auto add = [&](const float* weights, const float* rows, int64_t first, int64_t last) {
      constexpr int64_t kTogether = 64;
      float turned[kTogether];
      for (; first < last; first += kTogether, weights += kTogether * kLanes) {
        const int64_t n = std::min(kTogether, last - first);
        for (int j = 0; j < kLanes; ++j) {
          for (int64_t u = 0; u < n; ++u) turned[u] = weights[u * kLanes + j];
          ops_.add(turned, rows + first * dim, static_cast<int>(n), dim, sum.data() + static_cast<ptrdiff_t>(j) * dim);
        }
      }
    };
    const auto at = [&](int64_t u) { return static_cast<ptrdiff_t>((u - begin) * kLanes); };
    add(all.data(), sealed, begin, from);
    add(all.data() + at(to), recent, to, end);
    for (const bool packed : {true, false}) {  // keys that only some of the queries read from sealed pages
      apart.assign(all.begin() + at(from), all.begin() + at(to));
      for (size_t i = 0; i < apart.size(); ++i) {
        if ((from + static_cast<int64_t>(i / kLanes) < block.sealed[i % kLanes]) != packed) apart[i] = 0;
      }
      add(apart.data(), packed ? sealed : recent, from, to);
    }
    for (size_t j = 0; j < kLanes; ++j) {
      if (block.out[j] == kNowhere) continue;
      std::copy_n(sum.begin() + static_cast<ptrdiff_t>(j) * dim, dim, out.begin() + static_cast<ptrdiff_t>(block.out[j]));
    }
  }
  return out;
}

}  // namespace kvmix
