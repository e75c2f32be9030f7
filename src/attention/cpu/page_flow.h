// The flow that all x86 kernels share: for each page and block of query rows, scores, online softmax (base 2), weighted sum.
// A kernel file supplies `K`:
//   Simd       vectors of floats (simd_*.h)
//   Weight     what a query or probability becomes before it meets codes (int8, bf16)
//   rows(terms)                           query rows per block
//   terms(bits, exact)                    Weight rows per query row: 2 = high and low part
//   prepare(Source, n, terms, rows, w, term_stride, out)  rounds x * s of some rows to Weights
//   takes(bits, terms), dots<...>(DotJob)  micro-kernels (dots_table.h): codes x Weights -> one float a lane, times a plus b
// One class, over 500 lines: its steps share a page's scales, scores and partial sums.
// Everything has internal linkage (see simd_avx512.h); K lives in an unnamed namespace.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "attention/cpu/dots_table.h"
#include "attention/cpu/kernel.h"
#include "attention/cpu/side_plan.h"

namespace kvmix {
namespace {

inline constexpr int kRowsAhead = 16;  // fp16 rows between use and prefetch
// Pages whose scores are made before one softmax over them: independent work for the processor. Only when other query rows
// use the pages again: pages that come from memory are best walked in one direction.
inline constexpr int kBatchPages = 4;
inline constexpr float kLog2e = 1.44269504088896341f;
// Probabilities are taken against the largest score of earlier pages until one exceeds it by more than this (base 2): what
// follows need not wait for a page's maximum, and old sums are scaled only a few times.
inline constexpr float kSlack = 8.0f;

template <class K>
struct Work {
  TileScales key[kBatchPages], value[kBatchPages];
  Operand<typename K::Weight> query, probability;
  alignas(64) float out[kMaxBlockRows * kMaxDim], segment[kMaxBlockRows * kMaxDim];
  alignas(64) float p[kBatchPages][kMaxBlockRows * kPageTokens];  // scores, then probabilities
  alignas(64) float rows_f32[16 * kMaxDim];
};

template <class K>
class Flow {
  using S = typename K::Simd;
  using V = typename S::V;
  using Weight = typename K::Weight;
  static constexpr int kW = S::kWidth;

 public:
  static bool supports(const AttendJob& job) {
    const int d = job.value.width;
    for (const int width : {job.key.width, d}) {
      if (width < kLeastWidth || width > kMaxDim || width % kUnitLanes != 0) return false;
    }
    for (const CodecSpec& spec : {job.key.spec, job.value.spec}) {
      if (!spec.is_uniform() && !is_trellis(spec)) return false;
    }
    if (job.key.slots != kPageTokens || job.value.slots != kPageTokens) return false;
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
    for (int i = 0; i < job_.rows * job_.value.width; i += kW) S::store(job_.acc + i, S::zero());
    const PageRef* pages = job_.pages.data();
    const size_t n = job_.pages.size();
    const size_t batch = job_.rows > 4 * kMaxBlockRows ? kBatchPages : 1;
    for (size_t i = 0; i < n; i += batch) {
      attend_batch(pages + i, static_cast<int>(n - i < batch ? n - i : batch), static_cast<int>(n - i));
    }
    for (int r = 0; r < job_.rows; ++r) {
      job_.l[r] = S::reduce_add(S::load(sums_ + r * kW));
      job_.m[r] *= 1.0f / kLog2e;
    }
  }

  // pages[0..count) of the `left` that remain.
  void attend_batch(const PageRef* pages, int count, int left) {
    int limit = K::rows(1);
    for (int b = 0; b < count; ++b) {
      const PageRef& page = pages[b];
      if (page.packed && key_.packed) {
        limit = limit < K::rows(key_.terms) ? limit : K::rows(key_.terms);
      }
      if (page.packed && value_.packed) {
        limit = limit < K::rows(value_.terms) ? limit : K::rows(value_.terms);
      }
    }
    for (bool& loaded : scales_loaded_) loaded = false;
    const int blocks = (job_.rows + limit - 1) / limit, step = (job_.rows + blocks - 1) / blocks;
    for (int r0 = 0; r0 < job_.rows; r0 += step) {
      attend_block(pages, count, left, r0, job_.rows - r0 < step ? job_.rows - r0 : step);
    }
  }

