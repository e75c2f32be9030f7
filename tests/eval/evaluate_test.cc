#include <gtest/gtest.h>

#include <cmath>

#include "eval/contender.h"
#include "kvmix/eval.h"
#include "score/divergence.h"
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

// The same window through libllama, scored here from the definition: only arithmetic noise lies between the two.
TEST(Evaluate, PerplexityIsTheDefinitionsAndF16IsItsOwnReference) {
  constexpr size_t kContext = 512;
  const std::string path = testing::model_file("smollm2");
  const auto model = Model::load(path);
  const std::string text = testing::long_text(60);
  const EvalSubject again{"again", f16_plan(model->shape()), ""};
  EvalOptions options;
  options.context = kContext;
  options.windows = 1;
  const auto rows = evaluate(model, text, {&again, 1}, options, {});
  ASSERT_EQ(rows.size(), 2u);
  EXPECT_EQ(rows[1].kl_mean, 0);
  EXPECT_EQ(rows[1].kl_max, 0);
  EXPECT_EQ(rows[1].top1, 1);
  EXPECT_EQ(rows[1].perplexity, rows[0].perplexity);

  std::vector<Token> tokens = model->tokenize(text, false);
  tokens.resize(kContext);
  Peer peer(path, "f16", kContext, 2);
  const auto logits = peer.step(tokens, true);
  const auto vocab = static_cast<size_t>(model->vocab_size());
  double nll = 0;
  for (size_t p = kContext / 2; p + 1 < kContext; ++p) {
    double sum = 0;
    for (size_t i = 0; i < vocab; ++i) sum += std::exp(static_cast<double>(logits[p * vocab + i]));
    nll += std::log(sum) - static_cast<double>(logits[p * vocab + static_cast<size_t>(tokens[p + 1])]);
  }
  const double perplexity = std::exp(nll / (kContext / 2 - 1));
  EXPECT_NEAR(rows[0].perplexity, perplexity, 0.02 * perplexity);
}

TEST(Generation, RepeatedRunsAreCounted) {
  EXPECT_EQ(repetition_rate(std::vector<Token>{1, 2, 3, 4, 5, 6}, 4), 0);
  EXPECT_DOUBLE_EQ(repetition_rate(std::vector<Token>{1, 2, 1, 2, 1, 2}, 2), 3.0 / 5);  // 12 21 | 12 21 12
  EXPECT_DOUBLE_EQ(repetition_rate(std::vector<Token>(10, 7), 4), 6.0 / 7);
  EXPECT_EQ(repetition_rate(std::vector<Token>{1, 1}, 4), 0);
}

TEST(Generation, AgreesWithItselfAndNotForLongAtOneBit) {
  const auto model = Model::load(testing::model_file("smollm2"));
  std::vector<EvalSubject> subjects = {{"same", f16_plan(model->shape()), ""}};
  for (const char* bits : {"8", "1"}) subjects.push_back({bits, uniform(*model, bits), ""});
  GenerationOptions options;
  options.prompts = 2;
  options.prompt_tokens = 320;
  options.tokens = 48;
  const auto rows = evaluate_generation(model, testing::long_text(60), subjects, options, {});
  ASSERT_EQ(rows.size(), 4u);
  for (const size_t r : {0, 1}) EXPECT_EQ(rows[r].agreement, (std::vector<int>{48, 48}));
  EXPECT_EQ(rows[1].repetition, rows[0].repetition);
  const auto together = [](const GenerationRow& row) { return row.agreement[0] + row.agreement[1]; };
  EXPECT_LT(together(rows[3]), together(rows[2]));
  EXPECT_LT(rows[3].bits_per_element, rows[2].bits_per_element);
  EXPECT_LT(rows[2].bits_per_element, rows[0].bits_per_element);
  options.tokens = 1 << 20;
  EXPECT_THROW(evaluate_generation(model, testing::long_text(60), subjects, options, {}), Error);
  options.tokens = 48;
  EXPECT_THROW(evaluate_generation(model, "short", subjects, options, {}), Error);
}

