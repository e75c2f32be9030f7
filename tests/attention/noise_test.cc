// The arithmetic noise of every attention kernel: within a bound on any mix of codecs, page kinds and lengths (oracle in double
// precision on the same bytes; unused slots poisoned; the same bits when repeated), and small beside the error
// that the codes themselves make.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "attention/cpu/kernel.h"
#include "base/fp16.h"
#include "codec/tile_layout.h"
#include "codec/trellis.h"
#include "support/aligned_bytes.h"

namespace kvmix {
namespace {

using Random = std::mt19937;

TileFormat format_of(const CodecSpec& spec, Side side, int head_dim) {
  return tile_format(spec, {kPageTokens, head_dim, side});
}

// A page of random rows, decoded to doubles as it will be read. Slots that do not count are poisoned with NaN.
struct TestPage {
  AlignedBytes bytes;
  PageRef ref{};
  std::vector<float> original_key, original_value;  // before encoding
  std::vector<float> key, value;                    // [kPageTokens][head_dim], what the bytes say

  TestPage(const AttendJob& job, bool packed, int live, int64_t first, Random& random)
      : bytes(std::max(job.key.bytes + job.value.bytes, size_t{4} * kPageTokens * static_cast<size_t>(job.key.width))) {
    const int d = job.key.width, n = kPageTokens * d;
    std::normal_distribution<float> normal;
    const auto rows = [&](bool outliers) {
      std::vector<uint16_t> x(static_cast<size_t>(n));
      for (int i = 0; i < n; ++i) {
        const bool outlier = outliers && i % d % 16 == 3;
        x[static_cast<size_t>(i)] = f32_to_f16(normal(random) * (outlier ? 4.0f : 1.0f) + (outlier ? 3.0f : 0.0f));
      }
      return x;
    };
    const std::vector<uint16_t> k = rows(true), v = rows(false);
    for (const uint16_t h : k) original_key.push_back(f16_to_f32(h));
    for (const uint16_t h : v) original_value.push_back(f16_to_f32(h));
    key = original_key;
    value = original_value;
    std::byte *key_at = bytes.data(), *value_at = key_at;
    if (packed) {
      value_at += job.key.bytes;
      encode_tile(job.key.spec, Side::kKey, d, k.data(), key_at);
      encode_tile(job.value.spec, Side::kValue, d, v.data(), value_at);
      decode_tile(job.key.spec, Side::kKey, d, key_at, key.data());
      decode_tile(job.value.spec, Side::kValue, d, value_at, value.data());
      poison(job.key, key_at, live);
      poison(job.value, value_at, live);
    } else {
      value_at += n * 2;
      std::memcpy(key_at, k.data(), static_cast<size_t>(n) * 2);
      std::memcpy(value_at, v.data(), static_cast<size_t>(n) * 2);
      const TileFormat f16 = format_of({}, Side::kKey, d);
      poison(f16, key_at, live);
      poison(f16, value_at, live);
    }
    ref = {key_at, value_at, first, live, packed};
  }

  static void poison(const TileFormat& f, std::byte* tile, int live) {
    auto* h = reinterpret_cast<uint16_t*>(tile);
    constexpr uint16_t kNan = 0x7e01;
    if (f.spec.is_f16()) {
      std::fill(h + live * f.width, h + kPageTokens * f.width, kNan);
      return;
    }
    if (is_trellis(f.spec)) {  // codes are read with those of other slots, offsets with the largest scale: they stay
      if (f.spec.zero_point) return;
      for (int g = 0; g < trellis_groups(f.width); ++g)
        std::fill(tile + g * kPageTokens + live, tile + (g + 1) * kPageTokens, std::byte{255});
      return;
    }
    const TileGeometry g = tile_geometry(f.side, f.width);
    auto* codes = reinterpret_cast<uint8_t*>(tile + f.scale_bytes);
    for (int token = live; token < kPageTokens; ++token) {
      for (int c = 0; c < f.width; ++c) {
        const int lane = f.side == Side::kKey ? token : c, reduce = f.side == Side::kKey ? c : token;
        put_code(f.spec.bits, codes, unit_index(g, lane, reduce), byte_in_unit(lane, reduce), (1 << f.spec.bits) - 1);
        if (f.spec.axis == Axis::kToken) {
          const int i = scale_index(f.spec, f.width, token, c);
          h[i] = kNan;
          if (f.spec.zero_point) h[scale_count(f.spec, f.width) + i] = kNan;
        }
      }
    }
  }
};

struct Problem {
  AttendJob job{};
  std::vector<TestPage> pages;
  std::vector<PageRef> refs;
  std::vector<float> q, m, l, acc;
  std::vector<int64_t> positions;

  Problem(const CodecSpec& key, const CodecSpec& value, int head_dim, int rows) {
    job.key = format_of(key, Side::kKey, head_dim);
    job.value = format_of(value, Side::kValue, head_dim);
    job.rows = rows;
    job.scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  }
  void add_page(bool packed, int live, int64_t first, Random& random) { pages.emplace_back(job, packed, live, first, random); }

