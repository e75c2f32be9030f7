// The flow that all x86 kernels share: for each page and block of query rows, scores, online softmax (base 2), weighted sum.
// A kernel file supplies `K`:
//   Simd       vectors of floats (simd_*.h)
//   Weight     what a query or probability becomes before it meets codes (int8, bf16)
//   kRows(terms)                          query rows per block
//   terms(bits, exact)                    Weight rows per query row: 2 = high and low part
//   prepare(terms, x, s, mid, n, w, term_stride)  rounds x * s to Weights
//   dots(bits, terms, rows, blocks, sets)         the micro-kernel: codes x Weights -> one float per lane
// Everything has internal linkage (see simd_avx512.h); K lives in an unnamed namespace.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "attention/kernel.h"
#include "codec/tile_layout.h"

namespace kvmix {
namespace {

inline constexpr int kMaxDim = 256;
inline constexpr int kMaxScales = 1024;  // of a tile: 256 x 128 elements in groups of 32
inline constexpr int kMaxBlockRows = 4;
inline constexpr int kMaxTerms = 2;
inline constexpr float kLog2e = 1.44269504088896341f;

// x * s ~ scale * (Weights); `sum` is the sum of the rounded x * s, `mid` that of x * mid.
struct Prepared {
  float scale, sum, mid;
};

// One side of a layer as the kernels walk it (tile_layout.h). Scales vary either along `reduce`, with one set per `group`
// lanes (they fold into the weights), or per lane, with one segment per `group` of reduce (they apply after the dot).
struct SidePlan {
  int bits, terms, lanes, reduce, group, sets, segments;
  bool packed, lane_scaled, zero_point;
  float centre;
  size_t scale_bytes, tile_bytes;
};

inline SidePlan side_plan(const TileFormat& f, int terms) {
  const TileGeometry g = tile_geometry(f.side, f.head_dim);
  const bool lane_scaled = (f.side == Side::kKey) == (f.spec.axis == Axis::kToken);
  const int group = f.spec.group;
  SidePlan p{};
  p.bits = f.spec.bits, p.terms = terms, p.lanes = g.lanes, p.reduce = g.reduce, p.group = group;
  p.packed = !f.spec.is_f16(), p.lane_scaled = lane_scaled, p.zero_point = f.spec.zero_point;
  p.sets = lane_scaled ? 1 : (g.lanes + group - 1) / group;
  p.segments = lane_scaled ? (g.reduce + group - 1) / group : 1;
  p.centre = 0.5f * static_cast<float>((1 << f.spec.bits) - 1);
  p.scale_bytes = f.scale_bytes, p.tile_bytes = f.bytes;
  return p;
}

template <class K>
struct Work {
  alignas(64) float key_scale[kMaxScales], key_mid[kMaxScales], value_scale[kMaxScales], value_mid[kMaxScales];
  alignas(64) typename K::Weight weights[kMaxBlockRows * kMaxTerms * kMaxScales];
  alignas(64) float raw[kMaxBlockRows * kMaxDim];
  alignas(64) float out[kMaxBlockRows * kMaxDim];
  alignas(64) float p[kMaxBlockRows * kPageTokens];
  alignas(64) float rows_f32[16 * kMaxDim];
  alignas(64) float alpha[kMaxBlockRows];
};

template <class K>
class Flow {
  using S = typename K::Simd;
  using V = typename S::V;
  using Weight = typename K::Weight;
  static constexpr int kW = S::kWidth;

 public:
  static bool supports(const AttendJob& job) {
    const int d = job.head_dim;
    if (d < 32 || d > kMaxDim || d % kUnitLanes != 0) return false;
    // A last lane group of three blocks would need its own micro-kernel; no model in use has such a head.
    return job.value.spec.is_f16() || (d / kUnitLanes) % kLaneGroupBlocks != 3;
  }

  static size_t scratch_bytes(int, int rows) { return sizeof(Work<K>) + static_cast<size_t>(rows) * kW * sizeof(float); }

  static void attend(const AttendJob& job, std::byte* scratch) {
    Flow flow(job, scratch);
    flow.run();
  }

