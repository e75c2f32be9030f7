// Token policies that act while decoding: what stays, in how many bytes, and what copies and undone steps make of it.
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
using testing::step;
using testing::stored_rows;
using testing::two_layers;
using testing::used_bytes;
using testing::value_codec;

class PolicyDecoding : public testing::PoliciesOnDevice {
 protected:
  // Those of these that the device carries out.
  std::vector<PolicySpec> here_of(const std::vector<PolicySpec>& all) const {
    std::vector<PolicySpec> runs;
    for (const PolicySpec& spec : all) {
      if (on_cpu() || make_policy(spec)->needs().mass == MassReduce::kNone) runs.push_back(spec);
    }
    return runs;
  }
};
INSTANTIATE_TEST_SUITE_P(Devices, PolicyDecoding, ::testing::ValuesIn(testing::kDevices), testing::device_name);

// Decoding under policies that act on every token: what stays, from the attention that was counted, of every token or of some
// that stand for the others. Rows are fp16, so the reference knows the keys.
TEST_P(PolicyDecoding, KeepsWhatThePolicyDecides) {
  const std::vector<PolicySpec> specs = {
      {"streaming", {{"tokens", 200.0}}},
      {"h2o", {{"tokens", 200.0}}},
      {"h2o", {{"tokens", 200.0}, {"score", "mean"}, {"recent", 40.0}, {"every", 4.0}}},
      {"leankv", {{"low", 0.7}, {"high-k-bits", 16.0}, {"high-v-bits", 16.0}, {"low-k-bits", 16.0}, {"low-v-bits", 16.0}}}};
  constexpr int kTokens = 300, kDim = kPolicyDim;
  for (const PolicySpec& spec : here_of(specs)) {
    std::mt19937 random(21);
    CacheConfig config = here(testing::one_layer(make_layer(4, 2, kDim, CodecSpec{}, CodecSpec{}, 16)));
    config.tokens = spec;
    Cache cache(config);
    const LayerConfig& layer = config.layers[0];
    const std::unique_ptr<Policy> policy = make_policy(spec);
    const Needs needs = policy->needs();
    const SequenceId id = cache.create();
    Rows rows = random_rows(layer, kTokens, random);
    // Of every position: its key, what was paid to it, by head.
    std::vector<std::vector<float>> keys(2), mass(2);
    const auto count = [&](int h, const float* q, int64_t position, const std::vector<int64_t>& here) {
      if (position % needs.mass_every != 0) return;
      std::vector<float> near;
      for (const int64_t p : here) {
        const auto at = keys[static_cast<size_t>(h)].begin() + p * kDim;
        near.insert(near.end(), at, at + kDim);
      }
      std::vector<float> row(2 * here.size()), paid(here.size(), 0.0f);
      score_row({2, kDim, layer.scale, layer.softcap, near, here}, q, position, row);
      needs.mass == MassReduce::kMax ? add_max_mass(row, paid) : add_mean_mass(row, paid);
      for (size_t i = 0; i < here.size(); ++i)
        mass[static_cast<size_t>(h)][static_cast<size_t>(here[i])] += static_cast<float>(needs.mass_every) * paid[i];
    };
    const auto append = [&](const Rows& from, int n) {
      for (int h = 0; h < 2; ++h) {
        for (int t = 0; t < n; ++t) {
          const float* row = &from.k[static_cast<size_t>((t * 2 + h) * kDim)];
          for (int c = 0; c < kDim; ++c)
            keys[static_cast<size_t>(h)].push_back(static_cast<float>(static_cast<_Float16>(row[c])));
          mass[static_cast<size_t>(h)].push_back(0);
        }
      }
    };
    append(rows, kTokens);
    std::vector<int64_t> all(kTokens);
    for (int64_t p = 0; p < kTokens; ++p) all[static_cast<size_t>(p)] = p;
    const int first_counted = needs.mass_from_window ? kTokens - needs.window_queries : 0;
    for (int h = 0; h < 2; ++h) {
      std::vector<float> window(2 * kTokens, 0.0f), row(2 * kTokens);
      for (int q = first_counted; q < kTokens; ++q) {
        score_row({2, kDim, layer.scale, layer.softcap, keys[static_cast<size_t>(h)], all},
                  &rows.q[static_cast<size_t>((q * 4 + h * 2) * kDim)], q, row);
        needs.mass_from_window ? add_to_window(row, window) : add_mean_mass(row, mass[static_cast<size_t>(h)]);
      }
      if (needs.mass_from_window) max_of_window(window, mass[static_cast<size_t>(h)]);
    }
    feed(cache, id, rows, kTokens, 128);
    int decisions = 0;
    for (int i = 0; i < 400; ++i) {
      std::vector<std::vector<int64_t>> expected = cache.kept(id, 0), low = cache.low_tier(id, 0);
      low.resize(2);
      Rows one = random_rows(layer, 1, random);
      append(one, 1);
      const int64_t position = cache.length(id);
      step(cache, {{id, 1}}, one);
      for (int h = 0; h < 2; ++h) {
        expected[static_cast<size_t>(h)].push_back(position);
        count(h, &one.q[static_cast<size_t>(h * 2 * kDim)], position, expected[static_cast<size_t>(h)]);
      }
      const bool decides = (position + 2 - kTokens) % kPageTokens == 0;
      if (decides) {
        ++decisions;
        std::vector<std::vector<Tier>> tiers(2);
        std::vector<std::vector<float>> paid(2);
        std::vector<std::vector<int32_t>> counted(2);
        std::vector<HeadView> heads;
        for (size_t h = 0; h < 2; ++h) {
          for (const int64_t p : expected[h]) {
            tiers[h].push_back(std::binary_search(low[h].begin(), low[h].end(), p) ? Tier::kLow : Tier::kHigh);
            paid[h].push_back(mass[h][static_cast<size_t>(p)]);
            counted[h].push_back(static_cast<int32_t>(position + 1 - std::max<int64_t>(p, first_counted)));
          }
          heads.push_back({.positions = expected[h], .tiers = tiers[h], .mass = paid[h], .queries = counted[h], .window = {}});
        }
        PolicyView view;
        view.shape = {.kv_heads = 2, .heads_per_kv = 2, .head_dim = kDim};
        view.moment = Moment::kBeforeToken;
        view.length = position + 1;
        view.prompt_length = kTokens;
        view.incoming = 1;
        view.since = kPageTokens;
        view.heads = heads;
        PolicyScratch scratch;
        Decision decision;
        policy->decide(view, scratch, decision);
        EXPECT_FALSE(decision.empty()) << to_string(spec);
        for (size_t h = 0; h < 2; ++h) {
          for (const Move& move : decision.heads[h].move) low[h].push_back(expected[h][static_cast<size_t>(move.token)]);
          std::sort(low[h].begin(), low[h].end());
          for (auto drop = decision.heads[h].drop.rbegin(); drop != decision.heads[h].drop.rend(); ++drop) {
            std::erase(low[h], expected[h][static_cast<size_t>(*drop)]);
            expected[h].erase(expected[h].begin() + *drop);
          }
        }
      }
      ASSERT_EQ(cache.kept(id, 0), expected) << to_string(spec) << " at " << position;
      if (policy->has_low_tier()) {
        ASSERT_EQ(cache.low_tier(id, 0), low) << to_string(spec) << " at " << position;
      }
      if (decides) continue;  // the step saw more
      ASSERT_LT(error_over_kept(cache, id, one, 0), 0.01) << to_string(spec) << " at " << position;
    }
    EXPECT_EQ(decisions, 3);
  }
}