  // Query rows r0 .. r0 + rows - 1 over a batch of pages.
  void attend_block(const PageRef* pages, int count, int left, int r0, int rows) {
    const int d = job_.key.width;
    const float* q = job_.q + static_cast<ptrdiff_t>(r0) * d;
    const float factor = job_.softcap > 0 ? job_.scale : job_.scale * kLog2e;
    Range seen[kBatchPages];  // slots that any of the rows sees
    bool any = false;
    for (int b = 0; b < count; ++b) {
      const PageRef& page = pages[b];
      seen[b] = {kPageTokens, 0};
      for (int r = 0; r < rows; ++r) {
        const Range v = visible(page, job_.position[r0 + r]);
        if (v.lo < seen[b].lo) seen[b].lo = v.lo;
        if (v.hi > seen[b].hi) seen[b].hi = v.hi;
      }
      if (seen[b].lo >= seen[b].hi) continue;
      any = true;
      if (page.packed && key_.packed) {
        const std::byte* next = b + 1 < left && pages[b + 1].packed ? pages[b + 1].key : page.key;
        // Scales are widened just before the codes behind them are read: memory is walked in one direction.
        TileScales& scales = work_.key[key_slot(b)];
        if (prepared_key_ != page.key) {
          if (!scales_loaded_[b]) load_scales(key_, page.key, kPageTokens, scales);
          prepare(key_, scales, q, d, rows, factor, work_.query);
        }
        project(key_, page.key, next, scales, work_.query, rows, work_.p[b], kPageTokens);
      } else {
        score_f16(page, q, rows, seen[b].lo, seen[b].hi, factor, work_.p[b]);
      }
    }
    if (!any) return;
    softmax(pages, count, seen, r0, rows);
    for (int b = 0; b < count; ++b) {
      if (pages[b].weights != nullptr && seen[b].lo < seen[b].hi) hand_out(pages[b], work_.p[b], r0, rows);
    }
    const int value_width = job_.value.width;
    float* acc = job_.acc + static_cast<ptrdiff_t>(r0) * value_width;
    prepared_key_ = nullptr;
    for (int b = 0; b < count; ++b) {
      const PageRef& page = pages[b];
      if (seen[b].lo >= seen[b].hi) continue;
      if (page.packed && value_.packed) {
        const std::byte* next = b + 1 < left && pages[b + 1].packed ? pages[b + 1].value : page.value;
        if (!scales_loaded_[b]) load_scales(value_, page.value, page.live, work_.value[b]);
        prepare(value_, work_.value[b], work_.p[b], kPageTokens, rows, 1.0f, work_.probability);
        // The next page's queries are rounded meanwhile: neither waits for the other.
        if (rows == job_.rows && left > 1 && pages[1].packed && key_.packed) {
          slot_ ^= 1;
          load_scales(key_, pages[1].key, kPageTokens, work_.key[slot_]);
          prepare(key_, work_.key[slot_], q, d, rows, factor, work_.query);
          prepared_key_ = pages[1].key;
        }
        project(value_, page.value, next, work_.value[b], work_.probability, rows, work_.out, kMaxDim);
        for (int r = 0; r < rows; ++r) {
          float* a = acc + static_cast<ptrdiff_t>(r) * value_width;
          for (int c = 0; c < value_width; c += kW)
            S::store(a + c, S::add(S::load(a + c), S::load(work_.out + r * kMaxDim + c)));
        }
      } else {
        add_f16(reinterpret_cast<const uint16_t*>(page.value), work_.p[b], acc, rows, seen[b].lo, seen[b].hi);
      }
      scales_loaded_[b] = true;
    }
  }

