#include <gtest/gtest.h>

#include <cmath>

#include "eval/divergence.h"
#include "kvmix/eval.h"
#include "support/models.h"

namespace kvmix {
namespace {

Plan uniform(const Model& model, const char* bits) {
  PlannerRequest request;
  request.model = &model.shape();
  request.options = {{"k-bits", bits}, {"v-bits", bits}};
  return make_plan("uniform", request);
}

TEST(Divergence, EqualsTheDefinition) {
  const std::vector<float> p = {1.0f, 2.0f, -3.0f, 0.5f}, q = {0.5f, 2.5f, -2.0f, 0.0f};
  double sp = 0, sq = 0, kl = 0;
  for (size_t i = 0; i < p.size(); ++i) sp += std::exp(static_cast<double>(p[i])), sq += std::exp(static_cast<double>(q[i]));
  for (size_t i = 0; i < p.size(); ++i) {
    const double a = std::exp(static_cast<double>(p[i])) / sp;
    kl += a * (std::log(a) - (static_cast<double>(q[i]) - std::log(sq)));
  }
  ReferenceRow row;
  set_reference(p, row);
  const RowScore score = score_row(row, q, 2);
  EXPECT_NEAR(score.kl, kl, 1e-6);
  EXPECT_NEAR(score.nll, std::log(sq) + 2.0, 1e-6);
  EXPECT_TRUE(score.same_top);
}

TEST(Evaluate, WiderCodesAreCloserToF16) {
  const auto model = Model::load(testing::model_file("smollm2"));
  std::vector<EvalSubject> subjects;
  for (const char* bits : {"16", "8", "3", "2"}) subjects.push_back({bits, uniform(*model, bits), ""});
  EvalOptions options;
  options.context = 768;
  options.windows = 1;
  const auto rows = evaluate(model, testing::long_text(60), subjects, options, {});
  ASSERT_EQ(rows.size(), 5u);
  EXPECT_EQ(rows[0].scored_tokens, 383);
  EXPECT_LT(rows[1].kl_mean, 0.02);  // the same cache: only summation order differs
  EXPECT_LT(rows[2].kl_mean, rows[3].kl_mean);
  EXPECT_LT(rows[3].kl_mean, rows[4].kl_mean);
  EXPECT_GT(rows[4].perplexity, rows[0].perplexity);
  EXPECT_LT(rows[4].cache_bytes, rows[3].cache_bytes);
  EXPECT_LT(rows[3].cache_bytes, rows[0].cache_bytes);
}

}  // namespace
}  // namespace kvmix
