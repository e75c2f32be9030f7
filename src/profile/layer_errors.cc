#include "profile/layer_errors.h"

#include <algorithm>
#include <cmath>

#include "cache/layout.h"
#include "score/stored_page.h"

namespace kvmix {
namespace {

constexpr int kSampledQueries = 96;
constexpr int64_t kNear = 10;  // tokens either side of a query

float dot(const float* a, const float* b, int n) {  // n a multiple of 16
  float lanes[16] = {};
  for (int c = 0; c < n; c += 16) {
    for (int j = 0; j < 16; ++j) lanes[j] += a[c + j] * b[c + j];
  }
  float sum = 0;
  for (const float lane : lanes) sum += lane;
  return sum;
}

}  // namespace

LayerErrors::LayerErrors(const LayerConfig& layer, const PassResult& pass, size_t index)
    : layer_(layer),
      queries_(pass.queries[index]),
      keys_(pass.keys[index]),
      values_(pass.values[index]),
      gradient_(pass.output_gradient[index]),
      n_(static_cast<int64_t>(keys_.size()) / (layer.kv_heads * layer.head_dim)),
      width_(layer.q_heads * layer.head_dim) {
  const int64_t half = n_ / 2, step = std::max<int64_t>(1, (n_ - half) / kSampledQueries);
  for (int64_t t = half; t < n_; t += step) sampled_.push_back(t);
  exact_ = outputs(keys_.data(), values_.data());
  for (const float x : exact_) energy_ += static_cast<double>(x) * static_cast<double>(x);
}

CodecErrors LayerErrors::of(const SideConfig& config, Side side) const {
  const std::vector<float> stored = stored_rows(config, side);
  std::vector<float> changed =
      outputs(side == Side::kKey ? stored.data() : keys_.data(), side == Side::kValue ? stored.data() : values_.data());
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
      const auto loss = static_cast<double>(dot(gradient_.data() + t * width_, error, width_));
      squares += loss * loss;
    }
    errors.fisher += squares / static_cast<double>(end - begin) / (2 * static_cast<double>(sampled_.size()));
  }
  return errors;
}

// Rows [kv_head][n][head_dim] as sealed pages hold them; sinks and the last, partial page stay as they are.
std::vector<float> LayerErrors::stored_rows(const SideConfig& config, Side side) const {
  std::vector<float> out = side == Side::kKey ? keys_ : values_;
  const int dim = layer_.head_dim;
  StoredPage page(config, row_shape(layer_, side));
  for (int head = 0; head < layer_.kv_heads; ++head) {
    float* rows = out.data() + static_cast<ptrdiff_t>(head) * n_ * dim;
    for (int64_t first = layer_.sinks; first + kPageTokens <= n_; first += kPageTokens)
      page.read_back(head, dim, rows + first * dim, rows + first * dim);
  }
  return out;
}

// Attention outputs of the sampled queries, [query][q_head][head_dim], when pages give back `keys` and `values`.
std::vector<float> LayerErrors::outputs(const float* keys, const float* values) const {
  const int dim = layer_.head_dim, group = layer_.q_heads / layer_.kv_heads;
  std::vector<float> out(sampled_.size() * static_cast<size_t>(width_), 0.0f);
  std::vector<float> scores(static_cast<size_t>(n_));
  for (int h = 0; h < layer_.q_heads; ++h) {
    const ptrdiff_t head = static_cast<ptrdiff_t>(h / group) * n_ * dim;
    const float *k = keys_.data() + head, *v = values_.data() + head, *stored_k = keys + head, *stored_v = values + head;
    for (size_t s = 0; s < sampled_.size(); ++s) {
      const int64_t t = sampled_[s];
      const int64_t pages = fixed_seal_target(layer_, t), sealed = pages == 0 ? 0 : layer_.sinks + pages * kPageTokens;
      const int64_t first = layer_.sliding_window > 0 ? std::max<int64_t>(0, t - layer_.sliding_window + 1) : 0;
      const float* q = queries_.data() + (static_cast<ptrdiff_t>(h) * n_ + t) * dim;
      float top = -INFINITY;
      for (int64_t u = first; u <= t; ++u) {
        const float score = dot(q, (u < sealed ? stored_k : k) + u * dim, dim) * layer_.scale;
        scores[static_cast<size_t>(u)] = score;
        top = std::max(top, score);
      }
      float* o = &out[s * static_cast<size_t>(width_) + static_cast<size_t>(h * dim)];
      float norm = 0;
      for (int64_t u = first; u <= t; ++u) {
        const float p = std::exp(scores[static_cast<size_t>(u)] - top);
        norm += p;
        const float* row = (u < sealed ? stored_v : v) + u * dim;
        for (int c = 0; c < dim; ++c) o[c] += p * row[c];
      }
      for (int c = 0; c < dim; ++c) o[c] /= norm;
    }
  }
  return out;
}

}  // namespace kvmix
