// Quantised pruning: the trade-off of tokens against bits on the published trace, and what a budget buys.
#include <cmath>

#include "policy/layer_state.h"

namespace kvmix {
namespace {

using Vector = std::vector<double>;
constexpr int kTokens = 1024, kDim = 64, kWindow = 8, kTests = 32;

struct Trace {
  std::vector<Vector> keys, values, window, tests;
};

Trace make_trace() {
  Lcg random(2024);
  const auto rows = [&](int count) {
    std::vector<Vector> all(count, Vector(kDim));
    for (Vector& row : all) {
      for (double& x : row) x = random.symmetric();
    }
    return all;
  };
  Trace trace;
  trace.keys = rows(kTokens);
  for (Vector& key : trace.keys) key[7] += 4;
  trace.values = rows(kTokens);
  const Vector base = rows(1)[0];
  for (std::vector<Vector>* queries : {&trace.window, &trace.tests}) {
    *queries = rows(queries == &trace.window ? kWindow : kTests);
    for (Vector& q : *queries) {
      for (int d = 0; d < kDim; ++d) q[d] = 6 * (0.8 * base[d] + 0.6 * q[d]);
    }
  }
  return trace;
}

Vector softmax(const Vector& q, const std::vector<Vector>& keys, size_t seen) {
  Vector weights(seen);
  double most = -1e300, sum = 0;
  for (size_t i = 0; i < seen; ++i) {
    for (int d = 0; d < kDim; ++d) weights[i] += q[d] * keys[i][d];
    weights[i] /= std::sqrt(static_cast<double>(kDim));
    most = std::max(most, weights[i]);
  }
  for (double& w : weights) sum += w = std::exp(w - most);
  for (double& w : weights) w /= sum;
  return weights;
}

LayerState scored(const Trace& trace) {
  LayerState state(kTokens, 1);
  state.window_rows = kWindow;
  Vector votes(kTokens, 0);
  for (int i = 0; i < kWindow; ++i) {
    const Vector row = softmax(trace.window[i], trace.keys, kTokens - kWindow + i + 1);
    for (size_t t = 0; t < row.size(); ++t) votes[t] += row[t];
  }
  for (int t = 0; t < kTokens; ++t) state.heads[0].window[t] = static_cast<float>(votes[t]);
  return state;
}

// Codes from 0 to 2^bits - 1 between the smallest and the largest number.
void affine(std::vector<double*> group, int bits) {
  double low = *group[0], high = *group[0];
  for (const double* x : group) low = std::min(low, *x), high = std::max(high, *x);
  const double step = (high - low) / ((1 << bits) - 1);
  for (double* x : group) *x = step == 0 ? low : std::nearbyint((*x - low) / step) * step + low;
}

double error_of(const Trace& trace, const std::vector<int64_t>& kept, int bits) {
  std::vector<Vector> keys, values;
  for (const int64_t t : kept) keys.push_back(trace.keys[t]), values.push_back(trace.values[t]);
  if (bits < 16) {
    for (size_t first = 0; first < kept.size(); first += 32) {
      for (int d = 0; d < kDim; ++d) {
        std::vector<double*> group;
        for (size_t t = first; t < std::min(kept.size(), first + 32); ++t) group.push_back(&keys[t][d]);
        affine(group, bits);
      }
    }
    for (Vector& value : values) {
      std::vector<double*> group;
      for (double& x : value) group.push_back(&x);
      affine(group, bits);
    }
  }
  const auto output = [](const Vector& q, const std::vector<Vector>& k, const std::vector<Vector>& v) {
    const Vector weights = softmax(q, k, k.size());
    Vector out(kDim, 0);
    for (size_t t = 0; t < k.size(); ++t) {
      for (int d = 0; d < kDim; ++d) out[d] += weights[t] * v[t][d];
    }
    return out;
  };
  double difference = 0, whole = 0;
  for (const Vector& q : trace.tests) {
    const Vector exact = output(q, trace.keys, trace.values), ours = output(q, keys, values);
    for (int d = 0; d < kDim; ++d) {
      difference += (exact[d] - ours[d]) * (exact[d] - ours[d]);
      whole += exact[d] * exact[d];
    }
  }
  return std::sqrt(difference / whole);
}

PolicySpec pruning(double tokens, int bits) {
  const double width = bits;
  return {"quantized-pruning", {{"tokens", tokens}, {"k-bits", width}, {"v-bits", width}}};
}

TEST(QuantizedPruning, TradeOff) {
  const Trace trace = make_trace();
  const std::map<int, std::array<double, 4>> published = {{16, {2.1893, 1.5724, 0.8862, 1.1212}},
                                                          {32, {1.5736, 0.8987, 0.6427, 0.9487}},
                                                          {64, {0.8948, 0.6545, 0.3870, 0.5802}},
                                                          {128, {0.6523, 0.3401, 0.1741, 0.5822}}};
  const int widths[] = {16, 8, 4, 2};
  for (const auto& [tokens, expected] : published) {
    std::array<double, 4> errors{};
    for (size_t w = 0; w < 4; ++w) {
      const auto policy = make_policy(pruning(tokens, widths[w]));
      EXPECT_EQ(policy->tiers()[0], (TierBits{widths[w], widths[w]}));
      LayerState state = scored(trace);
      // The trace charges no scales.
      state.shape.token_bytes = {2.0 * kDim * widths[w] / 8, 0};
      state.run(*policy);
      EXPECT_EQ(state.kept(0).size(), static_cast<size_t>(tokens * 16 / widths[w]));
      errors[w] = error_of(trace, state.kept(0), widths[w]);
      EXPECT_NEAR(errors[w], expected[w], 0.02 * expected[w]) << tokens << " tokens at 16 bits, " << widths[w] << " bits";
    }
    EXPECT_LT(errors[2], errors[1]);
    EXPECT_LT(errors[1], errors[0]);
    EXPECT_LT(errors[2], errors[3]);
  }
}

TEST(QuantizedPruning, TheBestOfTheTrace) {
  LayerState state = scored(make_trace());
  state.shape.token_bytes = {256, 0};
  state.run(*make_policy(pruning(16, 16)));
  EXPECT_EQ(state.kept(0), join(join(range(46, 53), {459}), range(1016, 1024)));
}

// 4 bits with an fp16 scale and zero point for 64 numbers are 4.5.
TEST(QuantizedPruning, ScalesAreCharged) {
  LayerState state = scored(make_trace());
  state.shape.token_bytes = {2 * (kDim * 4 / 8 + 4), 0};
  const auto policy = make_policy(pruning(16, 4));
  EXPECT_EQ(policy->most_tokens(state.shape, kTokens), 56);
  state.run(*policy);
  EXPECT_EQ(state.kept(0).size(), 56u);
}

// A token outside the window whose rank is beyond what 32 tokens at 16 bits hold, and within 128.
TEST(QuantizedPruning, ANeedleSurvivesInMoreTokens) {
  for (const bool more : {false, true}) {
    LayerState state(kTokens, 1);
    Lcg random(6);
    for (float& vote : state.heads[0].window) vote = static_cast<float>(0.1 * random.uniform());
    for (int t = 0; t < 60; ++t) state.heads[0].window[16 * t + 3] = 0.9f - 0.001f * static_cast<float>(t);
    state.heads[0].window[600] = 0.5f;
    state.shape.token_bytes = {more ? 64.0 : 256.0, 0};
    const std::map<std::string, PolicyValue> values = {
        {"keep", 1.0 / 32}, {"k-bits", more ? 4.0 : 16.0}, {"v-bits", more ? 4.0 : 16.0}, {"pooling", "none"}};
    state.run(*make_policy({"quantized-pruning", values}));
    const std::vector<int64_t> kept = state.kept(0);
    EXPECT_EQ(kept.size(), more ? 128u : 32u);
    EXPECT_EQ(std::count(kept.begin(), kept.end(), 600), more ? 1 : 0);
  }
}

TEST(QuantizedPruning, HostsDecide) {
  for (const char* host : {"snapkv", "pyramidkv", "h2o", "streaming"}) {
    LayerState ours(400, 2), theirs(400, 2);
    Lcg random(7);
    for (int h = 0; h < 2; ++h) {
      for (int t = 0; t < 400; ++t) {
        ours.heads[h].window[t] = ours.heads[h].mass[t] = static_cast<float>(random.uniform());
      }
      theirs.heads[h] = ours.heads[h];
    }
    for (LayerState* state : {&ours, &theirs}) state->shape.ordinals = 4;
    ours.shape.token_bytes = {72, 0};
    ours.run(*make_policy({"quantized-pruning", {{"tokens", 20.0}, {"host", host}}}));
    std::map<std::string, PolicyValue> values = {{"tokens", 71.0}};  // 20 * 256 / 72
    if (host == std::string("snapkv") || host == std::string("pyramidkv")) values["window"] = 8.0;
    theirs.run(*make_policy({host, values}));
    for (int h = 0; h < 2; ++h) EXPECT_EQ(ours.kept(h), theirs.kept(h)) << host;
  }
}

}  // namespace
}  // namespace kvmix
