// DecoQuant's decomposition on three tensors: exact, balanced, and better than plain rounding where channels stand out only.
#include "rows/mpo.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>

#include "kvmix/error.h"
#include "rows/row_map.h"

namespace kvmix {
namespace {

constexpr int kTokens = 64, kWidth = 256;
using Numbers = std::vector<double>;

// Uniform in [-1, 1). 'A': every sixteenth channel stands out, 'B': two channels, 'C': none.
Numbers tensor(char kind, int tokens = kTokens) {
  uint32_t state = 777;
  Numbers y(static_cast<size_t>(tokens * kWidth));
  for (size_t i = 0; i < y.size(); ++i) {
    state = state * 1664525u + 1013904223u;
    y[i] = 2 * (static_cast<double>(state >> 8) / 16777216) - 1;
    const size_t d = i % kWidth;
    if (kind == 'A' && d % 16 == 3) y[i] += 6;
    if (kind == 'B' && (d == 5 || d == 133)) y[i] += 12;
  }
  return y;
}

Numbers rebuilt(const Numbers& large, const MpoMatrix& small) {
  Numbers y(large.size(), 0.0);
  for (size_t first = 0; first < y.size(); first += 16) {
    for (size_t k = 0; k < 16; ++k) {
      for (size_t c = 0; c < 16; ++c) y[first + c] += large[first + k] * small[k * 16 + c];
    }
  }
  return y;
}

double relative(const Numbers& x, const Numbers& y) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < y.size(); ++i) error += (x[i] - y[i]) * (x[i] - y[i]), norm += y[i] * y[i];
  return std::sqrt(error / norm);
}

// Rounds runs of numbers [begin, begin + n x stride).
void symmetric(double* x, size_t n, size_t stride, int bits) {
  double most = 1e-5;
  for (size_t i = 0; i < n; ++i) most = std::max(most, std::abs(x[i * stride]));
  const double step = most / ((1 << (bits - 1)) - 1);
  for (size_t i = 0; i < n; ++i) x[i * stride] = std::nearbyint(x[i * stride] / step) * step;
}
void asymmetric(double* x, size_t n, size_t stride, int bits) {
  double low = INFINITY, high = -INFINITY;
  for (size_t i = 0; i < n; ++i) low = std::min(low, x[i * stride]), high = std::max(high, x[i * stride]);
  const double step = (high - low) / ((1 << bits) - 1);
  for (size_t i = 0; i < n; ++i) x[i * stride] = low + std::nearbyint((x[i * stride] - low) / step) * step;
}
template <class Round>
Numbers per_token(Numbers y, const Round& round, int bits) {
  for (size_t t = 0; t < kTokens; ++t) round(&y[t * kWidth], kWidth, 1, bits);
  return y;
}
Numbers per_channel(Numbers y, int bits) {
  for (size_t t = 0; t < kTokens; t += 32) {
    for (size_t d = 0; d < kWidth; ++d) asymmetric(&y[t * kWidth + d], 32, kWidth, bits);
  }
  return y;
}

TEST(Mpo, ExactAndBalanced) {
  const double sigmas[][3] = {{192.9942, 20.3592, 16.5547}, {136.5673, 20.2948, 16.5135}, {20.3929, 20.2967, 16.5177}};
  for (const char kind : {'A', 'B', 'C'}) {
    const Numbers y = tensor(kind);
    const MpoFactors f = mpo_factors(y, kWidth);
    ASSERT_EQ(f.large.size(), y.size());
    EXPECT_LT(relative(rebuilt(f.large, f.small), y), 1e-10) << kind;
    const double* expected = sigmas[kind - 'A'];
    EXPECT_NEAR(f.sigma[0], expected[0], 1e-4) << kind;
    EXPECT_NEAR(f.sigma[1], expected[1], 1e-4) << kind;
    EXPECT_NEAR(f.sigma[15], expected[2], 1e-4) << kind;
    EXPECT_TRUE(std::is_sorted(f.sigma.rbegin(), f.sigma.rend()));
    for (size_t i = 0; i < 16; ++i) {
      for (size_t j = 0; j < 16; ++j) {
        double large = 0, small = 0;
        for (size_t first = 0; first < y.size(); first += 16) large += f.large[first + i] * f.large[first + j];
        for (size_t c = 0; c < 16; ++c) small += f.small[i * 16 + c] * f.small[j * 16 + c];
        const double diagonal = i == j ? f.sigma[i] : 0;
        EXPECT_NEAR(large, diagonal, 1e-9 * f.sigma[0]) << kind;
        EXPECT_NEAR(small, diagonal, 1e-9 * f.sigma[0]) << kind;
      }
    }
  }
}