// What lets prompts share their beginning: after a detour the marked sequence goes on as if there had been none.
TEST(Contender, RewindsToWhatWasMarked) {
  const std::string path = testing::model_file("smollm2");
  const auto model = Model::load(path);
  const std::vector<Token> tokens = testing::long_text_tokens(*model, 589);
  std::vector<Token> detour(tokens.rbegin(), tokens.rend());
  const std::span<const Token> text(tokens);
  ContenderOptions options;
  options.context = 768;
  options.threads = 2;
  for (const EvalSubject& subject : {EvalSubject{"2/2", uniform(*model, "2"), ""}, EvalSubject{"peer", std::nullopt, "q8_0"}}) {
    const auto finish = [&](Contender& row) {
      row.feed(text.subspan(256, 256), false);
      row.feed(text.subspan(512, 76), false);
      const auto logits = row.decode(text.subspan(588, 1));
      return std::vector<float>(logits.begin(), logits.end());
    };
    const auto alone = make_contender(model, subject, options), shared = make_contender(model, subject, options);
    alone->feed(text.first(256), false);
    shared->feed(text.first(256), false);
    shared->mark();
    for (int i = 0; i < 2; ++i) {
      shared->feed(std::span<const Token>(detour).first(200), false);  // enough to seal a page
      shared->decode(std::span<const Token>(detour).first(1));
      shared->rewind();
    }
    EXPECT_EQ(finish(*shared), finish(*alone)) << subject.name;
  }
}

TEST(Needle, IsFoundInAnF16CacheAtAThousandTokens) {
  const auto model = Model::load(testing::model_file("smollm2"));
  const EvalSubject f16{"f16", f16_plan(model->shape()), ""};
  NeedleOptions options;
  options.contexts = {1024};
  options.kinds = {"key"};
  options.depths = {0.1, 0.5, 0.9};
  options.trials = 1;
  const auto cells = evaluate_needle(model, {&f16, 1}, options, {});
  ASSERT_EQ(cells.size(), 3u);
  for (const NeedleCell& cell : cells) {
    EXPECT_EQ(cell.hits, cell.trials) << "at " << cell.depth;
    EXPECT_EQ(cell.answers.size(), 1u);
    EXPECT_GT(cell.nll, 0);
  }
}

// What one bit loses shows in the right answers' likelihood.
TEST(Needle, KindsOfOneHaystackAreLostByOneBit) {
  const auto model = Model::load(testing::model_file("smollm2"));
  const std::vector<EvalSubject> subjects = {{"f16", f16_plan(model->shape()), ""}, {"1/1", uniform(*model, "1"), ""}};
  NeedleOptions options;
  options.contexts = {384};
  options.kinds = {"keys", "quote", "word"};
  options.depths = {0.5};
  options.trials = 1;
  const auto cells = evaluate_needle(model, subjects, options, {});
  const size_t row = options.kinds.size() * options.depths.size();
  ASSERT_EQ(cells.size(), 2 * row);
  double exact_nll = 0, coded_nll = 0, exact_margin = 0, coded_margin = 0;
  for (size_t i = 0; i < row; ++i) {
    const NeedleCell &exact = cells[i], &coded = cells[row + i];
    EXPECT_EQ(exact.kind, coded.kind);
    EXPECT_EQ(exact.answer_tokens, coded.answer_tokens);
    EXPECT_GT(exact.answer_tokens, 0);
    exact_nll += exact.nll;
    coded_nll += coded.nll;
    exact_margin += exact.margin;
    coded_margin += coded.margin;
  }
  EXPECT_LT(exact_nll + 0.5, coded_nll);
  EXPECT_GT(exact_margin, coded_margin + 0.5);
  options.kinds = {"keys", "poem"};
  EXPECT_THROW(evaluate_needle(model, subjects, options, {}), Error);
}

TEST(Needle, ConfidenceIsWilsons) {
  EXPECT_NEAR(confidence(9, 10).low, 0.5958, 1e-4);
  EXPECT_NEAR(confidence(9, 10).high, 0.9821, 1e-4);
  EXPECT_EQ(confidence(0, 10).low, 0);
  EXPECT_NEAR(confidence(0, 10).high, 0.2775, 1e-4);
  EXPECT_EQ(confidence(50, 50).high, 1);
}

}  // namespace
}  // namespace kvmix
