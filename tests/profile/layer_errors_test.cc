// Errors of a layer's attention output against attention that is computed query by query in double precision.
#include "profile/layer_errors.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "cache/layout.h"
#include "score/stored_page.h"

namespace kvmix {
namespace {

constexpr int64_t kTokens = 190, kHalf = kTokens / 2;  // so few that every query of the second half is taken

std::vector<float> numbers(size_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> out(n);
  for (float& x : out) x = normal(random);
  return out;
}

struct Case {
  LayerConfig layer;
  LayerRows rows;

  Case(int q_heads, int kv_heads, int dim, int sliding_window) {
    layer.q_heads = q_heads;
    layer.kv_heads = kv_heads;
    layer.head_dim = dim;
    layer.scale = 0.5f / std::sqrt(static_cast<float>(dim));
    layer.sliding_window = sliding_window;
    layer.sinks = 4;
    layer.window.tokens = 16;
    const auto count = [dim](int heads) { return static_cast<size_t>(kTokens * heads * dim); };
    rows = {numbers(count(q_heads), 1), numbers(count(kv_heads), 2), numbers(count(kv_heads), 3), numbers(count(q_heads), 4)};
  }

  // Rows of a side as they are read from sealed pages, or from `recent` rows.
  std::vector<float> stored(const SideConfig& config, const CodecSpec* recent, Side side) const {
    std::vector<float> out = side == Side::kKey ? rows.keys : rows.values;
    StoredPage page(config, recent != nullptr ? *recent : CodecSpec{}, row_shape(layer, side));
    for (int h = 0; h < layer.kv_heads; ++h) {
      float* at = out.data() + (h * kTokens + layer.sinks) * layer.head_dim;
      const std::vector<float> exact(at, at + (kTokens - layer.sinks) * layer.head_dim);
      if (recent != nullptr) {
        page.read_recent(h, kTokens - layer.sinks, layer.head_dim, exact.data(), at);
      } else {
        page.read_sealed(h, layer.head_dim, exact.data(), at);  // one page is whole
      }
    }
    return out;
  }

  // The output of query t, heads side by side.
  std::vector<double> output(int64_t t, const std::vector<float>* sealed, const std::vector<float>* recent, Side side) const {
    const int dim = layer.head_dim, group = layer.q_heads / layer.kv_heads;
    const int64_t pages = fixed_seal_target(layer, t), packed = pages == 0 ? 0 : layer.sinks + pages * kPageTokens;
    const int64_t first = layer.sliding_window > 0 ? std::max<int64_t>(0, t - layer.sliding_window + 1) : 0;
    std::vector<double> out;
    for (int h = 0; h < layer.q_heads; ++h) {
      const auto row = [&](const std::vector<float>& exact, Side of, int64_t u) {
        const std::vector<float>* changed = u < packed ? sealed : recent;
        return (of == side && changed != nullptr ? *changed : exact).data() + (h / group * kTokens + u) * dim;
      };
      std::vector<double> sum(static_cast<size_t>(dim));
      double norm = 0;
      for (int64_t u = first; u <= t; ++u) {
        const float *q = rows.queries.data() + (h * kTokens + t) * dim, *k = row(rows.keys, Side::kKey, u),
                    *v = row(rows.values, Side::kValue, u);
        double score = 0;
        for (int c = 0; c < dim; ++c) score += static_cast<double>(q[c]) * static_cast<double>(k[c]);
        const double weight = std::exp(score * static_cast<double>(layer.scale));
        norm += weight;
        for (int c = 0; c < dim; ++c) sum[static_cast<size_t>(c)] += weight * static_cast<double>(v[c]);
      }
      for (const double x : sum) out.push_back(x / norm);
    }
    return out;
  }

