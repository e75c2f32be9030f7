// The cache carries token policies out: one suite that every policy goes through.
#include "support/policy_fixture.h"

namespace kvmix {
namespace {

using testing::all_positions;
using testing::contents;
using testing::error_over_kept;
using testing::feed;
using testing::kDeviceChunks;
using testing::key_codec;
using testing::kPolicyDim;
using testing::kPrompt;
using testing::kRecents;
using testing::make_layer;
using testing::part;
using testing::random_rows;
using testing::Rows;
using testing::running_policies;
using testing::step;
using testing::stored_rows;
using testing::two_layers;
using testing::used_bytes;
using testing::value_codec;

class PolicyCache : public testing::PoliciesOnDevice {};
INSTANTIATE_TEST_SUITE_P(Devices, PolicyCache, ::testing::ValuesIn(testing::kDevices), testing::device_name);

TEST(PolicyCacheOnCpu, EveryPolicyRuns) {
  std::set<std::string> names;
  for (const PolicySpec& spec : running_policies(false)) names.insert(spec.name);
  for (const PolicyInfo& info : policies()) EXPECT_TRUE(names.contains(info.name)) << info.name;
}

// What stays is what the policy says of the reference's scores over the keys that the pages hold.
TEST_P(PolicyCache, KeepsWhatThePolicyDecides) {
  for (const CodecSpec& recent : kRecents) {
    for (const PolicySpec& spec : running()) {
      std::mt19937 random(1);
      const CacheConfig config = layers_of(spec, recent);
      Cache cache(config);
      CacheConfig unsealed = cache.config();  // in the policy's widths
      unsealed.tokens.reset();
      for (LayerConfig& layer : unsealed.layers) layer.window.tokens = 4096;
      Cache reference(unsealed);
      const SequenceId id = cache.create(), same = reference.create();
      Rows rows = random_rows(config.layers[0], kPrompt, random);
      testing::round_queries(rows);
      feed(cache, id, rows, kPrompt, kPrompt);
      feed(reference, same, rows, kPrompt, kPrompt);
      const std::unique_ptr<Policy> policy = make_policy(spec);
      for (const int l : {0, 2}) {
        const LayerConfig& layer = config.layers[static_cast<size_t>(l)];
        const int dim = layer.head_dim, queries = std::min(kPrompt, policy->needs().window_queries);
        std::vector<int64_t> positions(kPrompt);
        for (int64_t p = 0; p < kPrompt; ++p) positions[static_cast<size_t>(p)] = p;
        const std::vector<Tier> tiers(kPrompt, Tier::kHigh);
        const Needs needs = policy->needs();
        std::vector<std::vector<float>> windows, masses;
        std::vector<int32_t> counted(kPrompt);
        std::vector<HeadView> heads;
        for (int h = 0; h < 2; ++h) {
          const std::vector<float> keys = stored_rows(reference, same, l, h, Side::kKey);
          const ScoreKeys scored{2, dim, layer.scale, layer.softcap, keys, positions};
          std::vector<float> row(2 * kPrompt);
          windows.emplace_back(2 * kPrompt, 0.0f);
          masses.emplace_back(kPrompt, 0.0f);
          std::fill(counted.begin(), counted.end(), 0);
          const bool all = needs.mass != MassReduce::kNone && !needs.mass_from_window;
          for (int q = all ? 0 : kPrompt - queries; q < kPrompt; ++q) {
            score_row(scored, &rows.q[static_cast<size_t>((q * 4 + h * 2) * dim)], q, row);
            count_query(scored, q, counted);
            if (q >= kPrompt - queries) add_to_window(row, windows.back());
            if (all) add_mean_mass(row, masses.back());
          }
          if (needs.mass_from_window) max_of_window(windows.back(), masses.back());
        }
        for (int h = 0; h < 2; ++h) {
          HeadView& head = heads.emplace_back();
          head.positions = positions;
          head.tiers = tiers;
          if (queries > 0) head.window = windows[static_cast<size_t>(h)];
          if (needs.mass == MassReduce::kNone) continue;
          head.mass = masses[static_cast<size_t>(h)];
          head.queries = counted;
        }
        PolicyView view;
        view.shape = {
            .layer = l, .layers = 3, .ordinal = l / 2, .ordinals = 2, .kv_heads = 2, .heads_per_kv = 2, .head_dim = dim};
        const CacheConfig& used = cache.config();
        const LayerConfig& charged = used.layers[static_cast<size_t>(l)];
        view.shape.token_bytes.fill(
            static_cast<double>(tile_bytes(charged.key.codec, dim) + tile_bytes(charged.value.codec, dim)) / kPageTokens);
        view.length = view.prompt_length = kPrompt;
        view.window_rows = queries;
        view.heads = heads;
        PolicyScratch scratch;
        Decision decision;
        policy->decide(view, scratch, decision);
        for (size_t h = 0; h < 2; ++h) {
          std::vector<int64_t> kept;
          for (int32_t i = 0; i < kPrompt; ++i) {
            const auto& drop = decision.heads[h].drop;
            if (!std::binary_search(drop.begin(), drop.end(), i)) kept.push_back(i);
          }
          EXPECT_LT(kept.size(), static_cast<size_t>(kPrompt)) << to_string(spec);
          EXPECT_EQ(cache.kept(id, l)[h], kept) << to_string(spec) << " layer " << l << " head " << h;
          if (!policy->has_low_tier()) continue;
          std::vector<int64_t> low;
          for (const Move& move : decision.heads[h].move) low.push_back(move.token);
          EXPECT_FALSE(low.empty());
          EXPECT_EQ(cache.low_tier(id, l)[h], low) << to_string(spec) << " layer " << l << " head " << h;
        }
      }
      EXPECT_GE(cache.kept(id, 1)[0].size(), 200u);  // a sliding window is left alone
    }
  }
}

TEST_P(PolicyCache, ChunkedPromptsAreWholeOnes) {
  constexpr int kTokens = 500;  // past three pages, and more than any policy keeps
  for (const CodecSpec& recent : kRecents) {
    for (const PolicySpec& spec : running()) {
      std::mt19937 random(2);
      CacheConfig config = layers_of(spec, recent);
      config.layers.erase(config.layers.begin() + 1);  // sliding windows seal inside prompts
      Cache cache(config);
      const Rows rows = random_rows(config.layers[0], kTokens, random);
      const SequenceId whole = cache.create();
      feed(cache, whole, rows, kTokens, kTokens);
      EXPECT_LT(cache.kept(whole, 0)[0].size(), static_cast<size_t>(kTokens)) << to_string(spec);
      for (const int chunk : {17, 128, 300}) {
        const SequenceId id = cache.create();
        feed(cache, id, rows, kTokens, chunk);
        EXPECT_EQ(all_positions(cache, id), all_positions(cache, whole)) << to_string(spec) << " chunk " << chunk;
        EXPECT_EQ(contents(cache, id), contents(cache, whole)) << to_string(spec) << " chunk " << chunk;
        cache.remove(id);
      }
    }
  }
}

// Bytes fall to the formula's, and stay on it token by token; attention is that over the kept tokens.
TEST_P(PolicyCache, BytesAndAttentionAreThoseOfTheKeptTokens) {
  for (const CodecSpec& recent : kRecents) {
    for (const PolicySpec& spec : running()) {
      std::mt19937 random(3);
      CacheConfig config = layers_of(spec, recent);
      config.exact = true;  // what is left is the codecs'
      Cache cache(config);
      const SequenceId id = cache.create();
      feed(cache, id, random_rows(config.layers[0], kPrompt, random), kPrompt, 200);
      CacheConfig all = config;
      all.tokens.reset();
      const Needs needs = make_policy(spec)->needs();
      const bool counted = needs.every_step && needs.mass != MassReduce::kNone;
      const bool fixed = spec.name != "adakv" && spec.name != "dbudgetkv" && spec.name != "kvcrush" && !counted;
      constexpr size_t page_bytes = size_t{2} * kPageTokens * kPolicyDim * sizeof(uint16_t);
      for (int i = 0; i < 300; ++i) {
        Rows rows = random_rows(config.layers[0], 1, random);
        step(cache, {{id, 1}}, rows);
        const int64_t length = cache.length(id);
        const size_t used = used_bytes(cache), predicted = predict_bytes(config, length, kPrompt);
        if (fixed) {
          ASSERT_EQ(used, predicted) << to_string(spec) << " at " << length;
        } else if (spec.name == "adakv" || spec.name == "kvcrush") {  // uneven heads, whole pages of tokens: a page each
          ASSERT_LE(used, predicted + 4 * page_bytes) << to_string(spec) << " at " << length;
        } else if (counted) {  // scattered tokens leave part of a page, low tiers another
          ASSERT_LE(used, predicted + 6 * page_bytes) << to_string(spec) << " at " << length;
        } else {
          ASSERT_LT(used, predict_bytes(all, length)) << to_string(spec);
        }
        // A step that a decision follows has seen more than is left.
        if (needs.every_step && (length + 1 - kPrompt) % kPageTokens == 0) continue;
        // Pages change at few tokens: at those, and now and then between.
        const bool changed = (length - kPrompt) % kPageTokens < 2 || (length - config.layers[0].sinks) % kPageTokens < 2;
        if (!changed && i % 4 != 0) continue;
        ASSERT_LT(error_over_kept(cache, id, rows, 2), 0.05) << to_string(spec) << " at " << length;
      }
      cache.remove(id);
      EXPECT_EQ(cache.memory().total_bytes, 0u);
    }
  }
}

TEST_P(PolicyCache, SinksAndWindowStayAndNoTokenStandsTwice) {
  for (const PolicySpec& spec : running()) {
    std::mt19937 random(4);
    Cache cache(layers_of(spec));
    const SequenceId id = cache.create();
    feed(cache, id, random_rows(cache.config().layers[0], kPrompt, random), kPrompt, kPrompt);
    const std::unique_ptr<Policy> policy = make_policy(spec);
    for (const int l : {0, 2}) {
      LayerShape shape{
          .layer = l, .layers = 3, .ordinal = l / 2, .ordinals = 2, .kv_heads = 2, .heads_per_kv = 2, .head_dim = kPolicyDim};
      shape.token_bytes.fill(64);
      const Protection kept = policy->protection(shape, kPrompt);
      const auto heads = cache.kept(id, l);
      for (const auto& positions : heads) {
        EXPECT_EQ(std::set<int64_t>(positions.begin(), positions.end()).size(), positions.size());
        EXPECT_TRUE(std::is_sorted(positions.begin(), positions.end()));
        if (spec.name == "quantized-pruning") continue;  // its window depends on the codec's bytes
        for (int64_t p = 0; p < kept.sinks; ++p) EXPECT_TRUE(std::binary_search(positions.begin(), positions.end(), p));
        for (int64_t p = kPrompt - kept.window; p < kPrompt; ++p) {
          EXPECT_TRUE(std::binary_search(positions.begin(), positions.end(), p)) << to_string(spec) << " " << p;
        }
      }
      EXPECT_EQ(heads[0] == heads[1], policy->heads_share()) << to_string(spec);
    }
  }
}

// Sinks that fill more than a page's slots are scored, and moved together, like other tokens.
TEST(PolicyCacheOnCpu, ManySinks) {
  for (const PolicySpec& spec : running_policies()) {
    std::mt19937 random(14);
    CacheConfig config = two_layers(spec);
    config.layers.resize(1);
    config.layers[0].sinks = 300;
    Cache cache(config);
    const SequenceId id = cache.create();
    feed(cache, id, random_rows(config.layers[0], kPrompt, random), kPrompt, 200);
    for (int i = 0; i < 3; ++i) {
      Rows rows = random_rows(config.layers[0], 1, random);
      step(cache, {{id, 1}}, rows);
      ASSERT_LT(error_over_kept(cache, id, rows, 0), 0.05) << to_string(spec);
    }
    cache.remove(id);
    EXPECT_EQ(cache.memory().total_bytes, 0u);
  }
}

TEST_P(PolicyCache, PagesThatWereFreedDoNotMatter) {
  for (const PolicySpec& spec : running()) {
    std::mt19937 random(5);
    const CacheConfig config = layers_of(spec);
    Cache cache(config), busy(config);
    const SequenceId a = cache.create(), b = busy.create();
    const Rows rows = random_rows(config.layers[0], kPrompt, random),
               other = random_rows(config.layers[0], kPrompt + 100, random);
    feed(cache, a, rows, kPrompt, kPrompt);
    feed(busy, b, rows, kPrompt, kPrompt);
    feed(busy, busy.create(), other, kPrompt + 100, kPrompt + 100);  // needs more than was freed, so it writes over all of it
    for (int i = 0; i < 5; ++i) {
      Rows one = random_rows(config.layers[0], 1, random), two = one;
      step(cache, {{a, 1}}, one);
      step(busy, {{b, 1}}, two);
      ASSERT_EQ(one.out, two.out) << to_string(spec);
    }
  }
}

TEST_P(PolicyCache, ForkTruncateSaveAndAbortLoseNothing) {
  const std::string path = ::testing::TempDir() + "/kvmix_policy_cache_" + std::to_string(getpid());
  for (const CodecSpec& recent : kRecents) {
    for (const PolicySpec& spec : running()) {
      std::mt19937 random(6);
      CacheConfig config = layers_of(spec, recent);
      config.layers.erase(config.layers.begin() + 1);
      Cache cache(config), other(config);
      const SequenceId id = cache.create();
      feed(cache, id, random_rows(config.layers[0], kPrompt, random), kPrompt, 300);
      constexpr int kDecoded = 150;  // past a decision while decoding
      for (int i = 0; i < kDecoded; ++i) {
        Rows rows = random_rows(config.layers[0], 1, random);
        step(cache, {{id, 1}}, rows);
      }
      const auto positions = all_positions(cache, id);
      const auto rows_before = contents(cache, id);
      const size_t bytes = used_bytes(cache);

      const std::vector<StepItem> second = {{id, 400}};
      cache.begin_step(second);
      cache.abort_step();
      EXPECT_EQ(contents(cache, id), rows_before);

      cache.save(id, path, "f");
      const SequenceId loaded = other.load(path, "f");
      EXPECT_EQ(all_positions(other, loaded), positions);
      EXPECT_EQ(contents(other, loaded), rows_before);
      EXPECT_EQ(inspect_saved_cache(path).version, make_policy(spec)->needs().mass == MassReduce::kNone ? 3 : 4);
      EXPECT_EQ(used_bytes(other), bytes) << to_string(spec);

      const SequenceId copy = cache.fork(id);
      for (const int64_t n : {1049, 1020, 920, 900, 880, 500, 10, 0}) {
        const SequenceId cut = cache.fork(id);
        cache.truncate(cut, n);
        auto expected = positions;
        for (auto& head : expected) head.erase(std::lower_bound(head.begin(), head.end(), n), head.end());
        EXPECT_EQ(all_positions(cache, cut), expected) << to_string(spec) << " cut to " << n;
        Rows rows = random_rows(config.layers[0], 1, random);
        step(cache, {{cut, 1}}, rows);
        for (auto& head : expected) head.push_back(n);
        EXPECT_EQ(all_positions(cache, cut), expected);
        EXPECT_LT(error_over_kept(cache, cut, rows, 1), 0.05) << to_string(spec) << " cut to " << n;
        cache.remove(cut);
      }
      EXPECT_EQ(contents(cache, id), rows_before);

      // A second prompt on the copy; the first sequence does not notice.
      feed(cache, copy, random_rows(config.layers[0], 600, random), 600, 150);
      for (const auto& head : all_positions(cache, copy)) EXPECT_EQ(head.back(), kPrompt + kDecoded + 600 - 1);
      Rows rows = random_rows(config.layers[0], 1, random);
      step(cache, {{copy, 1}}, rows);
      EXPECT_LT(error_over_kept(cache, copy, rows, 1), 0.05) << to_string(spec);
      EXPECT_EQ(contents(cache, id), rows_before);
      EXPECT_EQ(all_positions(cache, id), positions);
      cache.remove(copy);
      cache.remove(id);
      EXPECT_EQ(cache.memory().total_bytes, 0u);
    }
  }
  std::filesystem::remove(path);
}

// A prompt that fits without its compaction's pages is refused before it starts, or kept and compacted; nothing is in between.
TEST_P(PolicyCache, OutOfMemoryComesBeforeAnythingChanged) {
  for (const PolicySpec& spec : running()) {
    std::mt19937 random(7);
    CacheConfig config = layers_of(spec);
    const Rows rows = random_rows(config.layers[0], kPrompt, random);
    int refused = 0, taken = 0;
    // Beyond limits that nothing met every larger one gives the same.
    const size_t unit = on_cpu() ? 1 : kDeviceChunks;
    for (size_t limit = unit * 400 << 10; limit < unit * 3 << 20 && taken < 3; limit += unit * 128 << 10) {
      config.max_bytes = limit;
      Cache cache(config);
      const SequenceId id = cache.create();
      try {
        feed(cache, id, rows, kPrompt, 300);
        ++taken;
        EXPECT_EQ(cache.length(id), kPrompt);
        EXPECT_LT(cache.kept(id, 0)[0].size(), static_cast<size_t>(kPrompt));
      } catch (const Error& e) {
        EXPECT_EQ(e.status(), Status::kOutOfMemory);
        ++refused;
        EXPECT_EQ(cache.length(id) % 300, 0);
        for (const auto& head : cache.kept(id, 2)) EXPECT_EQ(static_cast<int64_t>(head.size()), cache.length(id));
      }
      cache.remove(id);
      EXPECT_EQ(cache.memory().total_bytes, 0u);
    }
    EXPECT_GT(refused, 0) << to_string(spec);
    EXPECT_GT(taken, 0) << to_string(spec);
  }
}

TEST(PolicyCacheOnCpu, WhatCannotRunIsNamed) {
  const auto refused = [](const PolicySpec& spec, int sliding_window, const std::string& what, const char* device = "cpu") {
    CacheConfig config = two_layers(spec);
    config.device = device;
    for (LayerConfig& layer : config.layers) layer.sliding_window = sliding_window;
    try {
      Cache cache(config);
      FAIL() << to_string(spec) << " was accepted";
    } catch (const Error& e) {
      EXPECT_NE(std::string(e.what()).find(what), std::string::npos) << e.what();
      EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos);
    }
  };
  refused({"magic", {}}, 0, "magic");
  refused({"snapkv", {{"tokens", 10.0}}}, 0, "tokens is 10");
  refused({"snapkv", {}}, 256, "every layer has a sliding window");
  for (const char* name : {"h2o", "leankv"}) {
    refused({name, {}}, 0, std::string(name) + " counts what every query pays to each token, which the device \"cuda\"",
            "cuda");
  }
}

TEST_P(PolicyCache, DecodedTokensAreNoPrompt) {
  std::mt19937 random(8);
  Cache cache(layers_of({"snapkv", {}}));
  const SequenceId id = cache.create();
  feed(cache, id, random_rows(cache.config().layers[0], kPrompt, random), kPrompt, kPrompt);
  const size_t kept = cache.kept(id, 0)[0].size();
  Rows rows = random_rows(cache.config().layers[0], 64, random);
  step(cache, {{.sequence = id, .n_tokens = 64, .decoded = true}}, rows);
  EXPECT_EQ(cache.kept(id, 0)[0].size(), kept + 64);
  rows = random_rows(cache.config().layers[0], 8, random);
  step(cache, {{.sequence = id, .n_tokens = 8, .more = true}}, rows);
  const std::vector<StepItem> inside = {{.sequence = id, .n_tokens = 1, .decoded = true}};
  EXPECT_THROW(cache.begin_step(inside), Error);
}

}  // namespace
}  // namespace kvmix