// A long generation stays at its bound, token by token, also under a limit that leaves little room beside it.
TEST_P(PolicyDecoding, EndlessGenerationsStayAtTheirBound) {
  for (const PolicySpec& spec : here_of({{"streaming", {{"tokens", 300.0}}}, {"h2o", {{"tokens", 300.0}}}})) {
    for (const CodecSpec& recent : kRecents) {
      std::mt19937 random(22);
      CacheConfig config = layers_of(spec, recent);
      config.layers.erase(config.layers.begin() + 1);
      const bool exact = spec.name == "streaming";
      constexpr size_t page_bytes = size_t{2} * kPageTokens * kPolicyDim * sizeof(uint16_t);
      // The bound: a page more than the budget, and where tokens go from anywhere, a page that they leave partly empty.
      size_t bound = 0;
      for (int64_t n = kPrompt; n < kPrompt + 3 * kPageTokens; ++n) bound = std::max(bound, predict_bytes(config, n, kPrompt));
      if (!exact) bound += 4 * page_bytes;
      Cache cache(config);
      const SequenceId id = cache.create();
      feed(cache, id, random_rows(config.layers[0], kPrompt, random), kPrompt, kPrompt);
      for (int i = 0; i < 1500; ++i) {
        Rows rows = random_rows(config.layers[0], 1, random);
        step(cache, {{id, 1}}, rows);
        ASSERT_LE(used_bytes(cache), bound) << to_string(spec) << " at " << cache.length(id);
        if (exact) {
          ASSERT_EQ(used_bytes(cache), predict_bytes(config, cache.length(id), kPrompt)) << cache.length(id);
        }
        for (const auto& head : all_positions(cache, id)) ASSERT_LE(head.size(), 300u + kPageTokens);
      }
      Rows rows = random_rows(config.layers[0], 1, random);
      step(cache, {{id, 1}}, rows);
      EXPECT_LT(error_over_kept(cache, id, rows, 1), 0.05) << to_string(spec);
    }
  }
}