 private:
  Flow(const AttendJob& job, std::byte* scratch)
      : job_(job),
        work_(*reinterpret_cast<Work<K>*>(scratch)),
        sums_(reinterpret_cast<float*>(scratch + sizeof(Work<K>))),
        key_(side_plan(job.key, K::terms(job.key.spec.bits, job.exact))),
        value_(side_plan(job.value, K::terms(job.value.spec.bits, job.exact))) {}

  void run() {
    for (int r = 0; r < job_.rows; ++r) {
      job_.m[r] = -INFINITY;
      S::store(sums_ + r * kW, S::zero());
    }
    for (int i = 0; i < job_.rows * job_.head_dim; i += kW) S::store(job_.acc + i, S::zero());
    const PageRef* pages = job_.pages.data();
    const size_t n = job_.pages.size();
    for (size_t i = 0; i < n; ++i) attend_page(pages[i], i + 1 < n && pages[i + 1].packed ? &pages[i + 1] : nullptr);
    for (int r = 0; r < job_.rows; ++r) {
      job_.l[r] = S::reduce_add(S::load(sums_ + r * kW));
      job_.m[r] *= 1.0f / kLog2e;
    }
  }

  void attend_page(const PageRef& page, const PageRef* next) {
    const bool packed_key = page.packed && key_.packed, packed_value = page.packed && value_.packed;
    if (packed_key) load_scales(key_, page.key, kPageTokens, work_.key_scale, work_.key_mid);
    if (packed_value) load_scales(value_, page.value, page.live, work_.value_scale, work_.value_mid);
    const int terms_key = packed_key ? key_.terms : 1, terms_value = packed_value ? value_.terms : 1;
    const int limit = K::rows(terms_key > terms_value ? terms_key : terms_value);
    const int blocks = (job_.rows + limit - 1) / limit, step = (job_.rows + blocks - 1) / blocks;
    for (int r0 = 0; r0 < job_.rows; r0 += step) {
      const int rows = job_.rows - r0 < step ? job_.rows - r0 : step;
      int lo = kPageTokens, hi = 0;
      for (int r = 0; r < rows; ++r) {
        const Range v = visible(page, job_.position[r0 + r]);
        if (v.lo < lo) lo = v.lo;
        if (v.hi > hi) hi = v.hi;
      }
      if (lo >= hi) continue;
      const float* q = job_.q + static_cast<ptrdiff_t>(r0) * job_.head_dim;
      const float factor = job_.softcap > 0 ? job_.scale : job_.scale * kLog2e;
      if (packed_key) {
        project(key_, page.key, next != nullptr ? next->key : page.key, work_.key_scale, work_.key_mid, q, job_.head_dim, rows,
                factor);
      } else {
        score_f16(reinterpret_cast<const uint16_t*>(page.key), q, rows, lo, hi, factor);
      }
      for (int r = 0; r < rows; ++r) softmax(r, r0 + r, visible(page, job_.position[r0 + r]));
      float* acc = job_.acc + static_cast<ptrdiff_t>(r0) * job_.head_dim;
      if (packed_value) {
        project(value_, page.value, next != nullptr ? next->value : page.value, work_.value_scale, work_.value_mid, work_.p,
                kPageTokens, rows, 1.0f);
        for (int r = 0; r < rows; ++r) {
          const V alpha = S::set1(work_.alpha[r]);
          float* a = acc + static_cast<ptrdiff_t>(r) * job_.head_dim;
          for (int c = 0; c < job_.head_dim; c += kW)
            S::store(a + c, S::fma(S::load(a + c), alpha, S::load(work_.out + r * kMaxDim + c)));
        }
      } else {
        add_f16(reinterpret_cast<const uint16_t*>(page.value), acc, rows, lo, hi);
      }
    }
  }

  struct Range {
    int lo, hi;
  };
  // Slots of the page that a query at `position` sees.
  Range visible(const PageRef& page, int64_t position) const {
    const int64_t end = position - page.first_position + 1;
    const int64_t begin = job_.sliding_window > 0 ? end - job_.sliding_window : 0;
    return {begin <= 0          ? 0
            : begin > page.live ? page.live
                                : static_cast<int>(begin),
            end <= 0          ? 0
            : end > page.live ? page.live
                              : static_cast<int>(end)};
  }