  // Where a batch's page keeps its key scales. Pages taken one by one alternate, as the next page's are read early.
  int key_slot(int b) const { return b ^ slot_; }

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
  static void load_scales(const SidePlan& plan, const std::byte* tile, int live, TileScales& to) {
    const int count = plan.lane_scaled ? plan.segments * plan.lanes : plan.sets * plan.reduce;
    const auto convert = [&](const auto& from, float* values) {
      if (live == kPageTokens || plan.lane_scaled) {
        for (int i = 0; i < count; i += kW) S::store(values + i, from(i));
      } else {
        for (int i = 0; i < count; i += kW)
          S::store(values + i, S::select(S::range(i % kPageTokens, 0, live), from(i), S::zero()));
      }
    };
    if (plan.trellis) {
      const auto* s = reinterpret_cast<const uint8_t*>(tile);
      convert([s](int i) { return S::load_small_float(s + i, kScaleShift, kScaleBase); }, to.scale);
      if (plan.offsets) load_offsets(plan, s, to.mid);
      return;
    }
    const auto* s = reinterpret_cast<const uint16_t*>(tile);
    convert([s](int i) { return S::load_f16(s + i); }, to.scale);
    if (plan.zero_point) convert([s, count](int i) { return S::load_f16(s + count + i); }, to.mid);
  }

  // Of a trellis' channels. The largest scale is that of the largest byte, whichever slots are live.
  static void load_offsets(const SidePlan& plan, const uint8_t* tile, float* offsets) {
    const int channels = plan.side == Side::kKey ? plan.reduce : plan.lanes;
    const size_t at = trellis_offsets_at(channels);
    const V unit = S::set1(trellis_scale(S::largest_byte(tile, at)));
    for (int i = 0; i < channels; i += kW) S::store(offsets + i, S::mul(S::load_i8(tile + at + i), unit));
  }

  // Rounds rows x[r * x_stride ..], times `factor`, to what meets a tile of these scales.
  void prepare(const SidePlan& plan, const TileScales& scales, const float* x, ptrdiff_t x_stride, int rows, float factor,
               Operand<Weight>& to) {
    const int count = plan.lane_scaled ? plan.segments : plan.sets;
    const int row_size = plan.lane_scaled ? plan.reduce : plan.sets * plan.reduce;
    for (int g = 0; g < count; ++g) {
      Prepared w;
      if (plan.lane_scaled) {
        const int begin = g * plan.group, n = plan.reduce - begin < plan.group ? plan.reduce - begin : plan.group;
        K::prepare({x + begin, x_stride, nullptr, nullptr}, n, plan.terms, rows, to.weights + begin, row_size, w);
        if (plan.offsets) {
          for (int r = 0; r < rows; ++r) w.mid[r] = product(x + begin + r * x_stride, scales.mid + begin, n);
        }
      } else {
        const int n = plan.reduce;
        const bool mids = plan.zero_point && !plan.offsets;
        K::prepare({x, x_stride, scales.scale + g * n, mids ? scales.mid + g * n : nullptr}, n, plan.terms, rows,
                   to.weights + g * n, row_size, w);
        for (int r = 0; r < kMaxBlockRows && !mids; ++r) w.mid[r] = plan.offsets && r < rows ? sum(x + r * x_stride, n) : 0.0f;
      }
      for (int r = 0; r < kMaxBlockRows; ++r) {
        to.a[g][r] = w.scale[r] * factor;
        to.mid[g][r] = w.mid[r] * factor;
        to.b[g][r] = (plan.lane_scaled || plan.offsets ? 0.0f : to.mid[g][r]) - plan.centre * w.sum[r] * factor;
      }
    }
  }