  void finish(Random& random) {
    std::normal_distribution<float> normal;
    const auto n = static_cast<size_t>(job.rows), d = static_cast<size_t>(job.key.width);
    q.resize(n * d);
    for (float& x : q) x = normal(random);
    m.assign(n, 0.0f), l.assign(n, 0.0f), acc.assign(n * d, 0.0f);
    for (const TestPage& page : pages) refs.push_back(page.ref);
    job.q = q.data(), job.position = positions.data(), job.pages = refs;
    job.m = m.data(), job.l = l.data(), job.acc = acc.data();
  }

  void run(const AttentionKernel& kernel) {
    AlignedBytes scratch(kernel.scratch_bytes(job.key.width, job.rows));
    std::fill_n(scratch.data(), scratch.size(), std::byte{0xff});  // NaN, if it were read before written
    kernel.attend(job, scratch.data());
  }

  bool visible(int row, const TestPage& page, int slot) const {
    const int64_t p = page.ref.first_position + slot, at = positions[static_cast<size_t>(row)];
    return slot < page.ref.live && p <= at && (job.sliding_window == 0 || p > at - job.sliding_window);
  }

  struct Answer {
    double log_sum = -std::numeric_limits<double>::infinity();
    std::vector<double> out;
  };
  Answer oracle(int row, bool original) const {
    const int d = job.key.width;
    std::vector<double> scores;
    double top = -std::numeric_limits<double>::infinity();
    for (const TestPage& page : pages) {
      const std::vector<float>& keys = original ? page.original_key : page.key;
      for (int t = 0; t < kPageTokens; ++t) {
        if (!visible(row, page, t)) continue;
        double s = 0;
        for (int c = 0; c < d; ++c) {
          s += static_cast<double>(q[static_cast<size_t>(row * d + c)]) *
               static_cast<double>(keys[static_cast<size_t>(t * d + c)]);
        }
        s *= static_cast<double>(job.scale);
        if (job.softcap > 0) s = static_cast<double>(job.softcap) * std::tanh(s / static_cast<double>(job.softcap));
        scores.push_back(s);
        top = std::max(top, s);
      }
    }
    Answer a;
    a.out.assign(static_cast<size_t>(d), 0.0);
    if (scores.empty()) return a;
    double sum = 0;
    size_t i = 0;
    for (const TestPage& page : pages) {
      const std::vector<float>& values = original ? page.original_value : page.value;
      for (int t = 0; t < kPageTokens; ++t) {
        if (!visible(row, page, t)) continue;
        const double p = std::exp(scores[i++] - top);
        sum += p;
        for (int c = 0; c < d; ++c)
          a.out[static_cast<size_t>(c)] += p * static_cast<double>(values[static_cast<size_t>(t * d + c)]);
      }
    }
    for (double& x : a.out) x /= sum;
    a.log_sum = top + std::log(sum);
    return a;
  }
};

// Largest relative error of a weight (query x scale, probability x scale): s8 against the largest of its row, else bf16.
double weight_error(const AttendJob& job, int bits) {
  return bits == 16 ? 1e-6 : job.exact || bits > 4 ? 1.0 / 512 : 1.0 / 254;
}

// Checks a problem's rows against the oracle. The bound lets each rounding of n terms add up like a random walk, six
// standard deviations wide, on terms as large as the largest there is.
void expect_close(const Problem& p, const std::string& what) {
  const int d = p.job.key.width;
  for (int row = 0; row < p.job.rows; ++row) {
    const Problem::Answer want = p.oracle(row, false);
    const auto r = static_cast<size_t>(row);
    if (std::isinf(want.log_sum)) {
      EXPECT_EQ(p.l[r], 0.0f) << what;
      EXPECT_EQ(p.m[r], -INFINITY) << what;
      continue;
    }
    double q_top = 0, key_top = 0, value_top = 0;
    for (int c = 0; c < d; ++c)
      q_top = std::max(q_top, std::fabs(static_cast<double>(p.q[r * static_cast<size_t>(d) + static_cast<size_t>(c)])));
    for (const TestPage& page : p.pages) {
      for (const float x : page.key) key_top = std::max(key_top, std::fabs(static_cast<double>(x)));
      for (const float x : page.value) value_top = std::max(value_top, std::fabs(static_cast<double>(x)));
    }
    const double random_walk = 6.0 / std::sqrt(12.0);
    const double score = 1e-5 + random_walk * weight_error(p.job, p.job.key.spec.bits) * static_cast<double>(p.job.scale) *
                                    std::sqrt(static_cast<double>(d)) * q_top * 2 * key_top;
    const double value = 1e-5 + random_walk * weight_error(p.job, p.job.value.spec.bits) * 4 * value_top;
    const double got_log = static_cast<double>(p.m[r]) + std::log(static_cast<double>(p.l[r]));
    ASSERT_NEAR(got_log, want.log_sum, score) << what << " row " << row;
    for (int c = 0; c < d; ++c) {
      const double got =
          static_cast<double>(p.acc[r * static_cast<size_t>(d) + static_cast<size_t>(c)]) / static_cast<double>(p.l[r]);
      ASSERT_NEAR(got, want.out[static_cast<size_t>(c)], value + value_top * std::expm1(2 * score))
          << what << " row " << row << " channel " << c;
    }
  }
}

std::vector<CodecSpec> specs_of(int bits) {
  if (bits == 16) return {CodecSpec{}};
  std::vector<CodecSpec> specs;
  for (const CodecSpec& s : all_codec_specs()) {
    if (s.bits == bits && s.fit == Fit::kMinMax) specs.push_back(s);
  }
  return specs;
}

TEST(KernelNoise, StaysWithinItsBoundOnAnyMix) {
  const int widths[] = {1, 2, 3, 4, 5, 6, 8, 16};
  const int lives[] = {1, 127, 128, 128, 128, 31};
  for (const AttentionKernel* kernel : attention_kernel_registry()) {
    if (!kernel->available()) continue;
    Random random(1);
    const auto pick = [&random](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
    for (const int head_dim : {64, 96}) {
      for (const int key_bits : widths) {
        for (const CodecSpec& key : specs_of(key_bits)) {
          // Each key codec meets a value codec of its own width and one of any other; values see all of theirs that way.
          for (const int value_bits : {key_bits, widths[pick(8)]}) {
            const std::vector<CodecSpec> values = specs_of(value_bits);
            const CodecSpec& value = values[static_cast<size_t>(pick(static_cast<int>(values.size())))];
            const int tokens = 1 + pick(3), group = 1 + pick(8);
            Problem p(key, value, head_dim, tokens * group);
            p.job.exact = pick(2) == 0;
            p.job.softcap = pick(4) == 0 ? 8.0f : 0.0f;
            p.job.sliding_window = pick(4) == 0 ? 100 : 0;
            int64_t at = pick(2) * 16;
            const int count = 1 + pick(4);
            for (int i = 0; i < count; ++i) {
              const int live = lives[pick(6)];
              p.add_page(pick(3) != 0, live, at, random);
              at += live;
            }
            for (int r = 0; r < p.job.rows; ++r)
              p.positions.push_back(at - tokens + r / group - (pick(5) == 0 ? pick(300) : 0));
            p.finish(random);
            if (!kernel->supports(p.job)) continue;
            p.run(*kernel);
            const std::string what = std::string(kernel->name) + " " + to_string(key) + " / " + to_string(value) +
                                     " head_dim " + std::to_string(head_dim) + (p.job.exact ? " exact" : "");
            expect_close(p, what);
            if (HasFatalFailure()) return;
            const std::vector<float> first = p.acc;
            p.run(*kernel);
            ASSERT_EQ(std::memcmp(first.data(), p.acc.data(), first.size() * sizeof(float)), 0) << what << " repeated";
          }
        }
      }
    }
  }
}

// The arithmetic adds little to what the codes lose: a tenth up to 4 bits. Wider codes lose so little themselves that
// bf16 products, which the contract allows there, come within the same size.
TEST(KernelNoise, IsSmallBesideTheCodes) {
  for (const AttentionKernel* kernel : attention_kernel_registry()) {
    if (!kernel->available()) continue;
    for (const int bits : {1, 2, 3, 4, 5, 6, 8}) {
      Random random(2);
      Problem p({bits, Axis::kChannel, 128, Fit::kLeastSquares, true}, {bits, Axis::kToken, 128, Fit::kLeastSquares, true}, 64,
                6);
      for (int i = 0; i < 8; ++i) p.add_page(true, kPageTokens, i * kPageTokens, random);
      p.positions.assign(6, 8 * kPageTokens - 1);
      p.finish(random);
      p.run(*kernel);
      double noise = 0, codes = 0;
      for (int r = 0; r < p.job.rows; ++r) {
        const Problem::Answer exact = p.oracle(r, true), coded = p.oracle(r, false);
        for (int c = 0; c < 64; ++c) {
          const auto i = static_cast<size_t>(c);
          const double got =
              static_cast<double>(p.acc[static_cast<size_t>(r * 64 + c)]) / static_cast<double>(p.l[static_cast<size_t>(r)]);
          noise += (got - coded.out[i]) * (got - coded.out[i]);
          codes += (coded.out[i] - exact.out[i]) * (coded.out[i] - exact.out[i]);
        }
      }
      const double ratio = std::sqrt(noise / codes);
      RecordProperty(std::string(kernel->name) + "_int" + std::to_string(bits), std::to_string(ratio));
      EXPECT_LT(ratio, bits <= 4 ? 0.15 : bits <= 6 ? 0.3 : 1.0) << kernel->name << " " << bits << " bits";
    }
  }
}

}  // namespace
}  // namespace kvmix