  // Scales of slots beyond `live` may be anything: they become 0 where they would meet a probability.
  static void load_scales(const SidePlan& plan, const std::byte* tile, int live, float* scale, float* mid) {
    const auto* s = reinterpret_cast<const uint16_t*>(tile);
    const int count = plan.lane_scaled ? plan.segments * plan.lanes : plan.sets * plan.reduce;
    const auto convert = [&](const uint16_t* from, float* to) {
      if (live == kPageTokens || plan.lane_scaled) {
        for (int i = 0; i < count; i += kW) S::store(to + i, S::load_f16(from + i));
      } else {
        for (int i = 0; i < count; i += kW)
          S::store(to + i, S::select(S::range(i % kPageTokens, 0, live), S::load_f16(from + i), S::zero()));
      }
    };
    convert(s, scale);
    if (plan.zero_point) convert(s + count, mid);
  }

  // out[r][lane] = factor * sum over reduce of x[r][reduce] * decoded(lane, reduce). `next` is the tile to prefetch.
  void project(const SidePlan& plan, const std::byte* tile, const std::byte* next, const float* scale, const float* mid,
               const float* x, ptrdiff_t x_stride, int rows, float factor) {
    for (size_t line = 0; line < plan.scale_bytes; line += 64) __builtin_prefetch(next + line, 0, 2);
    if (plan.lane_scaled) {
      project_lane_scaled(plan, tile, next, scale, mid, x, x_stride, rows, factor);
    } else {
      project_weight_scaled(plan, tile, next, scale, mid, x, x_stride, rows, factor);
    }
  }

  void project_weight_scaled(const SidePlan& plan, const std::byte* tile, const std::byte* next, const float* scale,
                             const float* mid, const float* x, ptrdiff_t x_stride, int rows, float factor) {
    const int n = plan.reduce, row_size = plan.sets * n;
    float a[kMaxBlockRows][8], b[kMaxBlockRows][8];
    for (int r = 0; r < rows; ++r) {
      for (int s = 0; s < plan.sets; ++s) {
        const Prepared w = K::prepare(plan.terms, x + r * x_stride, scale + s * n, plan.zero_point ? mid + s * n : nullptr, n,
                                      work_.weights + r * plan.terms * row_size + s * n, row_size);
        a[r][s] = w.scale * factor;
        b[r][s] = (w.mid - plan.centre * w.sum) * factor;
      }
    }
    const auto* codes = reinterpret_cast<const uint8_t*>(tile) + plan.scale_bytes;
    const char* ahead = reinterpret_cast<const char*>(next) + plan.scale_bytes;
    const int lane_blocks = plan.lanes / kUnitLanes;
    for (int first = 0; first < lane_blocks; first += kLaneGroupBlocks) {
      const int width = lane_blocks - first < kLaneGroupBlocks ? lane_blocks - first : kLaneGroupBlocks;
      const int lane = first * kUnitLanes, lanes = width * kUnitLanes;
      const int set = lane / plan.group, set2 = (lane + lanes - 1) / plan.group;
      const int blocks = width * n / (kUnitReduce * kBlockUnits);
      K::dots(plan.bits, plan.terms, rows, width, set2 != set)(codes, blocks, work_.weights + set * n, work_.weights + set2 * n,
                                                               row_size, work_.raw, kMaxDim, ahead);
      for (int r = 0; r < rows; ++r) {
        for (int i = 0; i < lanes; i += kW) {
          const int s = (lane + i) / plan.group;
          S::store(work_.out + r * kMaxDim + lane + i,
                   S::fma(S::load(work_.raw + r * kMaxDim + i), S::set1(a[r][s]), S::set1(b[r][s])));
        }
      }
      codes += blocks * plan.bits * kVectorBytes;
      ahead += blocks * plan.bits * kVectorBytes;
    }
  }

