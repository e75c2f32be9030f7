// Every registered kernel against a double-precision oracle over the decoded tiles. The bound follows from the formats: what
// rounding a query or a probability to its product type does to a score and to an output, and fp32 sums.
#include "attention/cpu/kernel.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "base/fp16.h"
#include "codec/tile_layout.h"
#include "support/aligned_bytes.h"

namespace kvmix {
namespace {

struct Case {
  CodecSpec key, value;
  int head_dim = 64, rows = 3, sinks = 16;
  int key_channels = 0;   // stored, if not head_dim
  int length = 700;       // tokens
  int open_tokens = 150;  // newest ones in fp16 pages
  int query_tokens = 1;   // newest tokens that ask; rows are shared out over them
  int sliding_window = 0;
  float softcap = 0;
  bool exact = false;

  int key_dim() const { return key_channels > 0 ? key_channels : head_dim; }
};

std::string describe(const Case& c, const char* kernel) {
  return std::string(kernel) + " K " + to_string(c.key) + " V " + to_string(c.value) + " head_dim " +
         std::to_string(c.head_dim) + " key channels " + std::to_string(c.key_dim()) + " rows " + std::to_string(c.rows) +
         " length " + std::to_string(c.length);
}

// A head's pages with what they decode to.
class Head {
 public:
  Head(const Case& c, std::mt19937& random) : c_(c) {
    key_ = tile_format(c.key, {kPageTokens, c.key_dim(), Side::kKey});
    value_ = tile_format(c.value, {kPageTokens, c.head_dim, Side::kValue});
    std::normal_distribution<float> normal;
    const int dim = c.head_dim, key_dim = c.key_dim();
    for (int first = 0; first < c.length || first == 0;) {
      const bool sink = first == 0 && c.sinks > 0;
      const int capacity = sink ? c.sinks : kPageTokens;
      const int live = std::min(capacity, c.length - first);
      const bool packed = !sink && live == kPageTokens && first + kPageTokens <= c.length - c.open_tokens &&
                          !(c.key.is_f16() && c.value.is_f16());
      // NaN where nothing lives.
      std::vector<uint16_t> k(static_cast<size_t>(kPageTokens * key_dim), 0x7e00),
          v(static_cast<size_t>(kPageTokens * dim), 0x7e00);
      for (int i = 0; i < live * key_dim; ++i) {
        const int channel = i % key_dim;
        k[static_cast<size_t>(i)] =
            f32_to_f16(normal(random) * (channel % 16 == 3 ? 4.0f : 1.0f) + (channel % 16 == 5 ? 2.0f : 0.0f));
      }
      for (int i = 0; i < live * dim; ++i) v[static_cast<size_t>(i)] = f32_to_f16(normal(random));
      pages_.emplace_back(packed ? key_.bytes : k.size() * 2);
      pages_.emplace_back(packed ? value_.bytes : v.size() * 2);
      std::byte *kp = pages_[pages_.size() - 2].data(), *vp = pages_.back().data();
      std::vector<float> kd(k.size()), vd(v.size());
      if (packed) {
        codec_of(c.key).encode(c.key, key_.shape(), k.data(), nullptr, kp);
        codec_of(c.value).encode(c.value, value_.shape(), v.data(), nullptr, vp);
        decode_tile(c.key, Side::kKey, key_dim, kp, kd.data());
        decode_tile(c.value, Side::kValue, dim, vp, vd.data());
      } else {
        std::memcpy(kp, k.data(), k.size() * 2);
        std::memcpy(vp, v.data(), v.size() * 2);
        for (size_t i = 0; i < k.size(); ++i) kd[i] = f16_to_f32(k[i]);
        for (size_t i = 0; i < v.size(); ++i) vd[i] = f16_to_f32(v[i]);
      }
      refs.push_back({kp, vp, first, live, packed});
      keys.insert(keys.end(), kd.begin(), kd.begin() + live * key_dim);
      values.insert(values.end(), vd.begin(), vd.begin() + live * dim);
      first += capacity;
    }
    q.resize(static_cast<size_t>(c.rows * key_dim));
    for (float& x : q) x = normal(random);
    for (int r = 0; r < c.rows; ++r) {
      positions.push_back(std::max(0, c.length - c.query_tokens) + r * c.query_tokens / c.rows);
    }
  }