  CodecErrors expected(const std::vector<float>* sealed, const std::vector<float>* recent, Side side) const {
    const auto width = static_cast<size_t>(layer.q_heads * layer.head_dim);
    CodecErrors errors;
    double energy = 0;
    for (int64_t t = kHalf; t < kTokens; ++t) {
      const std::vector<double> exact = output(t, nullptr, nullptr, side), changed = output(t, sealed, recent, side);
      for (size_t c = 0; c < width; ++c) {
        energy += exact[c] * exact[c];
        errors.output += (changed[c] - exact[c]) * (changed[c] - exact[c]);
      }
      const int64_t begin = std::max(kHalf, t - 10), end = std::min(kTokens, t + 11);
      for (int64_t u = begin; u < end; ++u) {
        double loss = 0;
        for (size_t c = 0; c < width; ++c)
          loss += static_cast<double>(rows.output_gradient[static_cast<size_t>(u) * width + c]) * (changed[c] - exact[c]);
        errors.fisher += loss * loss / static_cast<double>(end - begin) / static_cast<double>(2 * (kTokens - kHalf));
      }
    }
    errors.output /= energy;
    return errors;
  }
};

void expect_near(const CodecErrors& is, const CodecErrors& expected) {
  EXPECT_GT(expected.output, 0);
  EXPECT_NEAR(is.output, expected.output, 1e-3 * expected.output);
  EXPECT_NEAR(is.fisher, expected.fisher, 1e-3 * expected.fisher);
}

// Scales and a Hadamard; of keys with a centre and feedback as well.
TransformSpec random_transform(const Case& c, Side side) {
  const auto count = static_cast<size_t>(c.layer.kv_heads * c.layer.head_dim), dim = static_cast<size_t>(c.layer.head_dim);
  TransformSpec transform;
  transform.hadamard = true;
  transform.scales = numbers(count, 5);
  for (float& x : transform.scales) x = std::abs(x) + 0.5f;
  if (side == Side::kValue) return transform;
  transform.center = numbers(count, 6);
  transform.feedback = numbers(static_cast<size_t>(c.layer.kv_heads) * dim * (dim - 1) / 2, 7);
  for (float& x : transform.feedback) x *= 0.05f;
  return transform;
}

TEST(LayerErrors, AreThoseOfAttentionQueryByQuery) {
  const CodecSpec eight = parse_codec("int8.token.g64.minmax.zero"), three = parse_codec("int3.channel.g64.fitted.zero"),
                  trellis = parse_codec("trellis3.zero");
  for (const auto& [group, dim, window] : {std::array{1, 64, 0}, std::array{3, 48, 0}, std::array{2, 32, 60}}) {
    const Case c(2 * group, 2, dim, window);
    const TransformSpec plain, keys = random_transform(c, Side::kKey), values = random_transform(c, Side::kValue);
    std::vector<StoredSide> all;
    for (const Side side : {Side::kKey, Side::kValue}) {
      for (const TransformSpec* transform : {&plain, side == Side::kKey ? &keys : &values}) {
        // Recent rows between sealed ones: what one leaves must not reach the next.
        all.push_back({side, transform, three, false});
        all.push_back({side, transform, eight, true});
        all.push_back({side, transform, trellis, false});
      }
    }
    const std::vector<CodecErrors> errors = LayerErrors(c.layer, c.rows, 2).errors(all),
                                   alone = LayerErrors(c.layer, c.rows, 1).errors(all);
    for (size_t i = 0; i < all.size(); ++i) {
      const auto& [side, transform, codec, recent] = all[i];
      SCOPED_TRACE(std::to_string(group) + " " + std::to_string(window) + " " + to_string(codec) +
                   (side == Side::kKey ? " keys" : " values") + (transform == &plain ? "" : ", transformed"));
      const std::vector<float> stored = c.stored({codec, *transform}, recent ? &codec : nullptr, side);
      expect_near(errors[i], c.expected(recent ? nullptr : &stored, recent ? &stored : nullptr, side));
      EXPECT_EQ(errors[i].fisher, alone[i].fisher);
      EXPECT_EQ(errors[i].output, alone[i].output);
    }
  }
}

}  // namespace
}  // namespace kvmix