  void project_lane_scaled(const SidePlan& plan, const std::byte* tile, const std::byte* next, const float* scale,
                           const float* mid, const float* x, ptrdiff_t x_stride, int rows, float factor) {
    const int row_size = plan.reduce;
    Prepared w[kMaxBlockRows][8];
    for (int r = 0; r < rows; ++r) {
      for (int g = 0; g < plan.segments; ++g) {
        const int begin = g * plan.group, n = plan.reduce - begin < plan.group ? plan.reduce - begin : plan.group;
        w[r][g] = K::prepare(plan.terms, x + r * x_stride + begin, nullptr, nullptr, n,
                             work_.weights + r * plan.terms * row_size + begin, row_size);
      }
    }
    const auto* codes = reinterpret_cast<const uint8_t*>(tile) + plan.scale_bytes;
    const char* ahead = reinterpret_cast<const char*>(next) + plan.scale_bytes;
    const int lane_blocks = plan.lanes / kUnitLanes;
    for (int first = 0; first < lane_blocks; first += kLaneGroupBlocks) {
      const int width = lane_blocks - first < kLaneGroupBlocks ? lane_blocks - first : kLaneGroupBlocks;
      const int lane = first * kUnitLanes, lanes = width * kUnitLanes;
      const auto dots = K::dots(plan.bits, plan.terms, rows, width, false);
      for (int g = 0; g < plan.segments; ++g) {
        const int begin = g * plan.group, n = plan.reduce - begin < plan.group ? plan.reduce - begin : plan.group;
        const int blocks = width * n / (kUnitReduce * kBlockUnits);
        dots(codes, blocks, work_.weights + begin, work_.weights + begin, row_size, work_.raw, kMaxDim, ahead);
        for (int r = 0; r < rows; ++r) {
          const V a = S::set1(w[r][g].scale * factor), b = S::set1(-plan.centre * w[r][g].sum * factor);
          const V total = S::set1(w[r][g].mid * factor);
          for (int i = 0; i < lanes; i += kW) {
            float* out = work_.out + r * kMaxDim + lane + i;
            const int at = g * plan.lanes + lane + i;
            V y = S::mul(S::fma(S::load(work_.raw + r * kMaxDim + i), a, b), S::load(scale + at));
            if (plan.zero_point) y = S::fma(total, S::load(mid + at), y);
            S::store(out, g == 0 ? y : S::add(S::load(out), y));
          }
        }
        codes += blocks * plan.bits * kVectorBytes;
        ahead += blocks * plan.bits * kVectorBytes;
      }
    }
  }

  // work_.out holds the scores of block row r; leaves probabilities in work_.p, the old sums' factor in alpha.
  void softmax(int r, int row, Range v) {
    float* score = work_.out + r * kMaxDim;
    float* p = work_.p + r * kPageTokens;
    const V lowest = S::set1(-INFINITY);
    if (job_.softcap > 0) cap(score);
    V top = lowest;
    if (v.lo > 0 || v.hi < kPageTokens) {
      for (int i = 0; i < kPageTokens; i += kW)
        S::store(score + i, S::select(S::range(i, v.lo, v.hi), S::load(score + i), lowest));
    }
    for (int i = 0; i < kPageTokens; i += kW) top = S::max(top, S::load(score + i));
    const float page_max = S::reduce_max(top), old = job_.m[row];
    const float m = page_max > old ? page_max : old;
    if (m == -INFINITY) {
      for (int i = 0; i < kPageTokens; i += kW) S::store(p + i, S::zero());
      work_.alpha[r] = 1.0f;
      return;
    }
    const V shift = S::set1(m), alpha = S::exp2(S::set1(old - m));
    V sum0 = S::mul(S::load(sums_ + row * kW), alpha), sum1 = S::zero();
    for (int i = 0; i < kPageTokens; i += 2 * kW) {
      const V p0 = S::exp2(S::sub(S::load(score + i), shift)), p1 = S::exp2(S::sub(S::load(score + i + kW), shift));
      S::store(p + i, p0);
      S::store(p + i + kW, p1);
      sum0 = S::add(sum0, p0);
      sum1 = S::add(sum1, p1);
    }
    S::store(sums_ + row * kW, S::add(sum0, sum1));
    job_.m[row] = m;
    S::store(work_.raw, alpha);
    work_.alpha[r] = work_.raw[0];
  }

