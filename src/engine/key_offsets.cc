// What the biases of a model's keys do to its rows: a RoPE pair that hardly turns adds the same to all of them, one that turns
// makes two channels large.
#include <algorithm>
#include <cmath>
#include <complex>

#include "engine/model.h"

namespace kvmix {
namespace {

// Positions that offsets are means over. Pairs that turn less than about once on them lose most of their bias; those that go on
// turning behind them have small ones in the models seen.
constexpr int64_t kMeanPositions = 4096;
// Square of what keys have beside their bias, for a pair: of the order of the projections' outputs of models with biases.
constexpr double kBesideBias = 9.0;
// Sizes that differ less need no scale.
constexpr double kAlike = 2.0;

// Mean of exp(i p angle) over positions p in [0, n).
std::complex<double> mean_turn(double angle, int64_t n) {
  const auto count = static_cast<double>(n);
  if (std::abs(angle) < 1e-12) return 1.0;
  const double length = std::sin(count * angle / 2) / (count * std::sin(angle / 2));
  return std::polar(1.0, (count - 1) * angle / 2) * length;
}

}  // namespace

void GgufModel::set_key_offsets(int64_t layer, ModelShape::Layer& shape) const {
  const HyperParameters& p = parameters_;
  const std::string prefix = "blk." + std::to_string(layer) + ".";
  // A norm of the keys takes the bias's place.
  if (stored_.find(prefix + "attn_k.bias") == nullptr || stored_.find(prefix + "attn_k_norm.weight") != nullptr) return;
  const ggml_tensor* tensor = original(prefix + "attn_k.bias");
  std::vector<float> bias(static_cast<size_t>(tensor->ne[0]));
  dequantise_row(tensor, 0, bias.data());
  if (!all_finite(bias)) return;  // refused where it is used
  std::vector<float> factors;     // of the angles, one a pair
  if (stored_.find("rope_freqs.weight") != nullptr) {
    const ggml_tensor* freqs = original("rope_freqs.weight");
    factors.resize(static_cast<size_t>(freqs->ne[0]));
    dequantise_row(freqs, 0, factors.data());
  }
  const RopeOptions& rope = p.is_local(layer) ? p.rope_local : p.rope;
  const auto heads = static_cast<size_t>(p.kv_heads), dim = static_cast<size_t>(p.head_dim);
  const auto pairs = static_cast<size_t>(rope.dims / 2);
  const int64_t positions = std::min(kMeanPositions, p.context);
  std::vector<float> center(bias), sizes(bias.size(), static_cast<float>(std::sqrt(kBesideBias)));
  for (size_t i = 0; i < pairs; ++i) {
    const double divisor = i < factors.size() ? static_cast<double>(factors[i]) : 1.0;
    const double angle = static_cast<double>(rope.scale) / divisor *
                         std::pow(static_cast<double>(rope.base), -2.0 * static_cast<double>(i) / rope.dims);
    const std::complex<double> turn = mean_turn(angle, positions);
    const size_t a = rope.mode == GGML_ROPE_TYPE_NEOX ? i : 2 * i, b = rope.mode == GGML_ROPE_TYPE_NEOX ? i + pairs : 2 * i + 1;
    for (size_t h = 0; h < heads; ++h) {
      const std::complex<double> of_pair(static_cast<double>(bias[h * dim + a]), static_cast<double>(bias[h * dim + b]));
      const std::complex<double> mean = of_pair * turn;
      center[h * dim + a] = static_cast<float>(mean.real());
      center[h * dim + b] = static_cast<float>(mean.imag());
      const double left = std::max(std::norm(of_pair) - std::norm(mean), 0.0);
      sizes[h * dim + a] = sizes[h * dim + b] = static_cast<float>(std::sqrt(left + kBesideBias));
    }
  }
  shape.key_center = std::move(center);
  const auto [least, most] = std::minmax_element(sizes.begin(), sizes.end());
  if (static_cast<double>(*most) > kAlike * static_cast<double>(*least)) shape.key_sizes = std::move(sizes);
}

}  // namespace kvmix