  // Decoded tile pages move with their vectors' storage, so refs stay valid while pages_ grows: the bytes are on the heap.
  AttendJob job(float* m, float* l, float* acc) const {
    AttendJob j{};
    j.key = key_, j.value = value_;
    j.scale = scale(), j.softcap = c_.softcap, j.sliding_window = c_.sliding_window, j.exact = c_.exact;
    j.rows = c_.rows, j.q = q.data(), j.position = positions.data(), j.pages = refs;
    j.m = m, j.l = l, j.acc = acc;
    return j;
  }
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(c_.head_dim)); }

  std::vector<PageRef> refs;
  std::vector<float> keys, values, q;
  std::vector<int64_t> positions;

 private:
  Case c_;
  TileFormat key_, value_;
  std::vector<AlignedBytes> pages_;
};

double sq(double x) { return x * x; }

// How far a sum over codes may be off because its weights were rounded: the weights' step over sqrt(12), times the largest
// centred code. int8 steps by a 127th of the largest weight; bf16 and two-part int8 by 2^-8 of each.
double weight_step(bool fine, double largest, double rms) { return (fine ? rms / 256 : largest / 127) / std::sqrt(12.0); }

void check(const Case& c, unsigned seed) {
  std::mt19937 random(seed);
  const Head head(c, random);
  const int dim = c.head_dim, key_dim = c.key_dim();
  const auto rows = static_cast<size_t>(c.rows);
  for (const AttentionKernel* kernel : attention_kernel_registry()) {
    if (!kernel->available()) continue;
    std::vector<float> m(rows), l(rows), acc(rows * static_cast<size_t>(dim)), m2(rows), l2(rows), acc2(acc.size());
    const AttendJob job = head.job(m.data(), l.data(), acc.data());
    AttendJob again = head.job(m2.data(), l2.data(), acc2.data());
    if (!kernel->supports(job)) {
      ASSERT_STRNE(kernel->name, "portable");
      continue;
    }
    AlignedBytes scratch(kernel->scratch_bytes(std::max(dim, key_dim), c.rows));
    kernel->attend(job, scratch.data());
    std::fill_n(scratch.data(), kernel->scratch_bytes(std::max(dim, key_dim), c.rows), std::byte{0xff});
    // Handing out weights changes nothing.
    std::vector<float> weights(head.refs.size() * rows * kPageTokens, NAN), references(head.refs.size() * rows, -INFINITY);
    std::vector<PageRef> refs = head.refs;
    for (size_t i = 0; i < refs.size(); ++i) {
      refs[i].weights = &weights[i * rows * kPageTokens];
      refs[i].reference = &references[i * rows];
    }
    again.pages = refs;
    kernel->attend(again, scratch.data());
    ASSERT_EQ(m, m2) << describe(c, kernel->name);
    ASSERT_EQ(l, l2) << describe(c, kernel->name);
    ASSERT_EQ(acc, acc2) << describe(c, kernel->name);

    for (int r = 0; r < c.rows; ++r) {
      const int64_t position = head.positions[static_cast<size_t>(r)];
      const float* q = &head.q[static_cast<size_t>(r * key_dim)];
      const int64_t end = std::min<int64_t>(c.length, position + 1);
      const int64_t begin = c.sliding_window > 0 ? std::max<int64_t>(0, position - c.sliding_window + 1) : 0;
      if (begin >= end) {
        ASSERT_EQ(m[static_cast<size_t>(r)], -INFINITY);
        ASSERT_EQ(l[static_cast<size_t>(r)], 0.0f);
        continue;
      }
      std::vector<double> p(static_cast<size_t>(end - begin));
      double top = -INFINITY, magnitude = 0, key_range = 0, value_range = 0;
      for (int64_t t = begin; t < end; ++t) {
        double sum = 0, size = 0;
        for (int i = 0; i < key_dim; ++i) {
          const double x = static_cast<double>(head.keys[static_cast<size_t>(t * key_dim + i)]);
          sum += static_cast<double>(q[i]) * x, size += std::abs(static_cast<double>(q[i]) * x);
          key_range = std::max(key_range, std::abs(x));
        }
        for (int i = 0; i < dim; ++i) {
          value_range = std::max(value_range, std::abs(static_cast<double>(head.values[static_cast<size_t>(t * dim + i)])));
        }
        double s = sum * static_cast<double>(head.scale());
        if (c.softcap > 0) s = static_cast<double>(c.softcap) * std::tanh(s / static_cast<double>(c.softcap));
        p[static_cast<size_t>(t - begin)] = s;
        top = std::max(top, s), magnitude = std::max(magnitude, size * static_cast<double>(head.scale()));
      }
      double norm = 0, p_largest = 0, p_squares = 0;
      for (double& s : p) s = std::exp(s - top), norm += s;
      const double lse = top + std::log(norm);
      std::vector<double> out(static_cast<size_t>(dim));
      for (size_t t = 0; t < p.size(); ++t) {
        p[t] /= norm, p_largest = std::max(p_largest, p[t]), p_squares += sq(p[t]);
        for (int i = 0; i < dim; ++i) {
          out[static_cast<size_t>(i)] +=
              p[t] * static_cast<double>(
                         head.values[(static_cast<size_t>(begin) + t) * static_cast<size_t>(dim) + static_cast<size_t>(i)]);
        }
      }
      double q_largest = 0, q_squares = 0, spread = 0;
      for (int i = 0; i < key_dim; ++i) {
        q_largest = std::max(q_largest, std::abs(static_cast<double>(q[i]))), q_squares += sq(static_cast<double>(q[i]));
      }
      for (size_t t = 0; t < p.size(); ++t) {
        double distance = 0;
        for (int i = 0; i < dim; ++i) {
          distance +=
              sq(static_cast<double>(
                     head.values[(static_cast<size_t>(begin) + t) * static_cast<size_t>(dim) + static_cast<size_t>(i)]) -
                 out[static_cast<size_t>(i)]);
        }
        spread += p[t] * std::sqrt(distance);
      }
      // Scores: weights are q times the key scale, which times the largest centred code is at most the range of a group.
      const bool key_fine = c.exact || c.key.bits > 4, value_fine = c.exact || c.value.bits > 4;
      const bool any_packed = std::any_of(head.refs.begin(), head.refs.end(), [](const PageRef& page) { return page.packed; });
      double score_error = 1e-5 * (magnitude + 1), out_error = 0;
      if (any_packed && std::strcmp(kernel->name, "portable") != 0) {
        const double d = std::sqrt(static_cast<double>(dim));
        if (!c.key.is_f16()) {
          score_error += 4 * weight_step(key_fine, q_largest, std::sqrt(q_squares / key_dim)) * key_range * d *
                         static_cast<double>(head.scale());
        }
        if (!c.value.is_f16()) {
          const auto n = static_cast<double>(p.size());
          out_error += 4 * weight_step(value_fine, p_largest, std::sqrt(p_squares / n)) * value_range * d * std::sqrt(n);
        }
      }
      for (size_t i = 0; i < refs.size(); ++i) {
        const float reference = references[i * rows + static_cast<size_t>(r)];
        for (int slot = 0; slot < refs[i].live; ++slot) {
          const int64_t t = refs[i].first_position + slot;
          const double exact = t >= begin && t < end ? p[static_cast<size_t>(t - begin)] : 0;
          const auto w = static_cast<double>(refs[i].weights[static_cast<ptrdiff_t>(r) * kPageTokens + slot]);
          const double scale = std::exp(static_cast<double>(reference - m[static_cast<size_t>(r)])) /
                               static_cast<double>(l[static_cast<size_t>(r)]);
          const double given = reference == -INFINITY ? 0 : w * scale;
          ASSERT_NEAR(given, exact, (std::exp(2 * score_error) - 1) * exact + 1e-6)
              << describe(c, kernel->name) << " row " << r << " position " << t;
        }
      }
      out_error += (std::exp(2 * score_error) - 1) * spread + 2e-5 * value_range * std::sqrt(static_cast<double>(dim));
      double error = 0;
      for (int i = 0; i < dim; ++i) {
        error +=
            sq(static_cast<double>(acc[static_cast<size_t>(r * dim + i)]) / static_cast<double>(l[static_cast<size_t>(r)]) -
               out[static_cast<size_t>(i)]);
      }
      ASSERT_LE(std::sqrt(error), out_error) << describe(c, kernel->name) << " row " << r;
      ASSERT_NEAR(static_cast<double>(m[static_cast<size_t>(r)]) + std::log(static_cast<double>(l[static_cast<size_t>(r)])),
                  lse, score_error)
          << describe(c, kernel->name) << " row " << r;
    }
  }
}

