// Sampling and streaming text.
#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "kvmix/engine.h"
#include "kvmix/error.h"
#include "support/models.h"

namespace kvmix {
namespace {

std::map<Token, int> draws(const SamplingOptions& options, std::span<const float> logits, int n) {
  Sampler sampler(options);
  std::map<Token, int> counts;
  for (int i = 0; i < n; ++i) ++counts[sampler.sample(logits)];
  return counts;
}

// ln of 0.5, 0.25, 0.125, 0.125.
const std::vector<float> kLogits = {std::log(0.5f), std::log(0.25f), std::log(0.125f), std::log(0.125f)};

TEST(Sampler, DrawsByProbability) {
  auto counts = draws({.temperature = 1, .top_k = 0, .top_p = 1, .min_p = 0, .seed = 4}, kLogits, 40000);
  EXPECT_NEAR(counts[0], 20000, 500);
  EXPECT_NEAR(counts[1], 10000, 450);
  EXPECT_NEAR(counts[2], 5000, 350);
  EXPECT_NEAR(counts[3], 5000, 350);
  // At temperature 0.5 probabilities are squared: 16 : 4 : 1 : 1.
  counts = draws({.temperature = 0.5f, .top_k = 0, .top_p = 1, .min_p = 0, .seed = 4}, kLogits, 40000);
  EXPECT_NEAR(counts[0], 40000 * 16 / 22, 500);
}

TEST(Sampler, CutsTheTail) {
  EXPECT_EQ(draws({.temperature = 0, .top_k = 0, .top_p = 1, .min_p = 0, .seed = 1}, kLogits, 100).size(), 1u);
  EXPECT_EQ(draws({.temperature = 1, .top_k = 2, .top_p = 1, .min_p = 0, .seed = 1}, kLogits, 2000).size(), 2u);
  EXPECT_EQ(draws({.temperature = 1, .top_k = 0, .top_p = 0.7f, .min_p = 0, .seed = 1}, kLogits, 2000).size(), 2u);
  EXPECT_EQ(draws({.temperature = 1, .top_k = 0, .top_p = 0.76f, .min_p = 0, .seed = 1}, kLogits, 2000).size(), 3u);
  EXPECT_EQ(draws({.temperature = 1, .top_k = 0, .top_p = 1, .min_p = 0.4f, .seed = 1}, kLogits, 2000).size(), 2u);
}

TEST(Sampler, RepeatsItselfBySeed) {
  const auto sequence = [](uint64_t seed) {
    Sampler sampler({.temperature = 1, .top_k = 0, .top_p = 1, .min_p = 0, .seed = seed});
    std::vector<Token> tokens;
    for (int i = 0; i < 64; ++i) tokens.push_back(sampler.sample(kLogits));
    return tokens;
  };
  EXPECT_EQ(sequence(9), sequence(9));
  EXPECT_NE(sequence(9), sequence(10));
}

TEST(Sampler, RefusesNonsense) {
  EXPECT_THROW(Sampler({.temperature = -1}), Error);
  EXPECT_THROW(Sampler({.temperature = std::nanf("")}), Error);
  EXPECT_THROW(Sampler({.top_p = 0}), Error);
  EXPECT_THROW(Sampler({.min_p = 2}), Error);
  EXPECT_THROW(Sampler({.top_k = -1}), Error);
  Sampler sampler({});
  EXPECT_THROW(sampler.sample({}), Error);
}

class Generate : public ::testing::Test {
 protected:
  Generate()
      : model_(Model::load(testing::model_file("smollm2"))), engine_(model_, f16_plan(model_->shape()), {.threads = 2}) {}
  GenerateResult run(const std::string& prompt, GenerateOptions options) {
    pieces_.clear();
    const SequenceId id = engine_.cache().create();
    const auto tokens = model_->tokenize(prompt, true);
    const auto result = generate(engine_, id, tokens, options, [&](std::string_view piece) {
      pieces_.emplace_back(piece);
      return true;
    });
    engine_.cache().remove(id);
    return result;
  }
  std::string streamed() const {
    std::string all;
    for (const std::string& p : pieces_) all += p;
    return all;
  }

  std::shared_ptr<const Model> model_;
  Engine engine_;
  std::vector<std::string> pieces_;
};

TEST_F(Generate, StopsBeforeAStopStringAlsoInsideTokens) {
  GenerateOptions options;
  options.sampling.temperature = 0;
  options.max_tokens = 48;
  const std::string whole = run("Once upon a time", options).text;
  ASSERT_GT(whole.size(), 40u);
  // A string from the middle of the text: wherever it starts, also inside a token.
  for (const size_t at : {size_t{5}, size_t{11}, size_t{18}}) {
    const std::string stop = whole.substr(at, 9);
    options.stop = {stop};
    const GenerateResult r = run("Once upon a time", options);
    EXPECT_EQ(r.stop_reason, "stop");
    EXPECT_EQ(r.text, whole.substr(0, whole.find(stop)));
    EXPECT_EQ(streamed(), r.text);
  }
}

TEST_F(Generate, HandsOutWholeCharacters) {
  GenerateOptions options;
  options.sampling.temperature = 0;
  options.max_tokens = 40;
  const GenerateResult r =
      run("Emoji by category. Faces: \xF0\x9F\x98\x80 \xF0\x9F\x98\x81 \xF0\x9F\x98\x82 \xF0\x9F\xA4\xA3 \xF0\x9F\x98\x83 "
          "\xF0\x9F\x98\x84",
          options);
  EXPECT_EQ(streamed(), r.text);
  bool wide = false;
  for (const std::string& piece : pieces_) {
    if (&piece == &pieces_.back()) break;  // the length may end inside a character
    EXPECT_NE(static_cast<unsigned char>(piece.front()) & 0xc0, 0x80) << "a piece starts inside a character";
    wide = wide || static_cast<unsigned char>(piece.front()) >= 0xf0;
  }
  EXPECT_TRUE(wide) << "the model wrote no emoji, so nothing was tested: " << r.text;
}

TEST_F(Generate, StopsWhenAskedTo) {
  GenerateOptions options;
  options.sampling.temperature = 0;
  options.max_tokens = 64;
  const SequenceId id = engine_.cache().create();
  const auto tokens = model_->tokenize("Once upon a time", true);
  int calls = 0;
  const auto result = generate(engine_, id, tokens, options, [&](std::string_view) { return ++calls < 3; });
  EXPECT_EQ(result.stop_reason, "cancelled");
  EXPECT_EQ(calls, 3);
}

}  // namespace
}  // namespace kvmix
