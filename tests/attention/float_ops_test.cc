// Every instruction set's operations on rows, against double precision.
#include "attention/cpu/float_ops.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

namespace kvmix {
namespace {

std::vector<float> numbers(size_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<float> out(n);
  for (float& x : out) x = uniform(random);
  return out;
}

TEST(FloatOps, AreWhatTheyStandFor) {
  for (const FloatOps* ops : float_ops_registry()) {
    if (!ops->available()) continue;
    for (const int dim : {32, 48, 64, 80, 128, 256}) {
      for (const int count : {16, 24, 112, 250}) {
        for (const int n : {1, 3, 4, 37, 128}) {
          const auto size = [](int a, int b) { return static_cast<size_t>(a) * static_cast<size_t>(b); };
          const std::vector<float> rows = numbers(size(n, count), 1), up = numbers(size(count, dim), 2),
                                   query = numbers(static_cast<size_t>(dim), 3), weights = numbers(static_cast<size_t>(n), 4);
          std::vector<float> keys(size(n, dim) + 1, 7.0f), scores(static_cast<size_t>(n) + 1, 7.0f),
              acc = numbers(size(count, 1), 5);
          const std::vector<float> before = acc;
          ops->multiply(rows.data(), n, count, up.data(), dim, keys.data());
          ops->dots(query.data(), keys.data(), n, dim, scores.data());
          ops->add(weights.data(), rows.data(), n, count, acc.data());
          double worst = 0;
          for (int t = 0; t < n; ++t) {
            double score = 0;
            for (int c = 0; c < dim; ++c) {
              double key = 0;
              for (int i = 0; i < count; ++i)
                key += static_cast<double>(rows[size(t, count) + static_cast<size_t>(i)]) *
                       static_cast<double>(up[size(i, dim) + static_cast<size_t>(c)]);
              worst = std::max(worst, std::abs(key - static_cast<double>(keys[size(t, dim) + static_cast<size_t>(c)])));
              score += key * static_cast<double>(query[static_cast<size_t>(c)]);
            }
            worst = std::max(worst, 0.1 * std::abs(score - static_cast<double>(scores[static_cast<size_t>(t)])));
          }
          for (int i = 0; i < count; ++i) {
            double sum = static_cast<double>(before[static_cast<size_t>(i)]);
            for (int t = 0; t < n; ++t)
              sum += static_cast<double>(weights[static_cast<size_t>(t)]) *
                     static_cast<double>(rows[size(t, count) + static_cast<size_t>(i)]);
            worst = std::max(worst, std::abs(sum - static_cast<double>(acc[static_cast<size_t>(i)])));
          }
          EXPECT_LT(worst, 3e-5) << ops->name << ", " << n << " rows of " << count << " to " << dim;
          EXPECT_EQ(keys.back(), 7.0f) << ops->name;
          EXPECT_EQ(scores.back(), 7.0f) << ops->name;
        }
      }
    }
  }
}

TEST(FloatOps, WeighsAsASoftmax) {
  for (const FloatOps* ops : float_ops_registry()) {
    if (!ops->available()) continue;
    for (const size_t n : {1, 7, 16, 33, 5000}) {
      for (const float softcap : {0.0f, 5.0f}) {
        std::vector<float> x = numbers(n, 6);
        for (float& score : x) score *= 60;
        const std::vector<float> scores = x;
        x.push_back(7.0f);
        ops->weigh(x.data(), n, 0.5f, softcap);
        const auto logit = [&](float score) {
          const double scaled = 0.5 * static_cast<double>(score), cap = static_cast<double>(softcap);
          return cap > 0 ? cap * std::tanh(scaled / cap) : scaled;
        };
        double sum = 0, most = -1e9;
        for (const float score : scores) most = std::max(most, logit(score));
        for (const float score : scores) sum += std::exp(logit(score) - most);
        for (size_t i = 0; i < n; ++i) {
          const double weight = std::exp(logit(scores[i]) - most) / sum;
          ASSERT_NEAR(static_cast<double>(x[i]), weight, 1e-5 * weight + 1e-12) << ops->name << " " << i << " of " << n;
        }
        EXPECT_EQ(x.back(), 7.0f) << ops->name;
      }
    }
  }
}

TEST(FloatOps, TheBestIsTaken) {
  EXPECT_STREQ(float_ops(true).name, "portable");
  EXPECT_TRUE(float_ops(false).available());
}

}  // namespace
}  // namespace kvmix