CodecSpec spec(int bits, Axis axis, int group, bool zero) { return {bits, axis, group, Fit::kMinMax, zero}; }

TEST(Kernels, WidthsGroupsAxesAndDims) {
  unsigned seed = 0;
  const int ratios[] = {1, 2, 3, 4, 5, 7, 8};
  for (const int dim : {32, 64, 80, 96, 128, 256}) {
    for (const int bits : {1, 2, 3, 4, 5, 6, 8}) {
      for (const int group : {32, 64, 128}) {
        for (const bool zero : {true, false}) {
          for (const Axis axis : {Axis::kChannel, Axis::kToken}) {
            Case c;
            c.key = spec(bits, axis, group, zero);
            c.value = spec(bits, axis == Axis::kChannel ? Axis::kToken : Axis::kChannel, group, zero);
            c.head_dim = dim;
            c.rows = ratios[++seed % 7];
            c.length = 560;
            c.open_tokens = 140;
            check(c, seed);
            if (HasFatalFailure()) return;
          }
        }
      }
    }
  }
}

TEST(Kernels, AnyMixOfKeyAndValueWidths) {
  unsigned seed = 1000;
  for (const int key : {1, 2, 3, 4, 5, 6, 8, 16}) {
    for (const int value : {1, 2, 3, 4, 5, 6, 8, 16}) {
      Case c;
      c.key = spec(key, Axis::kChannel, 128, true);
      c.value = spec(value, Axis::kToken, 64, true);
      c.rows = 1 + static_cast<int>(seed % 4);
      c.exact = seed % 3 == 0;
      check(c, ++seed);
      if (HasFatalFailure()) return;
    }
  }
}

