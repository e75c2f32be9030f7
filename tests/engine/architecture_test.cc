// Every architecture on tiny random weights: libllama's logits, chunks and batches, saved and continued caches.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "kvmix/engine.h"
#include "kvmix/error.h"
#include "support/divergence.h"
#include "support/tiny_model.h"

namespace kvmix {
namespace {

using testing::divergence;

constexpr size_t kTokens = 512;

struct Agreement {
  double mean_kl = 0, top1 = 0;
};

class TinyArchitecture : public ::testing::TestWithParam<::kvmix::testing::TinyModel> {
 protected:
  TinyArchitecture() : folder_("kvmix-tiny"), path_(folder_.file("model.gguf")) {
    testing::write_tiny_model(GetParam(), path_);
    model_ = Model::load(path_);
    tokens_ = testing::random_tokens(kTokens, model_->vocab_size(), 3);
    vocab_ = static_cast<size_t>(model_->vocab_size());
  }
  std::unique_ptr<Engine> engine(int chunk = 512) const {
    EngineOptions options;
    options.threads = 2;
    options.chunk_tokens = chunk;
    return std::make_unique<Engine>(model_, f16_plan(model_->shape()), options);
  }
  Agreement compare(Engine& engine, Peer& peer) const {
    const EngineItem item{engine.cache().create(), tokens_, true};
    const auto ours = engine.step({&item, 1});
    const auto theirs = peer.step(tokens_, true);
    Agreement sum;
    if (ours.size() != theirs.size()) return {INFINITY, 0};
    const auto best = [](std::span<const float> x) { return std::max_element(x.begin(), x.end()) - x.begin(); };
    for (size_t t = 0; t < kTokens; ++t) {
      const auto p = theirs.subspan(t * vocab_, vocab_), q = ours.subspan(t * vocab_, vocab_);
      sum.mean_kl += divergence(p, q) / kTokens;
      sum.top1 += best(p) == best(q) ? 1.0 / kTokens : 0.0;
    }
    return sum;
  }
  static std::vector<float> copy(std::span<const float> logits) { return {logits.begin(), logits.end()}; }
  static void expect_close(std::span<const float> a, std::span<const float> b) {
    ASSERT_EQ(a.size(), b.size());
    EXPECT_LT(divergence(a, b), 1e-5);
  }

  testing::TemporaryFolder folder_;
  std::string path_;
  std::shared_ptr<const Model> model_;
  std::vector<Token> tokens_;
  size_t vocab_ = 0;
};

TEST_P(TinyArchitecture, AgreesWithLibllama) {
  const auto ours = engine();
  Peer peer(path_, "f16", 1024, 2);
  const Agreement agreement = compare(*ours, peer);
  EXPECT_LT(agreement.mean_kl, 1e-3);
  EXPECT_GT(agreement.top1, 0.99);
}

TEST_P(TinyArchitecture, TheComparisonNoticesAnotherRotation) {
  const auto ours = engine();
  ::kvmix::testing::TinyModel other = GetParam();
  other.rope_base = 1000.0f;
  testing::write_tiny_model(other, folder_.file("other.gguf"));
  Peer peer(folder_.file("other.gguf"), "f16", 1024, 2);
  EXPECT_GT(compare(*ours, peer).mean_kl, 1e-3);  // the bound of the test above
}

TEST_P(TinyArchitecture, ChunksEqualOneByOne) {
  const auto chunked = engine(100), single = engine();
  const auto expected = copy(chunked->prefill(chunked->cache().create(), tokens_));
  const SequenceId id = single->cache().create();
  std::span<const float> logits;
  for (const Token& token : tokens_) {
    const EngineItem item{id, {&token, 1}};
    logits = single->step({&item, 1});
  }
  expect_close(expected, logits);
}

TEST_P(TinyArchitecture, ABatchOfRaggedSequencesEqualsSingles) {
  const auto batched = engine(), single = engine();
  std::vector<EngineItem> first, second;
  std::vector<SequenceId> ids;
  const std::vector<size_t> lengths = {1, 37, 160};
  for (const size_t n : lengths) {
    ids.push_back(batched->cache().create());
    first.push_back({ids.back(), {tokens_.data(), n}, false, true});
    second.push_back({ids.back(), {&tokens_[n], 2}});
  }
  EXPECT_TRUE(batched->step(first).empty());
  const auto rows = copy(batched->step(second));
  ASSERT_EQ(rows.size(), lengths.size() * vocab_);
  for (size_t s = 0; s < lengths.size(); ++s) {
    const auto alone = single->prefill(single->cache().create(), {tokens_.data(), lengths[s] + 2});
    expect_close({&rows[s * vocab_], vocab_}, alone);
  }
}

TEST_P(TinyArchitecture, ASavedCacheContinuesIdentically) {
  const auto before = engine(), after = engine();
  const SequenceId id = before->cache().create();
  before->prefill(id, {tokens_.data(), 300});
  before->cache().save(id, folder_.file("cache"), before->cache_fingerprint());
  const SequenceId loaded = after->cache().load(folder_.file("cache"), after->cache_fingerprint());
  const auto expected = copy(before->prefill(id, {&tokens_[300], 5}));
  EXPECT_EQ(expected, copy(after->prefill(loaded, {&tokens_[300], 5})));
}

TEST_P(TinyArchitecture, RefusesWhatDoesNotFit) {
  const auto e = engine();
  const SequenceId id = e->cache().create();
  EXPECT_THROW(e->prefill(id, {}), Error);
  EXPECT_THROW(e->prefill(id, testing::random_tokens(1025, 10, 1)), Error);
  const std::vector<Token> outside = {model_->vocab_size()};
  EXPECT_THROW(e->prefill(id, outside), Error);
  EXPECT_EQ(e->cache().length(id), 0);
}

TEST_P(TinyArchitecture, FingerprintFollowsTheContentNotThePath) {
  const std::string copy = folder_.file("copy.gguf");
  std::string bytes = testing::read_bytes(path_);
  testing::write_bytes(copy, bytes);
  EXPECT_EQ(Model::load(copy)->shape().fingerprint, model_->shape().fingerprint);
  const std::unique_ptr<gguf_context, decltype(&gguf_free)> gguf(gguf_init_from_file(path_.c_str(), {true, nullptr}),
                                                                 gguf_free);
  char& weight = bytes[gguf_get_data_offset(gguf.get())];  // of the embedding's first row
  weight = static_cast<char>(weight ^ 1);
  testing::write_bytes(copy, bytes);
  EXPECT_NE(Model::load(copy)->shape().fingerprint, model_->shape().fingerprint);
}

INSTANTIATE_TEST_SUITE_P(All, TinyArchitecture, ::testing::ValuesIn(::kvmix::testing::tiny_models()),
                         [](const auto& test) { return testing::tiny_name(test.param); });

TEST(Architectures, EachHasATinyModel) {
  std::set<std::string> tested;
  for (const auto& m : ::kvmix::testing::tiny_models()) tested.insert(m.architecture);
  for (const ArchitectureInfo& a : architectures()) EXPECT_TRUE(tested.contains(a.name)) << a.name;
}

}  // namespace
}  // namespace kvmix