// A step that attention has seen and that is then undone has paid nothing.
TEST_P(PolicyDecoding, AbortedStepsAreNotCounted) {
  for (const PolicySpec& spec : running()) {
    if (!make_policy(spec)->needs().every_step) continue;
    std::mt19937 random(23);
    CacheConfig config = layers_of(spec);
    config.layers.erase(config.layers.begin() + 1);
    Cache plain(config), shaken(config);
    const SequenceId a = plain.create(), b = shaken.create();
    const Rows prompt = random_rows(config.layers[0], kPrompt, random);
    feed(plain, a, prompt, kPrompt, 300);
    feed(shaken, b, prompt, kPrompt, 128);
    for (int i = 0; i < 300; ++i) {
      Rows rows = random_rows(config.layers[0], 1, random), again = rows;
      step(plain, {{a, 1}}, rows);
      if (i % 3 == 0) {
        Rows other = random_rows(config.layers[0], 1, random);
        const std::vector<StepItem> items = {{b, 1}};
        shaken.begin_step(items);
        for (int l = 0; l < 2; ++l) testing::run_layer(shaken, l, other, config.threads);
        shaken.abort_step();
      }
      step(shaken, {{b, 1}}, again);
      ASSERT_EQ(rows.out, again.out) << to_string(spec) << " " << i;
    }
    EXPECT_EQ(all_positions(plain, a), all_positions(shaken, b)) << to_string(spec);
    EXPECT_EQ(contents(plain, a), contents(shaken, b)) << to_string(spec);
  }
}

// A sequence that was saved, or forked, goes on as the first would have: the counts are part of it.
TEST_P(PolicyDecoding, CopiesGoOnAlike) {
  const std::string path = ::testing::TempDir() + "/kvmix_policy_copies_" + std::to_string(getpid());
  for (const PolicySpec& spec : running()) {
    if (!make_policy(spec)->needs().every_step) continue;
    std::mt19937 random(24);
    CacheConfig config = layers_of(spec);
    config.layers.erase(config.layers.begin() + 1);
    Cache cache(config), other(config);
    const SequenceId id = cache.create();
    feed(cache, id, random_rows(config.layers[0], kPrompt, random), kPrompt, kPrompt);
    const auto decode = [&](int n, const std::vector<std::pair<Cache*, SequenceId>>& all) {
      for (int i = 0; i < n; ++i) {
        const Rows rows = random_rows(config.layers[0], 1, random);
        std::vector<float> first;
        for (const auto& [to, sequence] : all) {
          Rows own = rows;
          step(*to, {{sequence, 1}}, own);
          if (first.empty()) first = own.out;
          ASSERT_EQ(own.out, first) << to_string(spec) << " " << i;
        }
      }
    };
    decode(200, {{&cache, id}});
    cache.save(id, path, "f");
    const SequenceId loaded = other.load(path, "f"), copy = cache.fork(id);
    ASSERT_NO_FATAL_FAILURE(decode(200, {{&cache, id}, {&other, loaded}, {&cache, copy}}));
    EXPECT_EQ(all_positions(other, loaded), all_positions(cache, id));
    EXPECT_EQ(contents(cache, copy), contents(cache, id));
    EXPECT_EQ(used_bytes(other), [&] {
      cache.remove(copy);
      return used_bytes(cache);
    }());
  }
  std::filesystem::remove(path);
}