  static float sum(const float* x, int n) {
    V total = S::zero();
    for (int i = 0; i < n; i += kW) total = S::add(total, S::load(x + i));
    return S::reduce_add(total);
  }
  static float product(const float* x, const float* y, int n) {
    V sum = S::zero();
    for (int i = 0; i < n; i += kW) sum = S::fma(S::load(x + i), S::load(y + i), sum);
    return S::reduce_add(sum);
  }

  // out[r * out_stride + lane] = sum over reduce of (the row that x was prepared from)[reduce] * decoded(lane, reduce). `next`
  // is prefetched.
  void project(const SidePlan& plan, const std::byte* tile, const std::byte* next, const TileScales& scales,
               const Operand<Weight>& x, int rows, float* out, ptrdiff_t out_stride) {
    for (size_t line = 0; line < plan.scale_bytes; line += 64) __builtin_prefetch(next + line, 0, 2);
    const auto* codes = reinterpret_cast<const uint8_t*>(tile) + plan.scale_bytes;
    const char* ahead = reinterpret_cast<const char*>(next) + plan.scale_bytes;
    if (plan.lane_scaled) {
      project_lane_scaled(plan, codes, ahead, scales, x, rows, out, out_stride);
    } else {
      project_weight_scaled(plan, codes, ahead, x, rows, out, out_stride);
      for (int r = 0; r < rows && plan.offsets; ++r) {
        float* to = out + r * out_stride;
        const V total = S::set1(x.mid[0][r]);
        for (int i = 0; i < plan.lanes; i += kW) S::store(to + i, S::fma(total, S::load(scales.mid + i), S::load(to + i)));
      }
    }
  }

  static typename DotsTable<K>::Dots dots(const SidePlan& plan, int rows, int lane_blocks, bool two_sets) {
    return plan.trellis ? DotsTable<K>::find_trellis(plan.bits, plan.side, plan.terms, rows, lane_blocks)
                        : DotsTable<K>::find(plan.bits, plan.terms, rows, lane_blocks, two_sets);
  }

  static void project_weight_scaled(const SidePlan& plan, const uint8_t* codes, const char* ahead, const Operand<Weight>& x,
                                    int rows, float* out, ptrdiff_t out_stride) {
    const int n = plan.reduce, row_size = plan.sets * n;
    const int lane_blocks = plan.lanes / kUnitLanes;
    for (int first = 0; first < lane_blocks; first += kLaneGroupBlocks) {
      const int width = lane_blocks - first < kLaneGroupBlocks ? lane_blocks - first : kLaneGroupBlocks;
      const int lane = first * kUnitLanes, lanes = width * kUnitLanes;
      const int set = lane >> plan.group_shift, set2 = (lane + lanes - 1) >> plan.group_shift;
      const int blocks = width * n / (kUnitReduce * kBlockUnits);
      dots(plan, rows, width, set2 != set)({codes,
                                            blocks,
                                            {x.weights + set * n, x.weights + set2 * n},
                                            row_size,
                                            {x.a[set], x.a[set2]},
                                            {x.b[set], x.b[set2]},
                                            out + lane,
                                            out_stride,
                                            ahead});
      codes += blocks * plan.bits * kVectorBytes;
      ahead += blocks * plan.bits * kVectorBytes;
    }
  }