  // score = log2(e) * softcap * tanh(score / softcap), tanh by exp of a non-positive number.
  void cap(float* score) const {
    const V inverse = S::set1(1.0f / job_.softcap), to = S::set1(job_.softcap * kLog2e), one = S::set1(1.0f);
    for (int i = 0; i < kPageTokens; i += kW) {
      const V x = S::mul(S::load(score + i), inverse);
      const V e = S::exp2(S::mul(S::abs(x), S::set1(-2.0f * kLog2e)));
      const V t = S::div(S::sub(one, e), S::add(one, e));
      const V y = S::mul(t, to);
      S::store(score + i, S::select(S::less(x, S::zero()), S::sub(S::zero(), y), y));
    }
  }

  // Scores against fp16 rows [lo, hi) (token-major). kW tokens at a time are widened once for all query rows.
  void score_f16(const uint16_t* key, const float* q, int rows, int lo, int hi, float factor) {
    const int d = job_.head_dim;
    for (int t0 = lo / kW * kW; t0 < hi; t0 += kW) {
      for (int t = 0; t < kW; ++t) {
        float* to = work_.rows_f32 + t * d;
        if (t0 + t < hi) {
          for (int c = 0; c < d; c += kW) S::store(to + c, S::load_f16(key + static_cast<ptrdiff_t>(t0 + t) * d + c));
        } else {
          for (int c = 0; c < d; c += kW) S::store(to + c, S::zero());
        }
      }
      for (int r = 0; r < rows; ++r) {
        V a[kW];
        for (int t = 0; t < kW; ++t) a[t] = S::zero();
        for (int c = 0; c < d; c += kW) {
          const V x = S::load(q + r * d + c);
          for (int t = 0; t < kW; ++t) a[t] = S::fma(x, S::load(work_.rows_f32 + t * d + c), a[t]);
        }
        S::store(work_.out + r * kMaxDim + t0, S::mul(S::transpose_sum(a), S::set1(factor)));
      }
    }
  }

  void add_f16(const uint16_t* value, float* acc, int rows, int lo, int hi) {
    constexpr int kStep = K::kValueVectors;
    const int d = job_.head_dim;
    for (int c = 0; c < d; c += kStep * kW) {
      const bool whole = d - c >= kStep * kW;
      for (int i = 0; i < kStep && c + i * kW < d; i += whole ? kStep : 1) {
        const uint16_t* v = value + c + i * kW;
        float* a = acc + c + i * kW;
        switch (rows) {
          case 1:
            whole ? add_f16<1, kStep>(v, a, lo, hi) : add_f16<1, 1>(v, a, lo, hi);
            break;
          case 2:
            whole ? add_f16<2, kStep>(v, a, lo, hi) : add_f16<2, 1>(v, a, lo, hi);
            break;
          case 3:
            whole ? add_f16<3, kStep>(v, a, lo, hi) : add_f16<3, 1>(v, a, lo, hi);
            break;
          default:
            whole ? add_f16<4, kStep>(v, a, lo, hi) : add_f16<4, 1>(v, a, lo, hi);
            break;
        }
      }
    }
  }

  template <int kRows, int kVectors>
  void add_f16(const uint16_t* value, float* acc, int lo, int hi) {
    const int d = job_.head_dim;
    V a[kRows][kVectors];
    for (int r = 0; r < kRows; ++r)
      for (int i = 0; i < kVectors; ++i) a[r][i] = S::mul(S::load(acc + r * d + i * kW), S::set1(work_.alpha[r]));
    for (int t = lo; t < hi; ++t) {
      V v[kVectors];
      for (int i = 0; i < kVectors; ++i) v[i] = S::load_f16(value + static_cast<ptrdiff_t>(t) * d + i * kW);
      for (int r = 0; r < kRows; ++r) {
        const V p = S::set1(work_.p[r * kPageTokens + t]);
        for (int i = 0; i < kVectors; ++i) a[r][i] = S::fma(p, v[i], a[r][i]);
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int i = 0; i < kVectors; ++i) S::store(acc + r * d + i * kW, a[r][i]);
  }

  const AttendJob& job_;
  Work<K>& work_;
  float* sums_;  // [rows][kW] partial sums of exp, one per lane
  const SidePlan key_, value_;
};

}  // namespace
}  // namespace kvmix