// Up to next_seal decoded tokens may come together.
TEST_P(PolicyDecoding, ChunksOfDecodedTokensAreSingleOnes) {
  for (const PolicySpec& spec : running()) {
    if (!make_policy(spec)->needs().every_step) continue;
    std::mt19937 random(25);
    CacheConfig config = layers_of(spec);
    config.layers.erase(config.layers.begin() + 1);
    Cache cache(config), other(config);
    const SequenceId one = cache.create(), many = other.create();
    const Rows prompt = random_rows(config.layers[0], kPrompt, random), rows = random_rows(config.layers[0], 400, random);
    feed(cache, one, prompt, kPrompt, kPrompt);
    feed(other, many, prompt, kPrompt, kPrompt);
    for (int i = 0; i < 400; ++i) {
      Rows row = part(rows, config.layers[0], i, 1);
      step(cache, {{one, 1}}, row);
    }
    for (int done = 0; done < 400;) {
      const auto n = static_cast<int>(std::min<int64_t>(400 - done, other.next_seal(many) - other.length(many)));
      ASSERT_GT(n, 0);
      Rows some = part(rows, config.layers[0], done, n);
      step(other, {{.sequence = many, .n_tokens = n, .decoded = true}}, some);
      done += n;
    }
    EXPECT_EQ(all_positions(cache, one), all_positions(other, many)) << to_string(spec);
    EXPECT_EQ(contents(cache, one), contents(other, many)) << to_string(spec);
  }
}

// Under a limit a generation is refused before a step, or goes on; a refused one has lost nothing.
TEST_P(PolicyDecoding, OutOfMemoryComesBeforeAStep) {
  for (const PolicySpec& spec :
       here_of({{"streaming", {{"tokens", 300.0}}}, {"h2o", {{"tokens", 300.0}}}, {"leankv", {{"low", 0.7}}}})) {
    int refused = 0, taken = 0;
    // Beyond limits that nothing met every larger one gives the same.
    const size_t unit = on_cpu() ? 1 : kDeviceChunks;
    for (size_t limit = unit * 300 << 10; limit < unit * 3 << 20 && taken < 3; limit += unit * 200 << 10) {
      std::mt19937 random(26);
      CacheConfig config = layers_of(spec);
      config.layers.erase(config.layers.begin() + 1);
      config.max_bytes = limit;
      Cache cache(config);
      const SequenceId id = cache.create();
      try {
        feed(cache, id, random_rows(config.layers[0], kPrompt, random), kPrompt, 300);
        for (int i = 0; i < 300; ++i) {
          Rows rows = random_rows(config.layers[0], 1, random);
          step(cache, {{id, 1}}, rows);
        }
        ++taken;
      } catch (const Error& e) {
        ASSERT_EQ(e.status(), Status::kOutOfMemory) << e.what();
        ++refused;
      }
      for (const auto& head : all_positions(cache, id)) {
        EXPECT_EQ(head.empty() ? 0 : head.back() + 1, cache.length(id));
        EXPECT_TRUE(std::adjacent_find(head.begin(), head.end(), std::greater_equal<>()) == head.end());
      }
      const auto rows_before = contents(cache, id);
      EXPECT_EQ(contents(cache, cache.fork(id)), rows_before);
    }
    EXPECT_GT(taken, 0) << to_string(spec);
    EXPECT_GT(refused, 0) << to_string(spec);
  }
}

TEST(PolicyDecodingOnCpu, ManyDecodedTokensAreRefusedWhereEachIsCounted) {
  std::mt19937 random(27);
  Cache cache(two_layers({"h2o", {}}));
  const SequenceId id = cache.create();
  feed(cache, id, random_rows(cache.config().layers[0], kPrompt, random), kPrompt, kPrompt);
  const auto rows_before = contents(cache, id);
  const std::vector<StepItem> items = {{.sequence = id, .n_tokens = 9, .decoded = true}};
  try {
    cache.begin_step(items);
    FAIL() << "was accepted";
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("at most 8"), std::string::npos) << e.what();
  }
  EXPECT_EQ(contents(cache, id), rows_before);
}

}  // namespace
}  // namespace kvmix
