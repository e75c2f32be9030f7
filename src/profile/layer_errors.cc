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

LayerErrors::LayerErrors(const LayerConfig& layer, const LayerRows& rows, std::span<const int64_t> answers)
    : layer_(layer),
      queries_(rows.queries),
      keys_(rows.keys),
      values_(rows.values),
      gradient_(rows.output_gradient),
      n_(static_cast<int64_t>(keys_.size()) / (layer.kv_heads * layer.head_dim)),
      width_(layer.q_heads * layer.head_dim),
      asked_(!answers.empty()) {
  const int64_t half = n_ / 2, step = std::max<int64_t>(1, (n_ - half) / kSampledQueries);
  for (const int64_t answer : answers) sampled_.push_back(answer - 1);
  for (int64_t t = half; t < n_ && !asked_; t += step) sampled_.push_back(t);
  exact_ = outputs(exact());
  for (const float x : exact_) energy_ += static_cast<double>(x) * static_cast<double>(x);
}

CodecErrors LayerErrors::sealed(const SideConfig& config, Side side) const {
  std::vector<float> stored = side == Side::kKey ? keys_ : values_;  // sinks and the last, partial page stay as they are
  const int dim = layer_.head_dim;
  StoredPage page(config, CodecSpec{}, row_shape(layer_, side));
  for (int head = 0; head < layer_.kv_heads; ++head) {
    float* rows = stored.data() + static_cast<ptrdiff_t>(head) * n_ * dim;
    for (int64_t first = layer_.sinks; first + kPageTokens <= n_; first += kPageTokens)
      page.read_sealed(head, dim, rows + first * dim, rows + first * dim);
  }
  Read read = exact();
  (side == Side::kKey ? read.sealed_keys : read.sealed_values) = stored.data();
  return errors(read);
}

CodecErrors LayerErrors::recent(const SideConfig& config, const CodecSpec& recent, Side side) const {
  std::vector<float> stored = side == Side::kKey ? keys_ : values_;
  const int dim = layer_.head_dim;
  StoredPage page(config, recent, row_shape(layer_, side));
  for (int head = 0; head < layer_.kv_heads; ++head) {
    float* rows = stored.data() + (static_cast<ptrdiff_t>(head) * n_ + layer_.sinks) * dim;
    page.read_recent(head, n_ - layer_.sinks, dim, rows, rows);
  }
  Read read = exact();
  (side == Side::kKey ? read.keys : read.values) = stored.data();
  return errors(read);
}

CodecErrors LayerErrors::errors(const Read& read) const {
  std::vector<float> changed = outputs(read);
  CodecErrors errors;
  for (size_t i = 0; i < changed.size(); ++i) {
    changed[i] -= exact_[i];
    errors.output += static_cast<double>(changed[i]) * static_cast<double>(changed[i]);
  }
  errors.output /= energy_;
  if (asked_) {
    errors.recall = recall(changed);
    return errors;
  }
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

double LayerErrors::recall(const std::vector<float>& changed) const {
  const auto n = static_cast<double>(sampled_.size());
  double sum = 0, squares = 0;
  for (size_t s = 0; s < sampled_.size(); ++s) {
    const auto rise = static_cast<double>(
        dot(gradient_.data() + sampled_[s] * width_, changed.data() + static_cast<ptrdiff_t>(s) * width_, width_));
    sum += rise;
    squares += rise * rise;
  }
  const double mean = sum / n, error = std::sqrt(std::max(0.0, squares / n - mean * mean) / n);
  return std::max(0.0, mean - error) / 2 + squares / n / 8;
}

// Attention outputs of the sampled queries, [query][q_head][head_dim].
std::vector<float> LayerErrors::outputs(const Read& read) const {
  const int dim = layer_.head_dim, group = layer_.q_heads / layer_.kv_heads;
  std::vector<float> out(sampled_.size() * static_cast<size_t>(width_), 0.0f);
  std::vector<float> scores(static_cast<size_t>(n_));
  for (int h = 0; h < layer_.q_heads; ++h) {
    const ptrdiff_t head = static_cast<ptrdiff_t>(h / group) * n_ * dim;
    const float *k = read.keys + head, *v = read.values + head;
    const float *sealed_k = read.sealed_keys + head, *sealed_v = read.sealed_values + head;
    for (size_t s = 0; s < sampled_.size(); ++s) {
      const int64_t t = sampled_[s];
      const int64_t pages = fixed_seal_target(layer_, t);
      // Sinks are the same in both.
      const int64_t sealed = pages == 0 ? 0 : layer_.sinks + pages * kPageTokens;
      const int64_t first = layer_.sliding_window > 0 ? std::max<int64_t>(0, t - layer_.sliding_window + 1) : 0;
      const float* q = queries_.data() + (static_cast<ptrdiff_t>(h) * n_ + t) * dim;
      float top = -INFINITY;
      for (int64_t u = first; u <= t; ++u) {
        const float score = dot(q, (u < sealed ? sealed_k : k) + u * dim, dim) * layer_.scale;
        scores[static_cast<size_t>(u)] = score;
        top = std::max(top, score);
      }
      float* o = &out[s * static_cast<size_t>(width_) + static_cast<size_t>(h * dim)];
      float norm = 0;
      for (int64_t u = first; u <= t; ++u) {
        const float p = std::exp(scores[static_cast<size_t>(u)] - top);
        norm += p;
        const float* row = (u < sealed ? sealed_v : v) + u * dim;
        for (int c = 0; c < dim; ++c) o[c] += p * row[c];
      }
      for (int c = 0; c < dim; ++c) o[c] /= norm;
    }
  }
  return out;
}

}  // namespace kvmix
