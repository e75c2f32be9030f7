// ThinK: the choice on a small vector, with what wrong readings of the paper would choose.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <numeric>

#include "kvmix/error.h"
#include "policy/channels.h"

namespace kvmix {
namespace {

constexpr int kHeads = 4, kKvHeads = 2, kWidth = 8, kTokens = 6, kWindow = 2;

float query(int h, int t, int d) { return static_cast<float>((7 * h + 5 * t + 3 * d * d + d) % 11 - 5); }
float key(int g, int s, int d) { return static_cast<float>((5 * g + 3 * s + 7 * d + s * d) % 13 - 6); }

// Means over the prompt's queries [from, kTokens), and over all keys.
std::vector<float> query_squares(int first_head, int heads, int from) {
  std::vector<float> squares;
  for (int h = first_head; h < first_head + heads; ++h) {
    for (int d = 0; d < kWidth; ++d) {
      float sum = 0;
      for (int t = from; t < kTokens; ++t) sum += query(h, t, d) * query(h, t, d);
      squares.push_back(sum / static_cast<float>(kTokens - from));
    }
  }
  return squares;
}
std::vector<float> key_squares(int g) {
  std::vector<float> squares;
  for (int d = 0; d < kWidth; ++d) {
    float sum = 0;
    for (int s = 0; s < kTokens; ++s) sum += key(g, s, d) * key(g, s, d);
    squares.push_back(sum / kTokens);
  }
  return squares;
}

// What goes.
std::vector<int> pruned(double keep, int heads, std::vector<float> queries, std::vector<float> keys) {
  const auto policy = make_channel_policy({"think", {{"keep", keep}}});
  std::vector<uint8_t> kept(static_cast<size_t>(policy->kept(kWidth)));
  policy->choose({heads, queries, keys}, kept);
  EXPECT_TRUE(std::is_sorted(kept.begin(), kept.end()));
  std::vector<int> gone;
  for (int d = 0; d < kWidth; ++d) {
    if (std::find(kept.begin(), kept.end(), d) == kept.end()) gone.push_back(d);
  }
  return gone;
}

using Gone = std::vector<int>;

TEST(Think, Scores) {
  const std::vector<float> expected[] = {{1192.5, 684.75, 866.25, 994.5, 770.25, 717.5, 808.5, 843.75},
                                         {525, 913.5, 787.5, 1147.5, 720, 955.5, 829.5, 927.5}};
  for (int g = 0; g < kKvHeads; ++g) {
    const std::vector<float> q = query_squares(2 * g, 2, kTokens - kWindow), k = key_squares(g);
    for (size_t d = 0; d < kWidth; ++d) {
      EXPECT_NEAR((q[d] + q[kWidth + d]) / 2 * k[d] * 6, expected[g][d], 1e-3) << g << " " << d;
    }
  }
}

TEST(Think, QueryHeadsOfAKvHeadShareAChoice) {
  const Gone half[] = {{1, 4, 5, 6}, {0, 2, 4, 6}}, less[] = {{1, 4, 5}, {0, 2, 4}};
  for (int g = 0; g < kKvHeads; ++g) {
    const std::vector<float> q = query_squares(2 * g, 2, kTokens - kWindow), k = key_squares(g);
    EXPECT_EQ(pruned(0.5, 2, q, k), half[g]);
    EXPECT_EQ(pruned(0.6, 2, q, k), less[g]);  // floor(0.4 x 8) are 3
    EXPECT_EQ(pruned(1, 2, q, k), Gone{});
  }
}

TEST(Think, AHeadByItself) {
  const Gone expected[kHeads] = {{1, 5, 6, 7}, {1, 3, 4, 5}, {0, 2, 4, 5}, {0, 1, 4, 6}};
  for (int h = 0; h < kHeads; ++h) {
    EXPECT_EQ(pruned(0.5, 1, query_squares(h, 1, kTokens - kWindow), key_squares(h / 2)), expected[h]) << h;
  }
}

// The vector tells wrong readings apart: keys alone, and all queries.
TEST(Think, WrongReadingsChooseOthers) {
  const std::vector<float> ones(2 * kWidth, 1.0f);
  EXPECT_EQ(pruned(0.5, 2, ones, key_squares(0)), (Gone{1, 4, 5, 7}));
  EXPECT_EQ(pruned(0.5, 2, ones, key_squares(1)), (Gone{0, 2, 4, 6}));
  EXPECT_EQ(pruned(0.5, 2, query_squares(0, 2, 0), key_squares(0)), (Gone{1, 2, 4, 5}));
  EXPECT_EQ(pruned(0.5, 2, query_squares(2, 2, 0), key_squares(1)), (Gone{0, 2, 4, 6}));
}

TEST(Think, EqualScoresGoFromTheFirst) {
  const std::vector<float> ones(kWidth, 1.0f);
  EXPECT_EQ(pruned(0.5, 1, ones, ones), (Gone{0, 1, 2, 3}));
}

TEST(Think, StoredWidths) {
  const auto stored = [](double keep, int width) { return make_channel_policy({"think", {{"keep", keep}}})->stored(width); };
  EXPECT_EQ(stored(0.6, 128), 80);  // 77
  EXPECT_EQ(stored(0.5, 128), 64);
  EXPECT_EQ(stored(0.6, 64), 48);  // 39
  EXPECT_EQ(stored(0.5, 64), 32);
  EXPECT_EQ(stored(0.1, 64), 32);  // the least there is
  EXPECT_EQ(stored(0.9, 64), 64);
  EXPECT_EQ(stored(0.9, 32), 32);
  EXPECT_EQ(stored(1, 128), 128);
}

TEST(Think, RefusesByName) {
  const auto message = [](const PolicySpec& spec) -> std::string {
    try {
      check_channels(spec);
    } catch (const Error& e) {
      return e.what();
    }
    return "accepted";
  };
  EXPECT_EQ(message({"thnk", {}}), "channel policy \"thnk\" is unknown; expected one of think");
  EXPECT_EQ(message({"think", {{"keep", 0.0}}}), "channel policy think: keep is 0; expected a number from 1e-06 to 1");
  EXPECT_EQ(message({"think", {{"ratio", 0.4}}}), "channel policy think: has no parameter \"ratio\"; it has keep, window");
}

}  // namespace
}  // namespace kvmix
