// Finds the levels of a trellis (src/codec/trellis_code.h): kvmix_trellis_levels BITS SECONDS [SEED] prints, whenever it has
// found better ones, the line of src/codec/trellis_levels.inc and what they leave of a Gaussian's variance.
//
// A start is a choice of a, b, c, d, of the first indices that take the second table, and of tables: quantiles of a Gaussian,
// coarse ones by the first index, fine ones, shuffled or not, by the second. From there descent: all samples go to their
// windows (Viterbi, chains of 32 from window 0), then the tables to the least squares of the samples of their windows. The gain
// is of samples of one size; of pages, whose scales are rounded and reach the largest number, it is a little less at 2 bits:
// the test Trellis.NothingShrinks says what is left.
#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "codec/trellis_code.h"

namespace kvmix {
namespace {

constexpr std::array<std::array<int, 2>, 15> kFirst = {
    {{3, 1}, {1, 3}, {5, 1}, {1, 5}, {1, 1}, {2, 1}, {1, 2}, {4, 1}, {1, 4}, {8, 1}, {1, 8}, {7, 1}, {1, 7}, {3, 2}, {6, 1}}};
constexpr std::array<std::array<int, 2>, 7> kSecond = {{{0, 1}, {1, 0}, {1, 1}, {1, 2}, {2, 1}, {1, 4}, {4, 1}}};
constexpr std::array<uint16_t, 4> kOuter = {0, 0x8001, 0xc003, 0xaaaa};

double quantile(double share) {
  double low = -8, high = 8;
  for (int i = 0; i < 60; ++i) {
    const double middle = (low + high) / 2;
    (std::erfc(-middle / std::sqrt(2.0)) / 2 < share ? low : high) = middle;
  }
  return low;
}

struct Trellis {
  TrellisCode code{};  // without tables
  std::array<double, 16> a{};
  std::array<std::array<double, 16>, 2> b{};