  void project_lane_scaled(const SidePlan& plan, const uint8_t* codes, const char* ahead, const TileScales& scales,
                           const Operand<Weight>& x, int rows, float* out, ptrdiff_t out_stride) {
    const int lane_blocks = plan.lanes / kUnitLanes;
    for (int first = 0; first < lane_blocks; first += kLaneGroupBlocks) {
      const int width = lane_blocks - first < kLaneGroupBlocks ? lane_blocks - first : kLaneGroupBlocks;
      const int lane = first * kUnitLanes, lanes = width * kUnitLanes;
      const auto dot_rows = dots(plan, rows, width, false);
      for (int g = 0; g < plan.segments; ++g) {
        const int begin = g * plan.group, n = plan.reduce - begin < plan.group ? plan.reduce - begin : plan.group;
        const int blocks = width * n / (kUnitReduce * kBlockUnits);
        const Weight* weights = x.weights + begin;
        float* dot = g == 0 ? out + lane : work_.segment;  // segments after the first are added to it
        const ptrdiff_t dot_stride = g == 0 ? out_stride : kMaxDim;
        dot_rows({codes, blocks, {weights, weights}, plan.reduce, {x.a[g], x.a[g]}, {x.b[g], x.b[g]}, dot, dot_stride, ahead});
        for (int r = 0; r < rows; ++r) {
          const V total = S::set1(x.mid[g][r]);
          for (int i = 0; i < lanes; i += kW) {
            float* to = out + r * out_stride + lane + i;
            const int at = g * plan.lanes + lane + i;
            V y = S::mul(S::load(dot + r * dot_stride + i), S::load(scales.scale + at));
            if (plan.zero_point) y = plan.offsets ? S::add(y, total) : S::fma(total, S::load(scales.mid + at), y);
            S::store(to, g == 0 ? y : S::add(S::load(to), y));
          }
        }
        codes += blocks * plan.bits * kVectorBytes;
        ahead += blocks * plan.bits * kVectorBytes;
      }
    }
  }

  // Turns the scores in work_.p into probabilities.
  void softmax(const PageRef* pages, int count, const Range* seen, int r0, int rows) {
    const V lowest = S::set1(-INFINITY);
    for (int r = 0; r < rows; ++r) {
      V top = lowest;
      for (int b = 0; b < count; ++b) {
        if (seen[b].lo >= seen[b].hi) continue;
        float* score = work_.p[b] + r * kPageTokens;
        if (job_.softcap > 0) cap(score);
        const Range v = visible(pages[b], job_.position[r0 + r]);
        if (v.lo > 0 || v.hi < kPageTokens) {
          for (int i = 0; i < kPageTokens; i += kW)
            S::store(score + i, S::select(S::range(i, v.lo, v.hi), S::load(score + i), lowest));
        }
        V u = S::load(score), w = S::load(score + kW);
        for (int i = 2 * kW; i < kPageTokens; i += 2 * kW) {
          u = S::max(u, S::load(score + i));
          w = S::max(w, S::load(score + i + kW));
        }
        top = S::max(top, S::max(u, w));
      }
      float* m = job_.m + r0 + r;
      if (S::any(S::less(S::set1(*m + kSlack), top))) raise(r0 + r, S::reduce_max(top));
      // A row that has seen nothing yet subtracts infinities; exp2 makes 0 of the NaN.
      const V shift = S::set1(*m);
      float* sums = sums_ + (r0 + r) * kW;
      V sum0 = S::load(sums), sum1 = S::zero();
      for (int b = 0; b < count; ++b) {
        if (seen[b].lo >= seen[b].hi) continue;
        float* p = work_.p[b] + r * kPageTokens;
        for (int i = 0; i < kPageTokens; i += 2 * kW) {
          const V p0 = S::exp2(S::sub(S::load(p + i), shift)), p1 = S::exp2(S::sub(S::load(p + i + kW), shift));
          S::store(p + i, p0);
          S::store(p + i + kW, p1);
          sum0 = S::add(sum0, p0);
          sum1 = S::add(sum1, p1);
        }
      }
      S::store(sums, S::add(sum0, sum1));
    }
  }

  // A page's probabilities, against the largest score so far.
  void hand_out(const PageRef& page, const float* p, int r0, int rows) const {
    for (int r = 0; r < rows; ++r) {
      page.reference[r0 + r] = job_.m[r0 + r] * (1.0f / kLog2e);
      float* to = page.weights + static_cast<ptrdiff_t>(r0 + r) * kPageTokens;
      for (int i = 0; i < kPageTokens; i += kW) S::store(to + i, S::load(p + r * kPageTokens + i));
    }
  }

