// Latents in place of keys and values, on every tiny architecture.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "kvmix/error.h"
#include "kvmix/measure.h"
#include "support/tiny_model.h"

namespace kvmix {
namespace {

class Latents : public ::testing::TestWithParam<::kvmix::testing::TinyModel> {
 protected:
  Latents() : folder_("kvmix-rank"), factors_(folder_.file("factors.gguf")) {
    testing::write_tiny_model(GetParam(), folder_.file("model.gguf"));
    model_ = Model::load(folder_.file("model.gguf"));
    tokens_ = testing::random_tokens(400, model_->vocab_size(), 3);
  }
  Plan plan(const std::string& method, double keep, const Plan& codecs) {
    FactoriseOptions options;
    options.method = method;
    options.keep = keep;
    options.threads = 2;
    const std::vector<std::vector<Token>> text{tokens_};
    factorise(model_, text, options, factors_, {});
    return with_factors(codecs, inspect_factors(factors_));
  }
  Plan f16() const { return f16_plan(model_->shape()); }
  Plan widths() const {
    PlannerRequest request;
    request.model = &model_->shape();
    request.options = {{"k-bits", "8"}, {"v-bits", "8"}};
    return make_plan("uniform", request);
  }
  std::unique_ptr<Engine> engine(const Plan& plan, int chunk = 512) const {
    EngineOptions options;
    options.threads = 2;
    options.chunk_tokens = chunk;
    return std::make_unique<Engine>(model_, plan, options);
  }
  std::vector<float> last(Engine& e, SequenceId id, std::span<const Token> tokens) const {
    const auto logits = e.prefill(id, tokens);
    return {logits.begin(), logits.end()};
  }
  static double difference(const std::vector<float>& a, const std::vector<float>& b) {
    double square = 0, norm = 0;
    for (size_t i = 0; i < a.size(); ++i) {
      square += std::pow(static_cast<double>(a[i]) - static_cast<double>(b[i]), 2);
      norm += std::pow(static_cast<double>(a[i]), 2);
    }
    return std::sqrt(square / norm);
  }

  testing::TemporaryFolder folder_;
  std::string factors_;
  std::shared_ptr<const Model> model_;
  std::vector<Token> tokens_;
};

TEST_P(Latents, OfFullRankAreTheModel) {
  auto exact = engine(f16());
  const std::vector<float> wanted = last(*exact, exact->cache().create(), tokens_);
  for (const char* method : {"lorc", "palu", "recalkv"}) {
    auto e = engine(plan(method, 1.0, f16()));
    EXPECT_LT(difference(wanted, last(*e, e->cache().create(), tokens_)), 5e-3) << method;
  }
  Plan partly = plan("palu", 1.0, f16());  // one layer keeps keys and values themselves
  partly.layers[1].key_rank = partly.layers[1].value_rank = 0;
  auto mixed = engine(partly);
  EXPECT_LT(difference(wanted, last(*mixed, mixed->cache().create(), tokens_)), 5e-3);
  auto half = engine(plan("lorc", 0.5, f16()));
  EXPECT_GT(difference(wanted, last(*half, half->cache().create(), tokens_)), 1e-2);
}

TEST_P(Latents, SequencesForkCutSaveAndLoadAndBytesAreTheFormulas) {
  const Plan made = plan("palu", 0.75, widths());
  auto e = engine(made, kPageTokens);
  Cache& cache = e->cache();
  const std::span<const Token> all(tokens_);
  const SequenceId id = cache.create();
  // The formula is of tokens that come one by one: a chunk frees what a sliding window left behind when the next step begins.
  last(*e, id, all.first(390));
  std::vector<float> wanted;
  for (size_t t = 390; t < all.size(); ++t) wanted = last(*e, id, all.subspan(t, 1));
  const MemoryReport memory = cache.memory();
  EXPECT_EQ(memory.total_bytes - memory.slack_bytes, predict_bytes(cache_config(made, model_->shape()), 400));
  EXPECT_LT(memory.total_bytes - memory.slack_bytes, predict_bytes(cache_config(widths(), model_->shape()), 400));
  const SequenceId fork = cache.fork(id);
  const std::vector<float> next = last(*e, id, all.first(1));
  EXPECT_EQ(last(*e, fork, all.first(1)), next);
  cache.save(id, folder_.file("saved"), e->cache_fingerprint());
  auto other = engine(made, kPageTokens);
  const SequenceId loaded = other->cache().load(folder_.file("saved"), other->cache_fingerprint());
  EXPECT_EQ(last(*e, id, all.first(1)), last(*other, loaded, all.first(1)));
  cache.truncate(fork, 399);
  EXPECT_LT(difference(wanted, last(*e, fork, all.last(1))), 0.05);
}

TEST_P(Latents, WhatDoesNotFitIsRefused) {
  const auto message = [&](const Plan& p) -> std::string {
    try {
      engine(p);
    } catch (const Error& e) {
      return e.what();
    }
    return "";
  };
  const Plan made = plan("lorc", 0.5, f16());
  Plan rank = made;
  rank.layers[0].key_rank = 64 + 16;
  EXPECT_NE(message(rank).find("layer 0: rank 80 of keys does not fit"), std::string::npos) << message(rank);
  rank.layers[0].key_rank = 64;
  EXPECT_NE(message(rank).find("rank 64 in the plan"), std::string::npos) << message(rank);
  Plan policy = made;
  policy.channels = PolicySpec{"think", {}};
  EXPECT_NE(message(policy).find("policy think needs keys"), std::string::npos) << message(policy);
  Plan other = made;
  other.rank->checksum = "1";
  EXPECT_NE(message(other).find("holds other factors"), std::string::npos) << message(other);
  EXPECT_THROW(Cache(cache_config(made, model_->shape())), Error);  // without factors
  std::string bytes = testing::read_bytes(factors_);
  bytes[bytes.size() - 200] ^= 1;
  testing::write_bytes(factors_, bytes);
  EXPECT_NE(message(made).find("damaged factors file"), std::string::npos) << message(made);
}

// Projections of inputs that the norm before them silences in all but 24 channels have rank 24, whatever their weights are.
class LatentsOfSilencedInputs : public Latents {};

TEST_P(LatentsOfSilencedInputs, AreFewWithoutText) {
  auto exact = engine(f16());
  const std::vector<float> wanted = last(*exact, exact->cache().create(), tokens_);
  auto e = engine(plan("lorc", 0.5, f16()));
  EXPECT_LT(difference(wanted, last(*e, e->cache().create(), tokens_)), 5e-3);
}

INSTANTIATE_TEST_SUITE_P(Lorc, LatentsOfSilencedInputs,
                         ::testing::Values(testing::TinyModel{.architecture = "llama", .attention_inputs = 24},
                                           testing::TinyModel{.architecture = "gemma3",
                                                              .layers = 7,
                                                              .qk_norm = true,
                                                              .post_norms = true,
                                                              .sliding_window = 96,
                                                              .attention_inputs = 24}));

INSTANTIATE_TEST_SUITE_P(All, Latents, ::testing::ValuesIn(testing::tiny_models()),
                         [](const auto& tiny) { return std::to_string(tiny.index) + "_" + testing::tiny_name(tiny.param); });

}  // namespace
}  // namespace kvmix