TEST(Mpo, GainsWhereChannelsStandOutAndLosesElsewhere) {
  struct Row {
    char kind;
    int bits;
    double symmetric, asymmetric, kivi, mpo;
  };
  const Row rows[] = {
      {'A', 8, .0097, .0055, .0013, .0038}, {'A', 4, .1767, .0961, .0217, .0686}, {'A', 2, .3828, .5276, .1094, .3576},
      {'B', 8, .0229, .0124, .0017, .0100}, {'B', 4, .4552, .2039, .0290, .1851}, {'B', 2, .4765, .9507, .1461, .4762},
      {'C', 8, .0039, .0039, .0036, .0068}, {'C', 4, .0710, .0664, .0607, .1234}, {'C', 2, .5051, .3321, .3065, .8005}};
  for (const Row& r : rows) {
    const Numbers y = tensor(r.kind);
    const MpoFactors f = mpo_factors(y, kWidth);
    const auto near = [&](double is, double expected, const char* what) {
      EXPECT_NEAR(is, expected, 0.02 * expected + 5e-5) << r.kind << r.bits << " " << what;  // four digits were given
    };
    near(relative(per_token(y, symmetric, r.bits), y), r.symmetric, "symmetric");
    near(relative(per_token(y, asymmetric, r.bits), y), r.asymmetric, "asymmetric");
    near(relative(per_channel(y, r.bits), y), r.kivi, "per channel");
    near(relative(rebuilt(per_token(f.large, symmetric, r.bits), f.small), y), r.mpo, "mpo");
  }
}

TEST(Mpo, RangesShrinkWhereChannelsStandOut) {
  const auto peak = [](const Numbers& x) {
    double most = 0, squares = 0;
    for (const double v : x) most = std::max(most, std::abs(v)), squares += v * v;
    return most / std::sqrt(squares / static_cast<double>(x.size()));
  };
  const double expected[][2] = {{4.36, 2.99}, {10.81, 7.02}, {1.74, 3.78}};
  for (const char kind : {'A', 'B', 'C'}) {
    const Numbers y = tensor(kind);
    EXPECT_NEAR(peak(y), expected[kind - 'A'][0], 0.01) << kind;
    EXPECT_NEAR(peak(mpo_factors(y, kWidth).large), expected[kind - 'A'][1], 0.01) << kind;
  }
}

// As a row map: a query that is turned meets stored rows as the query would rows that were rebuilt, sums go back, and rows that
// come later are stored by the same tensor.
TEST(Mpo, AttendsWithoutRebuilding) {
  const Numbers y = tensor('A', kTokens + 1);
  const MpoFactors f = mpo_factors(std::span(y).first(kTokens * kWidth), kWidth);
  TransformSpec spec;
  spec.more = {{"mpo", {f.small.begin(), f.small.end()}}};
  const RowMapChain maps(spec, {.side = Side::kKey, .kv_heads = 1, .width = kWidth}, "keys");
  std::vector<float> query(kWidth), sum(kWidth, 0.0f), plain(kWidth, 0.0f);
  for (size_t c = 0; c < kWidth; ++c) query[c] = static_cast<float>(std::sin(0.37 * static_cast<double>(c)));
  std::vector<float> turned = query;
  maps.query(0, turned.data());
  for (size_t t = 0; t <= kTokens; ++t) {
    std::vector<float> row(y.begin() + static_cast<ptrdiff_t>(t * kWidth),
                           y.begin() + static_cast<ptrdiff_t>((t + 1) * kWidth));
    const std::vector<float> given = row;
    maps.store(0, row.data());
    double stored = 0, exact = 0, size = 0;
    for (size_t c = 0; c < kWidth; ++c) {
      stored += static_cast<double>(turned[c]) * static_cast<double>(row[c]);
      exact += static_cast<double>(query[c]) * static_cast<double>(given[c]);
      size += std::abs(static_cast<double>(query[c]) * static_cast<double>(given[c]));
      if (t < kTokens) {
        EXPECT_NEAR(static_cast<double>(row[c]), f.large[t * kWidth + c], 1e-4);
      }
      sum[c] += row[c];
      plain[c] += given[c];
    }
    EXPECT_NEAR(stored, exact, 1e-5 * size);
    maps.output(0, row.data());
    for (size_t c = 0; c < kWidth; ++c) EXPECT_NEAR(row[c], given[c], 1e-5f * 8);
  }
  maps.output(0, sum.data());
  for (size_t c = 0; c < kWidth; ++c) EXPECT_NEAR(sum[c], plain[c], 1e-4f * (std::abs(plain[c]) + kTokens));
}

TEST(Mpo, RefusesByName) {
  TransformSpec spec;
  spec.more = {{"mpo", std::vector<float>(256, 1.0f)}};
  try {
    RowMapChain(spec, {.side = Side::kKey, .kv_heads = 1, .width = 64}, "keys");
    ADD_FAILURE() << "accepted";
  } catch (const Error& e) {
    EXPECT_STREQ(e.what(), "keys: \"mpo\": the matrix has no inverse; decompose the rows again");
  }
  EXPECT_THROW(mpo_factors(Numbers(40), 20), Error);
}

}  // namespace
}  // namespace kvmix