  // The row's scores count against `m` from here on.
  void raise(int row, float m) {
    alignas(64) float change[kW];
    S::store(change, S::exp2(S::set1(job_.m[row] - m)));
    const V alpha = S::set1(change[0]);
    job_.m[row] = m;
    S::store(sums_ + row * kW, S::mul(S::load(sums_ + row * kW), alpha));
    float* acc = job_.acc + static_cast<ptrdiff_t>(row) * job_.value.width;
    for (int c = 0; c < job_.value.width; c += kW) S::store(acc + c, S::mul(S::load(acc + c), alpha));
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
  void score_f16(const PageRef& page, const float* q, int rows, int lo, int hi, float factor, float* out) {
    const auto* key = reinterpret_cast<const uint16_t*>(page.key);
    const int d = job_.key.width;
    // Pages that several blocks of rows read are near already.
    const bool cold = rows == job_.rows;
    for (int t0 = lo / kW * kW; t0 < hi; t0 += kW) {
      for (int line = 0; cold && line < kW * d * 2; line += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(key + static_cast<ptrdiff_t>(t0 + kRowsAhead) * d) + line, 0, 3);
        __builtin_prefetch(reinterpret_cast<const char*>(page.value) + static_cast<ptrdiff_t>(t0) * job_.value.width * 2 + line,
                           0, 2);
      }
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
        S::store(out + r * kPageTokens + t0, S::mul(S::transpose_sum(a), S::set1(factor)));
      }
    }
  }

  void add_f16(const uint16_t* value, const float* p, float* acc, int rows, int lo, int hi) {
    constexpr int kStep = K::kValueVectors;
    const int d = job_.value.width;
    for (int c = 0; c < d; c += kStep * kW) {
      const bool whole = d - c >= kStep * kW;
      for (int i = 0; i < kStep && c + i * kW < d; i += whole ? kStep : 1) {
        const uint16_t* v = value + c + i * kW;
        float* a = acc + c + i * kW;
        switch (rows) {
          case 1:
            whole ? add_f16<1, kStep>(v, p, a, lo, hi) : add_f16<1, 1>(v, p, a, lo, hi);
            break;
          case 2:
            whole ? add_f16<2, kStep>(v, p, a, lo, hi) : add_f16<2, 1>(v, p, a, lo, hi);
            break;
          case 3:
            whole ? add_f16<3, kStep>(v, p, a, lo, hi) : add_f16<3, 1>(v, p, a, lo, hi);
            break;
          default:
            whole ? add_f16<4, kStep>(v, p, a, lo, hi) : add_f16<4, 1>(v, p, a, lo, hi);
            break;
        }
      }
    }
  }

  template <int kRows, int kVectors>
  void add_f16(const uint16_t* value, const float* p, float* acc, int lo, int hi) {
    const int d = job_.value.width;
    V a[kRows][kVectors];
    for (int r = 0; r < kRows; ++r)
      for (int i = 0; i < kVectors; ++i) a[r][i] = S::load(acc + r * d + i * kW);
    for (int t = lo; t < hi; ++t) {
      V v[kVectors];
      for (int i = 0; i < kVectors; ++i) v[i] = S::load_f16(value + static_cast<ptrdiff_t>(t) * d + i * kW);
      for (int r = 0; r < kRows; ++r) {
        const V weight = S::set1(p[r * kPageTokens + t]);
        for (int i = 0; i < kVectors; ++i) a[r][i] = S::fma(weight, v[i], a[r][i]);
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int i = 0; i < kVectors; ++i) S::store(acc + r * d + i * kW, a[r][i]);
  }

  const AttendJob& job_;
  Work<K>& work_;
  float* sums_;  // [rows][kW] partial sums of exp, one per lane
  const SidePlan key_, value_;
  bool scales_loaded_[kBatchPages];  // of the batch in progress
  int slot_ = 0;
  const std::byte* prepared_key_ = nullptr;  // the page that work_.query is ready for
};

}  // namespace
}  // namespace kvmix
