// Our engine with the f16 cache against libllama's own logits, on real models.
#include <gtest/gtest.h>

#include <cmath>

#include "kvmix/engine.h"
#include "support/models.h"

namespace kvmix {
namespace {

struct Agreement {
  double mean_kl = 0, top1 = 0;
};

void add(std::span<const float> p, std::span<const float> q, Agreement& sum) {
  const auto log_sum = [](std::span<const float> x) {
    const float top = *std::max_element(x.begin(), x.end());
    double total = 0;
    for (const float v : x) total += std::exp(static_cast<double>(v - top));
    return static_cast<double>(top) + std::log(total);
  };
  const double lp = log_sum(p), lq = log_sum(q);
  double kl = 0;
  for (size_t i = 0; i < p.size(); ++i) {
    const double a = static_cast<double>(p[i]) - lp, b = static_cast<double>(q[i]) - lq;
    kl += std::exp(a) * (a - b);
  }
  sum.mean_kl += kl;
  const auto best = [](std::span<const float> x) { return std::max_element(x.begin(), x.end()) - x.begin(); };
  sum.top1 += best(p) == best(q) ? 1 : 0;
}

class RealModel : public ::testing::TestWithParam<const char*> {};

TEST_P(RealModel, AgreesWithLibllamaOverFourThousandTokens) {
  const std::string path = testing::model_file(GetParam());
  const auto model = Model::load(path);
  EngineOptions options;
  options.threads = 2;
  Engine engine(model, f16_plan(model->shape()), options);
  Peer peer(path, "f16", 2048, 2);
  const std::vector<Token> tokens = testing::long_text_tokens(*model, 4096);
  const auto vocab = static_cast<size_t>(model->vocab_size());
  Agreement sum;
  for (size_t window = 0; window < 4096; window += 2048) {
    const SequenceId id = engine.cache().create();
    peer.clear();
    for (size_t at = window; at < window + 2048; at += 256) {
      const std::span<const Token> chunk(&tokens[at], 256);
      const EngineItem item{id, chunk, true};
      const auto ours = engine.step({&item, 1});
      const auto theirs = peer.step(chunk, true);
      ASSERT_EQ(ours.size(), theirs.size());
      for (size_t t = 0; t < 256; ++t) add(theirs.subspan(t * vocab, vocab), ours.subspan(t * vocab, vocab), sum);
    }
    engine.cache().remove(id);
  }
  EXPECT_LT(sum.mean_kl / 4096, 1e-3);
  EXPECT_GT(sum.top1 / 4096, 0.99);
  std::printf("%s: mean KL %.2e, top-1 agreement %.2f %%\n", GetParam(), sum.mean_kl / 4096, sum.top1 / 40.96);
}

INSTANTIATE_TEST_SUITE_P(Models, RealModel, ::testing::Values("smollm2", "gemma3"),
                         [](const auto& test) { return std::string(test.param); });

}  // namespace
}  // namespace kvmix