// Keys of fewer channels than values, and of more.
TEST(Kernels, KeysOfAnotherWidth) {
  unsigned seed = 6000;
  for (const auto& [dim, channels] : {std::pair{64, 32}, {64, 48}, {128, 32}, {128, 80}, {256, 160}, {80, 48}, {64, 112}}) {
    for (const int bits : {1, 2, 3, 4, 8, 16}) {
      for (const Axis axis : {Axis::kChannel, Axis::kToken}) {
        Case c;
        c.key = spec(bits, axis, 64, true);
        c.value = spec(bits == 16 ? 4 : bits, Axis::kToken, 64, true);
        c.head_dim = dim, c.key_channels = channels;
        c.rows = 1 + static_cast<int>(seed % 8), c.exact = seed % 3 == 0;
        c.open_tokens = seed % 2 == 0 ? 0 : 140;
        check(c, ++seed);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST(Kernels, RaggedLengths) {
  unsigned seed = 2000;
  for (const int sinks : {0, 16}) {
    for (const int length : {0, 1, 15, 16, 17, 127, 128, 129, 143, 144, 145, 257, 3000}) {
      for (const int open : {0, 1, 128, 200}) {
        Case c;
        c.key = spec(2, Axis::kChannel, 128, true);
        c.value = spec(3, Axis::kToken, 64, true);
        c.sinks = sinks, c.length = length, c.open_tokens = open;
        check(c, ++seed);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST(Kernels, ManyQueriesAreCausal) {
  unsigned seed = 3000;
  for (const int bits : {1, 2, 3, 4, 8, 16}) {
    for (const int tokens : {2, 8, 32}) {
      Case c;
      c.key = spec(bits, Axis::kChannel, 128, true);
      c.value = spec(bits, Axis::kToken, 32, true);
      c.query_tokens = tokens, c.rows = tokens * 3, c.open_tokens = 0;
      check(c, ++seed);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(Kernels, SlidingWindowsAndSoftCaps) {
  unsigned seed = 4000;
  for (const int window : {0, 1, 100, 128, 300, 5000}) {
    for (const float cap : {0.0f, 5.0f, 50.0f}) {
      Case c;
      c.key = spec(4, Axis::kChannel, 64, true);
      c.value = spec(2, Axis::kToken, 64, false);
      c.head_dim = 128, c.rows = 8, c.query_tokens = 4;
      c.sliding_window = window, c.softcap = cap;
      check(c, ++seed);
      if (HasFatalFailure()) return;
    }
  }
}

}  // namespace
}  // namespace kvmix
