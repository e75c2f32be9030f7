// KVCrush on the published vectors of its two fingerprints.
#include "policy/kvcrush.h"

#include "policy/layer_state.h"

namespace kvmix {
namespace {

using Values = std::map<std::string, PolicyValue>;
using Positions = std::vector<int64_t>;
using Bits = std::vector<uint8_t>;

Bits bits(const std::string& text) {
  Bits out;
  for (const char c : text) {
    if (c != ' ') out.push_back(c == '1');
  }
  return out;
}

double vector_score(int h, int i) { return (5 * h + (2 * h + 3) * i + (h + 1) * i * i) % 17 + i / 100.0; }

// 16 tokens that compete, and a window of one behind them (a policy always keeps the newest).
LayerState vector_a() {
  LayerState state(17, 4);
  for (int h = 0; h < 4; ++h) {
    for (int i = 0; i < 16; ++i) state.heads[h].window[i] = static_cast<float>(vector_score(h, i));
  }
  return state;
}

Positions kept_of_a(const Values& more, int head) {
  Values values = more;
  values.merge(Values{{"tokens", 9.0}, {"sinks", 0.0}, {"window", 1.0}, {"queries", 1.0}, {"page", 1.0}, {"share", 0.5}});
  LayerState state = vector_a();
  state.run(*make_policy({"kvcrush", values}));
  Positions kept = state.kept(head);
  EXPECT_EQ(kept.back(), 16);
  kept.pop_back();
  return kept;
}

const std::string kFingerprints = "0011 0101 1101 0001 1101 1100 0010 0000 0000 1111 1001 0110 1110 1010 0110 1011";

TEST(KvCrush, FingerprintsOfHeads) {
  Bits all(64);
  for (size_t h = 0; h < 4; ++h) {
    std::vector<double> score;
    for (int i = 0; i < 16; ++i) score.push_back(vector_score(static_cast<int>(h), i));
    const Bits upper = top_half(score);
    for (size_t i = 0; i < 16; ++i) all[4 * i + h] = upper[i];
  }
  EXPECT_EQ(all, bits(kFingerprints));
  const Bits anchor = anchor_bits(CrushAnchor::kMean, all, 4);
  EXPECT_EQ(anchor, bits("0000"));
  EXPECT_EQ(anchor_distances(all, anchor), (std::vector<int>{2, 2, 3, 1, 3, 2, 1, 0, 0, 4, 2, 2, 3, 2, 2, 3}));
}

TEST(KvCrush, RepresentativesOfSharedPages) {
  const std::vector<int> distances = {2, 2, 3, 1, 3, 2, 1, 0, 0, 4, 2, 2, 3, 2, 2, 3};
  Bits taken(16, 0);
  for (const int p : {2, 9, 12, 15}) taken[p] = 1;
  const std::vector<size_t> sorted = by_distance(distances, taken);
  EXPECT_EQ(sorted, (std::vector<size_t>{7, 8, 3, 6, 0, 1, 5, 10, 11, 13, 14, 4}));
  EXPECT_EQ(spread(sorted, 4), (std::vector<size_t>{7, 6, 10, 4}));
  EXPECT_EQ(spread(sorted, 1), (std::vector<size_t>{7}));
  EXPECT_EQ(spread(sorted, 99), sorted);
}

TEST(KvCrush, SharedPages) {
  for (int h = 0; h < 4; ++h) {
    EXPECT_EQ(kept_of_a({{"layout", "shared"}, {"anchor", "mean"}}, h), (Positions{2, 4, 6, 7, 9, 10, 12, 15}));
    EXPECT_EQ(kept_of_a({{"layout", "shared"}, {"anchor", "alternate"}}, h), (Positions{0, 1, 2, 9, 10, 12, 13, 15}));
    EXPECT_EQ(kept_of_a({{"layout", "shared"}, {"share", 0.0}}, h), (Positions{0, 1, 2, 4, 9, 12, 14, 15}));
  }
}

TEST(KvCrush, PagesOfEachHead) {
  const Positions important[] = {{4, 10, 12, 15}, {1, 5, 11, 12}, {9, 12, 13, 14}, {0, 2, 4, 15}};
  for (int h = 0; h < 4; ++h) {
    Positions expected = join(important[h], {3, 6, 7, 8});
    std::sort(expected.begin(), expected.end());
    EXPECT_EQ(kept_of_a({{"anchor", "mean"}}, h), expected) << h;
  }
}

TEST(KvCrush, OnlyRanksMatterToFingerprints) {
  std::vector<double> score, scaled;
  for (int i = 0; i < 16; ++i) score.push_back(vector_score(2, i)), scaled.push_back(1e-3 * score.back());
  EXPECT_EQ(top_half(score), top_half(scaled));
}

TEST(KvCrush, HeadsInAnotherOrderAreAsFarFromTheMean) {
  const Bits all = bits(kFingerprints);
  Bits turned(all.size());
  for (size_t i = 0; i < all.size(); ++i) turned[i] = all[i / 4 * 4 + (i + 1) % 4];
  EXPECT_EQ(anchor_distances(all, anchor_bits(CrushAnchor::kMean, all, 4)),
            anchor_distances(turned, anchor_bits(CrushAnchor::kMean, turned, 4)));
}

TEST(KvCrush, WithoutAShareItIsItsHost) {
  LayerState crush(300, 2, 2), host(300, 2, 2);
  Lcg random(8);
  for (int h = 0; h < 2; ++h) {
    for (size_t i = 0; i < 600; ++i) crush.heads[h].window[i] = host.heads[h].window[i] = static_cast<float>(random.uniform());
  }
  crush.run(*make_policy(
      {"kvcrush", {{"tokens", 60.0}, {"sinks", 4.0}, {"window", 16.0}, {"queries", 16.0}, {"page", 1.0}, {"share", 0.0}}}));
  host.run(*make_policy({"snapkv", {{"tokens", 60.0}, {"sinks", 4.0}, {"window", 16.0}, {"pooling", "none"}}}));
  for (int h = 0; h < 2; ++h) EXPECT_EQ(crush.kept(h), host.kept(h));
}

// Whole pages behind the sinks, the last one shorter where the prompt says so; the budget is exact where pages are whole.
TEST(KvCrush, PagesStayWhole) {
  for (const int n : {520, 528, 536}) {
    LayerState state(n, 3);
    Lcg random(static_cast<uint32_t>(n));
    for (LayerState::Head& head : state.heads) {
      for (float& s : head.window) s = static_cast<float>(random.uniform());
    }
    state.run(*make_policy({"kvcrush", {{"tokens", 288.0}}}));
    for (int h = 0; h < 3; ++h) {
      const Positions kept = state.kept(h);
      const int64_t middle = n - 32 - 128;
      std::map<int64_t, int> tokens;
      for (const int64_t p : kept) {
        if (p >= 32 && p < n - 128) ++tokens[(p - 32) / 16];
      }
      for (const auto& [page, count] : tokens) EXPECT_EQ(count, std::min<int64_t>(16, middle - 16 * page));
      EXPECT_EQ(tokens.size(), 8u);
      EXPECT_LE(kept.size(), 288u);
      EXPECT_GT(kept.size(), 288u - 16);
      if (n == 528) {
        EXPECT_EQ(kept.size(), 288u);
      }
    }
  }
}

TEST(KvCrushPattern, Vector) {
  std::vector<double> score;
  for (int i = 0; i < 24; ++i) score.push_back((7 * i + 3) % 24);
  const Bits upper = top_half(score);
  EXPECT_EQ(upper, bits("0010 0110 0100 1101 1001 1011"));
  const auto distances = [&](CrushAnchor anchor) { return anchor_distances(upper, anchor_bits(anchor, upper, 4)); };
  EXPECT_EQ(anchor_bits(CrushAnchor::kMean, upper, 4), bits("0000"));
  EXPECT_EQ(distances(CrushAnchor::kMean), (std::vector<int>{1, 2, 1, 3, 2, 3}));
  EXPECT_EQ(distances(CrushAnchor::kZeros), (std::vector<int>{1, 2, 1, 3, 2, 3}));
  EXPECT_EQ(distances(CrushAnchor::kOnes), (std::vector<int>{3, 2, 3, 1, 2, 1}));
  EXPECT_EQ(distances(CrushAnchor::kAlternate), (std::vector<int>{3, 2, 1, 1, 2, 3}));

  // 24 tokens in pages of 4 and a window of one; the host keeps pages 3 and 5, two others are representatives.
  const std::pair<const char*, Positions> cases[] = {
      {"alternate", {2, 3, 4, 5}}, {"zeros", {0, 1, 3, 5}}, {"ones", {0, 1, 3, 5}}, {"mean", {0, 1, 3, 5}}};
  for (const auto& [anchor, pages] : cases) {
    LayerState state(25, 2);
    for (int i = 0; i < 24; ++i) {
      state.heads[i / 3 % 2].window[i] = static_cast<float>(score[i]);  // the layer's sum counts
    }
    state.run(*make_policy({"kvcrush",
                            {{"tokens", 17.0},
                             {"sinks", 0.0},
                             {"window", 1.0},
                             {"queries", 1.0},
                             {"page", 4.0},
                             {"share", 0.5},
                             {"ahead", 1.0},
                             {"fingerprint", "pattern"},
                             {"anchor", anchor}}}));
    Positions expected;
    for (const int64_t p : pages) expected = join(expected, range(4 * p, 4 * p + 4));
    expected.push_back(24);
    EXPECT_EQ(state.kept(0), expected) << anchor;
    EXPECT_EQ(state.kept(1), expected) << anchor;
  }
}

// A score reaches back over the tokens before it, from the window too.
TEST(KvCrushPattern, LooksAhead) {
  const auto kept = [](double ahead) {
    LayerState state(41, 1);
    state.heads[0].window[21] = 1;
    state.heads[0].window[40] = 9;
    state.run(*make_policy({"kvcrush",
                            {{"tokens", 9.0},
                             {"sinks", 0.0},
                             {"window", 1.0},
                             {"queries", 1.0},
                             {"page", 4.0},
                             {"share", 0.0},
                             {"ahead", ahead},
                             {"fingerprint", "pattern"}}}));
    return state.kept(0);
  };
  EXPECT_EQ(kept(1), join(range(20, 24), range(36, 41)));
  EXPECT_EQ(kept(5), join(range(16, 20), range(36, 41)));
}

TEST(KvCrushPattern, PublishedDistances) {
  EXPECT_EQ(anchor_distances(bits("1010 0101 1100"), bits("1010")), (std::vector<int>{0, 4, 2}));
}

TEST(KvCrushPattern, StridesMayNotReachTheEnd) {
  const std::vector<size_t> sorted = {10, 11, 12, 13, 14, 15, 16};
  EXPECT_EQ(strided(sorted, 3), (std::vector<size_t>{10, 12, 14}));
  EXPECT_EQ(strided(sorted, 9), sorted);
}

}  // namespace
}  // namespace kvmix
