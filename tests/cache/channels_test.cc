// Caches whose sequences choose channels of their keys, on every device.
#include <unistd.h>

#include <filesystem>
#include <numeric>

#include "backend/cuda/layer_format.h"
#include "base/fp16.h"
#include "rows/row_map.h"
#include "support/policy_fixture.h"

namespace kvmix {
namespace {

using testing::contents;
using testing::error_over_kept;
using testing::feed;
using testing::key_codec;
using testing::kRecents;
using testing::make_layer;
using testing::oracle;
using testing::part;
using testing::random_rows;
using testing::Rows;
using testing::running_policies;
using testing::step;
using testing::stored_rows;
using testing::two_layers;
using testing::used_bytes;
using testing::value_codec;

PolicySpec think(double keep = 0.5) { return {"think", {{"keep", keep}}}; }

// Two governed layers and one that slides; head_dim 64. The last, whose output `step` leaves, is packed or of 16 bits.
CacheConfig three_layers(const PolicySpec& channels, const CodecSpec& recent = {}, bool packed = false) {
  CacheConfig config;
  LayerConfig sliding = make_layer(4, 2, 64, key_codec(4), value_codec(3));
  sliding.sliding_window = 200;
  config.layers = {
      testing::with_recent(make_layer(4, 2, 64, key_codec(4), value_codec(3), 16, 64), recent),
      testing::with_recent(sliding, recent),
      testing::with_recent(
          make_layer(4, 2, 64, packed ? key_codec(3) : CodecSpec{}, packed ? value_codec(4) : CodecSpec{}, 0, 64), recent)};
  config.threads = 2;
  config.channels = channels;
  return config;
}

class Channels : public testing::OnDevice {};
INSTANTIATE_TEST_SUITE_P(Devices, Channels, ::testing::ValuesIn(testing::kDevices), testing::device_name);

void decode(Cache& cache, SequenceId id, const Rows& rows, int first, int n, Rows* last = nullptr) {
  for (int t = first; t < first + n; ++t) {
    Rows row = part(rows, cache.config().layers[0], t, 1);
    step(cache, {{id, 1}}, row);
    if (last != nullptr) *last = row;
  }
}

TEST_P(Channels, AllOfThemIsTheDenseCacheToTheBit) {
  std::mt19937 random(1);
  CacheConfig dense = here(three_layers(think(1)));
  Cache cache(dense);
  dense.channels.reset();
  Cache other(dense);
  const Rows rows = random_rows(dense.layers[0], 700, random);
  const SequenceId a = cache.create(), b = other.create();
  EXPECT_EQ(feed(cache, a, rows, 500, 500).out, feed(other, b, rows, 500, 500).out);
  Rows x, y;
  decode(cache, a, rows, 500, 150, &x);
  decode(other, b, rows, 500, 150, &y);
  EXPECT_EQ(x.out, y.out);
  EXPECT_EQ(contents(cache, a), contents(other, b));
  EXPECT_TRUE(cache.channels(a, 0)[0].empty());
}

// Bytes by the allocator are the formula's at every length, and are fewer.
TEST_P(Channels, BytesFall) {
  for (const CodecSpec& recent : kRecents) {
    std::mt19937 random(2);
    const CacheConfig config = here(three_layers(think(0.5), recent));
    CacheConfig dense = config;
    dense.channels.reset();
    for (const int prompt : {70, 85, 300, 700}) {
      Cache cache(config);
      const SequenceId id = cache.create();
      const Rows rows = random_rows(config.layers[0], prompt + 300, random);
      feed(cache, id, rows, prompt, 128);
      // Layer 2 has no sinks: 70 tokens are more than it keeps as they are, but fewer than the others do.
      EXPECT_EQ(cache.channels(id, 0)[0].size(), prompt > 80 ? 32u : 0u);
      EXPECT_EQ(cache.channels(id, 2)[1].size(), 32u);
      EXPECT_TRUE(cache.channels(id, 1)[0].empty());
      for (int t = prompt; t < prompt + 300; ++t) {
        decode(cache, id, rows, t, 1);
        ASSERT_EQ(used_bytes(cache), predict_bytes(config, t + 1, prompt)) << prompt << " " << t + 1;
        const size_t slack = cache.memory().slack_bytes;
        ASSERT_LE(slack, predict_slack_bytes(config, t + 1)) << prompt << " " << t + 1;
      }
      EXPECT_LT(used_bytes(cache), predict_bytes(dense, prompt + 300, prompt));
    }
    // Key pages of old tokens: 128 x 32 numbers of 4 bits and 32 scales and midpoints.
    const auto pages = [&](const CacheConfig& c) {
      return predict_bytes(c, 16 + 64 + 129 + 1280) - predict_bytes(c, 16 + 64 + 129);
    };
    CacheConfig one = config, full = dense;
    for (CacheConfig* c : {&one, &full}) c->layers = {c->layers[0]};
    EXPECT_EQ(pages(full) - pages(one), 10u * 2 * (128 * 32 * 4 / 8 + 32 * 2 * 2));
  }
}

// Query heads share their KV head's pages.
TEST_P(Channels, MoreQueryHeadsTakeNoMoreBytes) {
  size_t bytes = 0;
  for (const int q_heads : {2, 8}) {
    std::mt19937 random(3);
    CacheConfig config = here(testing::one_layer(make_layer(q_heads, 2, 64, key_codec(2), value_codec(2), 0, 0)));
    config.channels = think();
    Cache cache(config);
    const SequenceId id = cache.create();
    const Rows rows = random_rows(config.layers[0], 600, random);
    feed(cache, id, rows, 513, 513);
    decode(cache, id, rows, 513, 1);
    if (bytes != 0) {
      EXPECT_EQ(cache.memory().sealed_bytes, bytes);
    }
    bytes = cache.memory().sealed_bytes;
    const size_t page = on_cpu() ? tile_bytes(key_codec(2), 32) + tile_bytes(value_codec(2), 64)
                                 : cuda::record_bytes(cuda::thin_shape(config.layers[0], 32, "a layer"));
    EXPECT_EQ(bytes, 2u * 4 * page);
  }
}

// Logits of old tokens are those of all channels less what the others add; newer ones are whole. Rows of 16 bits.
TEST_P(Channels, AttentionIsThatOfTheChosenChannels) {
  std::mt19937 random(4);
  for (const char* kernel : {"portable", ""}) {
    if (!on_cpu() && *kernel != '\0') continue;
    CacheConfig config = here(testing::one_layer(make_layer(4, 2, 64, CodecSpec{}, CodecSpec{}, 16, 64)));
    config.channels = think(0.75);
    config.kernel = kernel;
    Cache cache(config);
    const SequenceId id = cache.create();
    Rows rows = random_rows(config.layers[0], 500, random);
    testing::round_queries(rows);
    feed(cache, id, rows, 450, 450);
    Rows last;
    decode(cache, id, rows, 450, 50, &last);
    const int sealed = 16 + 3 * kPageTokens;
    ASSERT_EQ(cache.tail(id, 0).sealed, 3 * kPageTokens);
    for (int h = 0; h < 4; ++h) {
      std::vector<float> keys, values;
      const std::vector<int> kept = cache.channels(id, 0)[static_cast<size_t>(h / 2)];
      ASSERT_EQ(kept.size(), 48u);
      for (int t = 0; t < 500; ++t) {
        for (int c = 0; c < 64; ++c) {
          const auto at = static_cast<size_t>((t * 2 + h / 2) * 64 + c);
          const bool stored = t < 16 || t >= sealed || std::binary_search(kept.begin(), kept.end(), c);
          keys.push_back(stored ? f16_to_f32(f32_to_f16(rows.k[at])) : 0.0f);
          values.push_back(f16_to_f32(f32_to_f16(rows.v[at])));
        }
      }
      const auto exact = oracle(config.layers[0], &last.q[static_cast<size_t>(h * 64)], keys, values, 499);
      for (size_t c = 0; c < 64; ++c) ASSERT_NEAR(last.out[static_cast<size_t>(h) * 64 + c], exact[c], 1e-3) << kernel;
    }
  }
}

// What attention computes is attention over what the cache says that it holds, in every width, and after pages are reopened.
TEST_P(Channels, AttentionIsOverWhatIsStored) {
  for (const bool packed : {false, true}) {
    for (const CodecSpec& recent : kRecents) {
      std::mt19937 random(5);
      CacheConfig config = here(three_layers(think(), recent, packed));
      config.layers[1].sliding_window = 4096;  // frees nothing that the cut needs
      config.layers[2].key.transform.hadamard = true;
      config.exact = true;
      Cache cache(config);
      const SequenceId id = cache.create();
      const Rows rows = random_rows(config.layers[0], 900, random);
      // Keys are read back as they are stored, so queries are turned into that basis for the oracle.
      const auto error = [&](Rows last) {
        const RowMapChain maps(config.layers[2].key.transform, row_shape(config.layers[2], Side::kKey), "keys");
        for (size_t h = 0; h < 4; ++h) maps.query(static_cast<int>(h / 2), &last.q[last.q.size() - (4 - h) * 64]);
        return error_over_kept(cache, id, last, 2);
      };
      feed(cache, id, rows, 600, 128);
      Rows last;
      decode(cache, id, rows, 600, 1, &last);
      EXPECT_LT(error(last), 1e-2) << packed;
      cache.truncate(id, 300);
      decode(cache, id, rows, 300, 200, &last);
      EXPECT_LT(error(last), 1e-2) << packed;
      Rows more = part(rows, config.layers[0], 500, 300);  // a second prompt keeps the choice
      const auto chosen = cache.channels(id, 0);
      step(cache, {{id, 300}}, more);
      EXPECT_EQ(cache.channels(id, 0), chosen);
      decode(cache, id, rows, 800, 20, &last);
      EXPECT_LT(error(last), 1e-2) << packed;
      cache.truncate(id, 0);
      EXPECT_TRUE(cache.channels(id, 0)[0].empty());
      EXPECT_EQ(used_bytes(cache), cache.memory().table_bytes);
    }
  }
}

TEST_P(Channels, ChunksOfAPromptChangeNothing) {
  std::mt19937 random(6);
  const CacheConfig config = here(three_layers(think(), kRecents.back()));
  const Rows rows = random_rows(config.layers[0], 800, random);
  std::vector<float> expected;
  for (const int chunk : {700, 128, 31}) {
    Cache cache(config);
    const SequenceId id = cache.create();
    feed(cache, id, rows, 700, chunk);
    decode(cache, id, rows, 700, 100);
    if (expected.empty()) expected = contents(cache, id);
    EXPECT_EQ(contents(cache, id), expected) << chunk;
  }
}

// Scaling a channel of keys against queries, and queries before the window, change no choice.
TEST_P(Channels, TheChoiceIsInvariant) {
  std::mt19937 random(7);
  const CacheConfig config = here(testing::one_layer(make_layer(4, 2, 64, key_codec(4), value_codec(3), 16, 64)));
  CacheConfig thin = config;
  thin.channels = think();
  const Rows rows = random_rows(config.layers[0], 300, random);
  const auto chosen = [&](const Rows& given) {
    Cache cache(thin);
    const SequenceId id = cache.create();
    Rows copy = given;
    step(cache, {{id, 300}}, copy);
    return cache.channels(id, 0);
  };
  const auto expected = chosen(rows);
  ASSERT_EQ(expected[0].size(), 32u);
  EXPECT_NE(expected[0], expected[1]);
  for (const float factor : {0.0078125f, 128.0f}) {  // which fp16 multiplies by exactly
    for (const size_t channel : {3u, 4u, 60u}) {
      Rows scaled = rows;
      for (size_t i = channel; i < scaled.k.size(); i += 64) scaled.k[i] *= factor;
      for (size_t i = channel; i < scaled.q.size(); i += 64) scaled.q[i] /= factor;
      EXPECT_EQ(chosen(scaled), expected) << channel << " by " << factor;
    }
  }
  Rows other = rows;
  const ptrdiff_t row = 4 * 64;
  for (auto x = other.q.begin(); x != other.q.end() - 32 * row; ++x) *x = -3 * *x + 1;
  EXPECT_EQ(chosen(other), expected);
  for (auto x = other.q.end() - row; x != other.q.end(); ++x) *x *= (x - other.q.begin()) % 64 < 32 ? 100.0f : 0.0f;
  EXPECT_NE(chosen(other), expected);
}

TEST_P(Channels, ForksShareTheChoiceAndThePages) {
  std::mt19937 random(8);
  CacheConfig config = here(three_layers(think(), {}, true));
  config.exact = true;
  Cache cache(config);
  const Rows rows = random_rows(config.layers[0], 900, random);
  const SequenceId id = cache.create();
  feed(cache, id, rows, 500, 500);
  decode(cache, id, rows, 500, 1);
  const size_t sealed = cache.memory().sealed_bytes;
  const SequenceId copy = cache.fork(id);
  EXPECT_EQ(cache.channels(copy, 0), cache.channels(id, 0));
  EXPECT_EQ(cache.memory().sealed_bytes, sealed);
  Rows x, y;
  decode(cache, id, rows, 501, 200, &x);
  decode(cache, copy, rows, 501, 200, &y);
  EXPECT_EQ(x.out, y.out);
  cache.remove(id);
  decode(cache, copy, rows, 701, 1, &x);
  EXPECT_LT(error_over_kept(cache, copy, x, 2), 1e-2);
}

// Sequences that part before channels were chosen choose for themselves; what they share is whole.
TEST_P(Channels, ForksOfAPromptChooseForThemselves) {
  std::mt19937 random(9);
  CacheConfig config = here(three_layers(think(), {}, true));
  config.exact = true;
  Cache cache(config);
  const Rows rows = random_rows(config.layers[0], 900, random);
  const SequenceId id = cache.create();
  Rows head = part(rows, config.layers[0], 0, 300);
  step(cache, {{id, 300, true}}, head);
  const SequenceId copy = cache.fork(id);
  Rows one = part(rows, config.layers[0], 300, 100), two = part(rows, config.layers[0], 500, 100);
  for (size_t i = 0; i < two.q.size(); ++i) two.q[i] *= i % 64 < 32 ? 10.0f : 1.0f;
  step(cache, {{id, 100}}, one);
  step(cache, {{copy, 100}}, two);
  EXPECT_NE(cache.channels(copy, 0), cache.channels(id, 0));
  Rows x, y;
  decode(cache, id, rows, 700, 130, &x);
  decode(cache, copy, rows, 700, 130, &y);
  EXPECT_LT(error_over_kept(cache, id, x, 2), 1e-2);
  EXPECT_LT(error_over_kept(cache, copy, y, 2), 1e-2);
}

// Without a prompt there is nothing to choose by: pages keep all channels, until one ends.
TEST_P(Channels, SequencesWithoutAPromptKeepAll) {
  std::mt19937 random(10);
  CacheConfig config = here(three_layers(think(), {}, true));
  config.exact = true;
  CacheConfig dense = config;
  dense.channels.reset();
  Cache cache(config), other(dense);
  const Rows rows = random_rows(config.layers[0], 700, random);
  const SequenceId id = cache.create(), same = other.create();
  decode(cache, id, rows, 0, 300);
  decode(other, same, rows, 0, 300);
  EXPECT_EQ(contents(cache, id), contents(other, same));
  Rows prompt = part(rows, config.layers[0], 300, 200), last;
  step(cache, {{id, 200}}, prompt);
  EXPECT_EQ(cache.channels(id, 0)[1].size(), 32u);
  decode(cache, id, rows, 500, 100, &last);  // pages of both kinds
  EXPECT_LT(error_over_kept(cache, id, last, 2), 1e-2);
}

TEST_P(Channels, SavedAndLoaded) {
  std::mt19937 random(11);
  const auto path = (std::filesystem::temp_directory_path() / ("kvmix_channels_" + std::to_string(getpid()))).string();
  for (const bool tokens : {false, true}) {
    CacheConfig config = here(three_layers(think(), kRecents.back()));
    if (tokens) config.tokens = PolicySpec{on_cpu() ? "h2o" : "snapkv", {{"keep", 0.5}}};
    Cache cache(config);
    const Rows rows = random_rows(config.layers[0], 900, random);
    const SequenceId id = cache.create();
    feed(cache, id, rows, 600, 600);
    decode(cache, id, rows, 600, 60);
    cache.save(id, path, "model");
    Cache fresh(config);
    const SequenceId loaded = fresh.load(path, "model");
    EXPECT_EQ(fresh.channels(loaded, 0), cache.channels(id, 0));
    EXPECT_EQ(contents(fresh, loaded), contents(cache, id));
    EXPECT_EQ(used_bytes(fresh), used_bytes(cache));
    Rows x, y;
    decode(cache, id, rows, 660, 200, &x);
    decode(fresh, loaded, rows, 660, 200, &y);
    EXPECT_EQ(x.out, y.out);
    config.channels.reset();
    Cache dense(config);
    try {
      dense.load(path, "model");
      ADD_FAILURE() << "loaded without the channels";
    } catch (const Error& e) {
      EXPECT_EQ(std::string(e.what()), path + " was saved with a channel policy; use the plan it was saved with");
    }
  }
  std::filesystem::remove(path);
}

// Every token policy that has no tier of its own: what stays is what attention sees, and bytes are the formula's.
TEST_P(Channels, ComposeWithTokenPolicies) {
  int run = 0;
  for (const PolicySpec& spec : running_policies(testing::kThreadsWatched, GetParam())) {
    CacheConfig config = here(three_layers(think(), {}, true));
    config.tokens = spec;
    config.exact = true;
    std::mt19937 random(12);
    const Rows rows = random_rows(config.layers[0], 1300, random);
    std::unique_ptr<Cache> made;
    try {
      made = std::make_unique<Cache>(config);
    } catch (const Error& e) {
      EXPECT_EQ(std::string(e.what()), "channel policy think: token policy " + spec.name +
                                           " has a tier of its own, whose keys keep all channels; leave one of both out");
      continue;
    }
    ++run;
    Cache& cache = *made;
    const SequenceId id = cache.create();
    feed(cache, id, rows, 900, 300);
    Rows last;
    decode(cache, id, rows, 900, 200, &last);
    EXPECT_LT(error_over_kept(cache, id, last, 2), 1e-2) << to_string(spec);
    EXPECT_EQ(cache.channels(id, 0)[0].size(), 32u);
    // The same tokens go, as the choice of channels comes after theirs, unless bytes decide how many.
    CacheConfig dense = config;
    dense.channels.reset();
    Cache whole(dense), again(config);
    const SequenceId same = whole.create(), prompt = again.create();
    feed(whole, same, rows, 900, 300);
    feed(again, prompt, rows, 900, 300);
    if (spec.name == "quantized-pruning") {
      EXPECT_GT(again.kept(prompt, 0)[0].size(), whole.kept(same, 0)[0].size());
      continue;
    }
    EXPECT_EQ(testing::all_positions(again, prompt), testing::all_positions(whole, same)) << to_string(spec);
    decode(whole, same, rows, 900, 1);
    decode(again, prompt, rows, 900, 1);
    EXPECT_LT(used_bytes(again), used_bytes(whole)) << to_string(spec);
  }
  EXPECT_GE(run, testing::kThreadsWatched || !on_cpu() ? 5 : 8);
}

TEST(ChannelErrors, RefusedByName) {
  const auto message = [](const CacheConfig& config) -> std::string {
    try {
      Cache cache(config);
    } catch (const Error& e) {
      return e.what();
    }
    return "accepted";
  };
  CacheConfig config = three_layers(think());
  config.layers[0].key.transform.feedback.assign(2 * 64 * 63 / 2, 0.0f);
  EXPECT_EQ(message(config),
            "channel policy think: keys of layer 0 are rounded with \"feedback\", whose weights are for all "
            "channels together; make the plan without feedback");
  config = three_layers(think());
  config.layers = {config.layers[1]};
  EXPECT_EQ(message(config),
            "channel policy think: every layer has a sliding window, whose keys keep all channels; leave the policy out");
  config = three_layers(think());
  config.device = "cuda";
  config.layers[2].key.codec = {4, Axis::kToken, 64, Fit::kMinMax, true};
  EXPECT_EQ(
      message(config),
      "channel policy think: layer 2 keys: channels of int4.token.g64.minmax.zero share scales, so that on the device \"cuda\" "
      "none can be left out; take scales per channel, leave \"channels\" out, or take the device \"cpu\"");
}

}  // namespace
}  // namespace kvmix