  std::array<double, 16>& second(int window) { return b[static_cast<size_t>((code.outer >> code.first_index(window)) & 1)]; }
  double level(int window) {
    return a[static_cast<size_t>(code.first_index(window))] + second(window)[static_cast<size_t>(code.second_index(window))];
  }
};

// Samples and their sums by the window that they went to.
struct Windows {
  std::array<double, kLevels> sum{}, count{};
  double error = 0;    // mean square
  double product = 0;  // of samples and their levels
};

Windows nearest(Trellis& trellis, const std::vector<float>& samples, size_t n) {
  const int bits = trellis.code.bits, states = kLevels >> bits;
  std::array<float, kLevels> levels{};
  for (int w = 0; w < kLevels; ++w) levels[static_cast<size_t>(w)] = static_cast<float>(trellis.level(w));
  Windows found;
  std::vector<float> cost(static_cast<size_t>(states)), next(cost);
  std::vector<uint8_t> from(static_cast<size_t>(states) * kChainTokens);
  for (size_t chain = 0; chain + kChainTokens <= n; chain += kChainTokens) {
    std::fill(cost.begin(), cost.end(), std::numeric_limits<float>::max());
    cost[0] = 0;
    for (size_t i = 0; i < kChainTokens; ++i) {
      std::fill(next.begin(), next.end(), std::numeric_limits<float>::max());
      for (int w = 0; w < kLevels; ++w) {
        const float error = samples[chain + i] - levels[static_cast<size_t>(w)];
        const float reached = cost[static_cast<size_t>(w >> bits)] + error * error;
        const auto state = static_cast<size_t>(w % states);
        if (reached < next[state])
          next[state] = reached, from[i * static_cast<size_t>(states) + state] = static_cast<uint8_t>(w);
      }
      cost.swap(next);
    }
    auto state = static_cast<size_t>(std::min_element(cost.begin(), cost.end()) - cost.begin());
    found.error += static_cast<double>(cost[state]);
    for (size_t i = kChainTokens; i-- > 0;) {
      const size_t w = from[i * static_cast<size_t>(states) + state];
      found.sum[w] += static_cast<double>(samples[chain + i]), found.count[w] += 1;
      state = w >> bits;
    }
  }
  found.error /= static_cast<double>(n / kChainTokens * kChainTokens);
  for (int w = 0; w < kLevels; ++w) found.product += found.sum[static_cast<size_t>(w)] * trellis.level(w);
  return found;
}

// One table after the other to the least squares of what the rest leaves.
void descend(Trellis& trellis, const Windows& windows) {
  const auto fit = [&](auto index_of, auto& table, auto takes) {
    std::array<double, 16> sum{}, count{};
    for (int w = 0; w < kLevels; ++w) {
      if (!takes(w)) continue;
      const auto at = static_cast<size_t>(index_of(w)), window = static_cast<size_t>(w);
      sum[at] += windows.sum[window] - windows.count[window] * (trellis.level(w) - table[at]);
      count[at] += windows.count[window];
    }
    for (size_t i = 0; i < 16; ++i) {
      if (count[i] > 0) table[i] = sum[i] / count[i];
    }
  };
  for (int round = 0; round < 8; ++round) {
    fit([&](int w) { return trellis.code.first_index(w); }, trellis.a, [](int) { return true; });
    for (auto& table : trellis.b)
      fit([&](int w) { return trellis.code.second_index(w); }, table, [&](int w) { return &trellis.second(w) == &table; });
  }
}

Trellis start(int bits, std::mt19937& random) {
  const auto pick = [&random](size_t n) { return random() % n; };
  Trellis trellis;
  trellis.code.bits = bits;
  const auto& first = kFirst[pick(kFirst.size())];
  const auto& second = kSecond[pick(kSecond.size())];
  std::copy(first.begin(), first.end(), trellis.code.first);
  std::copy(second.begin(), second.end(), trellis.code.second);
  trellis.code.outer = kOuter[pick(kOuter.size())];
  const double fine = pick(3) == 0 ? 1.0 / 16 : 0.03 + 0.7 * std::uniform_real_distribution<double>()(random);
  std::array<size_t, 16> order{};
  std::iota(order.begin(), order.end(), size_t{0});
  for (size_t i = 0; i < 16; ++i) trellis.a[i] = quantile((static_cast<double>(i) + 0.5) / 16);
  for (auto& table : trellis.b) {
    if (pick(2) == 0) std::shuffle(order.begin(), order.end(), random);
    for (size_t i = 0; i < 16; ++i) table[i] = fine * quantile((static_cast<double>(order[i]) + 0.5) / 16);
  }
  return trellis;
}

// Rounded to bytes whose sums lie within 7 bits around kLevelCentre.
void print(Trellis trellis, double error, double gain) {
  double reach = 0, least = 0;
  for (int w = 0; w < kLevels; ++w) reach = std::max(reach, std::fabs(trellis.level(w)));
  const double unit = (static_cast<double>(kLevelCentre) - 0.6) / reach;
  for (const auto& table : trellis.b) least = std::min(least, *std::min_element(table.begin(), table.end()));
  double up = std::ceil(-unit * least);
  const double lowest = *std::min_element(trellis.a.begin(), trellis.a.end());
  up = std::min(up, std::floor(static_cast<double>(kLevelCentre) + unit * lowest));  // neither table below 0
  const auto list = [&](const std::array<double, 16>& table, double offset, const char* end) {
    for (size_t i = 0; i < 16; ++i)
      std::printf("%s%d", i == 0 ? "{" : ", ", static_cast<int>(std::lround(unit * table[i] + offset)));
    std::printf("}%s", end);
  };
  std::printf("// %.5f of the variance\n{%d, %.4ff, %.4ff, {%d, %d}, {%d, %d}, 0x%04x,\n ", error, trellis.code.bits, unit,
              gain, trellis.code.first[0], trellis.code.first[1], trellis.code.second[0], trellis.code.second[1],
              static_cast<unsigned>(trellis.code.outer));
  list(trellis.a, static_cast<double>(kLevelCentre) - up, ",\n {");
  list(trellis.b[0], up, ",\n  ");
  list(trellis.b[1], up, "}},\n");
  std::fflush(stdout);
}

int search(int bits, double seconds, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> samples(3000 * kChainTokens), others(2000 * kChainTokens);
  for (std::vector<float>* set : {&samples, &others}) {
    for (float& x : *set) x = normal(random);
  }
  double best = std::numeric_limits<double>::max();
  const auto begin = std::chrono::steady_clock::now();
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() < seconds) {
    Trellis trellis = start(bits, random);
    double error = 0;
    for (int i = 0; i < 20 && (i < 8 || error < 1.15 * best); ++i) {  // few samples, until it is hopeless
      const Windows windows = nearest(trellis, samples, 120 * kChainTokens);
      error = windows.error;
      descend(trellis, windows);
    }
    if (error > 1.04 * best) continue;
    for (int i = 0; i < 15; ++i) descend(trellis, nearest(trellis, samples, samples.size()));
    const Windows windows = nearest(trellis, others, others.size());
    if (windows.error >= best) continue;
    best = windows.error;
    const double squares = std::inner_product(others.begin(), others.end(), others.begin(), 0.0);
    print(trellis, windows.error, squares / windows.product);
  }
  return 0;
}

}  // namespace
}  // namespace kvmix

int main(int argc, char** argv) {
  const int bits = argc > 1 ? std::atoi(argv[1]) : 0;
  const double seconds = argc > 2 ? std::atof(argv[2]) : 0;
  if (argc < 3 || argc > 4 || bits < 1 || bits > 6 || !(seconds > 0)) {
    std::fprintf(stderr, "usage: kvmix_trellis_levels BITS(1 to 6) SECONDS [SEED]\n");
    return 2;
  }
  return kvmix::search(bits, seconds, argc > 3 ? static_cast<unsigned>(std::atoi(argv[3])) : 1);
}
