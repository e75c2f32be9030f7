// How a cache rounds: recent rows of 8 bits, and error feedback when rows are stored and pages are sealed.
#include <gtest/gtest.h>

#include "kvmix/error.h"
#include "support/cache_fixture.h"

namespace kvmix {
namespace {

using testing::key_codec;
using testing::kRecents;
using testing::make_layer;
using testing::one_layer;
using testing::random_rows;
using testing::Rows;
using testing::step;
using testing::stored;
using testing::value_codec;
using testing::with_recent;

// Sum over tokens of the squared sum of a row's errors.
double error_along_ones(const std::vector<float>& rounded, const std::vector<float>& exact, int tokens, int dim) {
  double sum = 0;
  for (int t = 0; t < tokens; ++t) {
    double along = 0;
    for (int c = 0; c < dim; ++c) {
      const auto i = static_cast<size_t>(t * dim + c);
      along += static_cast<double>(rounded[i]) - static_cast<double>(exact[i]);
    }
    sum += along * along;
  }
  return sum;
}

TEST(Cache, RecentRowsAreHalfTheBytesAndNearlyExact) {
  std::mt19937 random(14);
  const LayerConfig layer = make_layer(4, 2, 64, key_codec(3), value_codec(2));
  Rows rows = random_rows(layer, 200, random);
  std::vector<std::vector<float>> outs;
  std::vector<size_t> bytes;
  for (const CodecSpec& recent : kRecents) {
    Cache cache(one_layer(with_recent(layer, recent)));
    const SequenceId id = cache.create();
    step(cache, {{id, 200}}, rows);
    outs.push_back(rows.out);
    bytes.push_back(cache.memory().open_bytes);
  }
  EXPECT_EQ(bytes[1] * 16 * 2, bytes[0] * 17);  // 8.5 bits
  double error = 0, norm = 0;
  for (size_t i = 0; i < outs[0].size(); ++i) {
    const double d = static_cast<double>(outs[1][i]) - static_cast<double>(outs[0][i]);
    error += d * d;
    norm += static_cast<double>(outs[0][i]) * static_cast<double>(outs[0][i]);
  }
  EXPECT_GT(error, 0);
  EXPECT_LT(std::sqrt(error / norm), 0.02);
}

TEST(Cache, RecentRowsOfOtherCodecsAreRefused) {
  for (const CodecSpec& recent :
       {CodecSpec{8, Axis::kChannel, 64, Fit::kMinMax, true}, CodecSpec{4, Axis::kToken, 64, Fit::kMinMax, true},
        CodecSpec{8, Axis::kToken, 64, Fit::kLeastSquares, true}}) {
    try {
      Cache cache(one_layer(with_recent(make_layer(2, 1, 64, key_codec(2), value_codec(2)), recent)));
      FAIL() << to_string(recent) << " was accepted";
    } catch (const Error& e) {
      EXPECT_EQ(e.status(), Status::kInvalidArgument);
      EXPECT_NE(std::string(e.what()).find("layer 0: recent rows"), std::string::npos) << e.what();
    }
  }
}

// With errors that matter along one direction only, feedback pushes them into the others.
TEST(Cache, FeedbackMovesErrorsOutOfTheWay) {
  std::mt19937 random(11);
  const int dim = 64;
  LayerConfig plain = make_layer(1, 1, dim, {2, Axis::kChannel, 128, Fit::kLeastSquares, true}, CodecSpec{});
  plain.sinks = 0;
  plain.window.tokens = 0;
  LayerConfig fed = plain;
  // Every channel makes up for the sum of the errors before it.
  fed.key.transform.feedback.assign(static_cast<size_t>(dim * (dim - 1) / 2), 1.0f);
  Rows rows = random_rows(plain, 256, random), next = random_rows(plain, 1, random);
  std::vector<double> error;
  for (const LayerConfig& layer : {plain, fed}) {
    Cache cache(one_layer(layer));
    const SequenceId id = cache.create();
    step(cache, {{id, 256}}, rows);
    step(cache, {{id, 1}}, next);
    error.push_back(error_along_ones(stored(cache, id, 0, Side::kKey), rows.k, 128, dim));
  }
  EXPECT_GT(error[0], 0);
  EXPECT_LT(error[1], 0.2 * error[0]);
}

// With errors that matter along one direction only, feedback takes them out of recent keys too.
TEST(Cache, RecentKeysAreRoundedWithFeedback) {
  std::mt19937 random(15);
  const int dim = 64, n = 100;
  LayerConfig plain = with_recent(make_layer(1, 1, dim, key_codec(2), value_codec(2)), kRecents.back());
  plain.sinks = 0;
  LayerConfig fed = plain;
  fed.key.transform.feedback.assign(static_cast<size_t>(dim * (dim - 1) / 2), 1.0f);
  Rows rows = random_rows(plain, n, random);
  std::vector<double> error;
  for (const LayerConfig& layer : {plain, fed}) {
    Cache cache(one_layer(layer));
    const SequenceId id = cache.create();
    step(cache, {{id, n}}, rows);
    error.push_back(error_along_ones(stored(cache, id, 0, Side::kKey), rows.k, n, dim));
  }
  EXPECT_GT(error[0], 0);
  EXPECT_LT(error[1], 0.2 * error[0]);
}

}  // namespace
}  // namespace kvmix
