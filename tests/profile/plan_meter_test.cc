// Divergence of whole plans against the running cache.
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <random>

#include "kvmix/error.h"
#include "kvmix/eval.h"
#include "kvmix/measure.h"
#include "plan/kvtuner.h"
#include "plan/planner.h"
#include "rows/scale.h"
#include "score/stored_page.h"
#include "support/tiny_model.h"

namespace kvmix {
namespace {

double mean(const std::vector<double>& x) { return std::accumulate(x.begin(), x.end(), 0.0) / static_cast<double>(x.size()); }

Plan random_plan(const ModelShape& shape, unsigned seed) {
  std::mt19937 random(seed);
  Plan plan = f16_plan(shape);
  plan.sinks = 16;
  plan.window.tokens = 128;
  for (Plan::Layer& layer : plan.layers) {
    layer.key = recipe_key(static_cast<int>(1 + random() % 4), random() % 2 == 0);
    layer.value = recipe_value(static_cast<int>(1 + random() % 4));
  }
  return plan;
}

// With recent rows of 8 bits, keys that are scaled and error feedback.
Plan random_plan_of_rows(const ModelShape& shape, unsigned seed) {
  Plan plan = random_plan(shape, seed);
  plan.recent = kRecentRows;
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> number(-0.1f, 0.1f);
  for (size_t l = 0; l < plan.layers.size(); ++l) {
    const ModelShape::Layer& layer = shape.layers[l];
    const auto heads = static_cast<size_t>(layer.kv_heads), dim = static_cast<size_t>(layer.head_dim);
    std::vector<float> scale(heads * dim);
    for (float& s : scale) s = std::exp2(20 * number(random));
    TransformSpec& transform = plan.layers[l].key.transform;
    set_scale(transform, std::move(scale));
    transform.feedback.resize(heads * dim * (dim - 1) / 2);
    for (float& w : transform.feedback) w = number(random);
  }
  return plan;
}

class PlanMeterModel : public ::testing::TestWithParam<testing::TinyModel> {
 protected:
  void SetUp() override {
    testing::write_tiny_model(GetParam(), folder_.file("model.gguf"));
    model_ = Model::load(folder_.file("model.gguf"));
    for (unsigned w = 0; w < 3; ++w) windows_.push_back(testing::random_tokens(1000, model_->vocab_size(), 31 + w));
  }
  std::unique_ptr<PlanMeter> meter() const { return make_plan_meter(model_, {windows_[0], windows_[1]}, {windows_[2]}, 2); }
  testing::TemporaryFolder folder_{"kvmix-meter"};
  std::shared_ptr<const Model> model_;
  std::vector<std::vector<Token>> windows_;
};

TEST_P(PlanMeterModel, MeasuresWhatTheRunningCacheLoses) {
  const auto measuring = meter();
  std::vector<EvalSubject> subjects;
  for (unsigned seed = 0; seed < 3; ++seed) subjects.push_back({"plan", random_plan(model_->shape(), seed), ""});
  for (unsigned seed = 0; seed < 2; ++seed) subjects.push_back({"rows", random_plan_of_rows(model_->shape(), seed), ""});
  EvalOptions options;
  options.threads = 2;
  options.exact = true;
  const auto searched = evaluate_tokens(model_, {windows_.data(), 2}, subjects, options, {});
  const auto held_out = evaluate_tokens(model_, {windows_.data() + 2, 1}, subjects, options, {});
  for (size_t i = 0; i < subjects.size(); ++i) {
    const double ours = mean(measuring->divergence(*subjects[i].plan)), other = mean(measuring->held_out(*subjects[i].plan));
    EXPECT_NEAR(ours, searched[i + 1].kl_mean, 0.1 * ours + 1e-5) << i;
    EXPECT_NEAR(other, held_out[i + 1].kl_mean, 0.1 * other + 1e-5) << i;
  }
  Plan exact = random_plan(model_->shape(), 0);
  for (Plan::Layer& layer : exact.layers) layer = {};
  EXPECT_LT(mean(measuring->divergence(exact)), 1e-9);
}

// Restarting where plans begin to differ gives what a run of the whole gives, in any order.
TEST_P(PlanMeterModel, RestartsChangeNothing) {
  const auto restarted = meter();
  Plan plan = random_plan(model_->shape(), 5);
  std::mt19937 random(3);
  for (int step = 0; step < 8; ++step) {
    Plan changed = plan;
    auto& layer = changed.layers[random() % changed.layers.size()];
    (random() % 2 == 0 ? layer.key : layer.value) = SideConfig{};
    EXPECT_EQ(restarted->divergence(changed), meter()->divergence(changed)) << step;
    if (step % 2 == 0) plan = changed;
  }
  Plan rows = plan;
  rows.recent = kRecentRows;
  EXPECT_EQ(restarted->divergence(rows), meter()->divergence(rows));
  Plan other = plan;
  other.sinks = 4;
  other.window.tokens = 0;
  EXPECT_EQ(restarted->divergence(other), meter()->divergence(other));
  EXPECT_EQ(restarted->divergence(plan), meter()->divergence(plan));
}

INSTANTIATE_TEST_SUITE_P(
    Tiny, PlanMeterModel,
    ::testing::Values(testing::TinyModel{.architecture = "llama", .output_head = true},
                      testing::TinyModel{
                          .architecture = "gemma3", .layers = 7, .qk_norm = true, .post_norms = true, .sliding_window = 96}),
    [](const auto& test) { return testing::tiny_name(test.param); });

TEST(PlanMeters, RefuseTextAndPlansThatCannotBeMeasured) {
  const testing::TemporaryFolder folder("kvmix-meter");
  testing::write_tiny_model({.architecture = "llama"}, folder.file("model.gguf"));
  const auto model = Model::load(folder.file("model.gguf"));
  const auto tokens = [&](size_t n) {
    return std::vector<std::vector<Token>>{testing::random_tokens(n, model->vocab_size(), 1)};
  };
  EXPECT_THROW(make_plan_meter(model, {}, tokens(1000), 2), Error);
  EXPECT_THROW(make_plan_meter(model, tokens(1000), {}, 2), Error);
  Plan plan = random_plan(model->shape(), 1);
  EXPECT_THROW(make_plan_meter(model, tokens(300), tokens(1000), 2)->divergence(plan), Error);
  const auto meter = make_plan_meter(model, tokens(1000), tokens(1000), 2);
  plan.window.ratio_key = 0.2f;
  EXPECT_THROW(meter->divergence(plan), Error);
  plan.window.ratio_key = 0;
  plan.fingerprint = "another";
  EXPECT_THROW(meter->divergence(plan), Error);
}

// KVTuner's finding that which side needs more bits depends on the grouping: keys with two loud channels, random otherwise.
class Grouping {
 public:
  Grouping() {
    for (double& x : keys_) x = signed_unit();
    for (size_t t = 0; t < 128; ++t) {
      keys_[t * 64 + 5] += 8;
      keys_[t * 64 + 37] -= 6;
    }
    for (double& x : values_) x = signed_unit();
    for (double& x : queries_) x = 4 * signed_unit();
  }

  // Relative error of the attention output, sum |o - o'| / sum |o|.
  double error(const SideConfig& key, const SideConfig& value) const {
    const std::vector<double> exact = outputs(keys_, values_);
    const std::vector<double> stored = outputs(stored_rows(keys_, key, Side::kKey), stored_rows(values_, value, Side::kValue));
    double difference = 0, size = 0;
    for (size_t i = 0; i < exact.size(); ++i) {
      difference += std::abs(exact[i] - stored[i]);
      size += std::abs(exact[i]);
    }
    return difference / size;
  }

 private:
  double signed_unit() {
    state_ = state_ * 1664525 + 1013904223;
    return 2 * (static_cast<double>(state_ >> 8) / (1 << 24)) - 1;
  }
  static std::vector<double> stored_rows(const std::vector<double>& rows, const SideConfig& config, Side side) {
    const std::vector<float> in(rows.begin(), rows.end());
    std::vector<float> out(in.size());
    StoredPage(config, {}, {.side = side, .kv_heads = 1, .width = 64}).read_sealed(0, 64, in.data(), out.data());
    return {out.begin(), out.end()};
  }
  std::vector<double> outputs(const std::vector<double>& keys, const std::vector<double>& values) const {
    std::vector<double> out;
    for (size_t q = 0; q < 16; ++q) {
      std::vector<double> p(128);
      double sum = 0;
      for (size_t t = 0; t < 128; ++t) {
        for (size_t c = 0; c < 64; ++c) p[t] += queries_[q * 64 + c] * keys[t * 64 + c] / 8;
      }
      const double top = *std::max_element(p.begin(), p.end());
      for (double& x : p) sum += x = std::exp(x - top);
      for (size_t c = 0; c < 64; ++c) {
        double o = 0;
        for (size_t t = 0; t < 128; ++t) o += p[t] / sum * values[t * 64 + c];
        out.push_back(o);
      }
    }
    return out;
  }

  uint32_t state_ = 12345;
  std::vector<double> keys_ = std::vector<double>(128 * 64), values_ = keys_, queries_ = std::vector<double>(16 * 64);
};

SideConfig plain(int bits, Axis axis, int group) {
  SideConfig side;
  side.codec = {bits, axis, group, Fit::kMinMax, true};
  return side;
}

TEST(Kvtuner, WhichPairsSurviveDependsOnTheGrouping) {
  const Grouping grouping;
  const auto survivors = [&](Axis key_axis, int group) {
    std::vector<WidthPair> pairs;
    for (const int k : {8, 4, 2}) {
      for (const int v : {8, 4, 2}) {
        pairs.push_back({k, v, grouping.error(plain(k, key_axis, group), plain(v, Axis::kToken, group))});
      }
    }
    std::vector<std::pair<int, int>> out;
    for (const WidthPair& p : pareto_pairs(pairs)) out.emplace_back(p.key_bits, p.value_bits);
    return out;
  };
  using Pairs = std::vector<std::pair<int, int>>;
  EXPECT_EQ(survivors(Axis::kToken, 64), (Pairs{{2, 2}, {4, 2}, {4, 4}, {8, 2}, {8, 4}, {8, 8}}));
  EXPECT_EQ(survivors(Axis::kChannel, 32), (Pairs{{2, 2}, {4, 2}, {4, 4}, {8, 4}, {8, 8}}));
}

}  // namespace
}  // namespace kvmix
