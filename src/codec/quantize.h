// The arithmetic of the integer codecs: one group of values to a scale, a midpoint and codes. Every implementation (serial,
// SIMD, CUDA) follows these operations in this order and writes the same bytes. So: float throughout, fused multiply-adds where
// fused_multiply_add stands and nowhere else (-ffp-contract=off, -fmad=false), IEEE division. Sums of values have a fixed order
// that one lane a group and four threads a group both keep: element i belongs to partial sum (i / 2) % kPartialSums, each adds
// in turn, and the result is (0 + 1) + (2 + 3). Sums of codes are exact in any order.
//
// Sources: min-max as in KVmix b.3 (centred form: mid = min + scale * (2^b - 1) / 2); the least-squares fit takes the best of
// several clipped ranges and then alternates rounding and regression of the values on their codes.
// That regression shrinks: codes of b bits explain a share R^2 of the values' variance, and large values come back smaller by
// so much. The unbiased fit takes the scale of the regression of codes on values instead, 1 / R^2 of the other.
#pragma once

#include <cmath>
#include <cstdint>

#include "base/fp16.h"
#include "base/macros.h"
#include "kvmix/codec.h"

namespace kvmix {

inline constexpr int kMaxGroup = 128, kPartialSums = 4;

struct GroupScale {
  uint16_t scale, mid;  // fp16 bits
};

KVMIX_HOST_DEVICE inline float code_centre(int bits) { return static_cast<float>((1 << bits) - 1) * 0.5f; }

// Largest finite fp16 instead of infinity.
KVMIX_HOST_DEVICE inline uint16_t saturate_f16(float v) {
  const float limited = v > 65504.0f ? 65504.0f : (v < -65504.0f ? -65504.0f : v);
  return f32_to_f16(limited);
}

KVMIX_HOST_DEVICE inline float fused_multiply_add(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

// a * b + c, limited to 0..1.
KVMIX_HOST_DEVICE inline float unit_multiply_add(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  float v;
  asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(v) : "f"(a), "f"(b), "f"(c));
  return v;
#else
  const float v = std::fma(a, b, c);
  return v > 1.0f ? 1.0f : (v < 0.0f ? 0.0f : v);
#endif
}

// A value's code is top * (factor * x + offset), limited and rounded to the nearest, ties to even.
struct CodeMap {
  float factor, offset;
};
// A scale of zero (constant or vanishing group) leaves the midpoint alone.
KVMIX_HOST_DEVICE inline CodeMap code_map(float scale, float mid, float top) {
  const float factor = scale > 0.0f ? 1.0f / (scale * top) : 0.0f;
  return {factor, 0.5f - mid * factor};
}

inline constexpr float kRoundToInteger = 12582912.0f;  // 1.5 * 2^23: added, it leaves an integer in the last bits

// The code, with kRoundToInteger added: it stands in the last bits.
KVMIX_HOST_DEVICE inline float raised_code(float x, CodeMap map, float top) {
  return fused_multiply_add(unit_multiply_add(x, map.factor, map.offset), top, kRoundToInteger);
}
KVMIX_HOST_DEVICE inline float quantize_code(float x, CodeMap map, float top) {
  return raised_code(x, map, top) - kRoundToInteger;
}

// The smallest and largest of a group.
struct GroupRange {
  float low, high;
};

// The range as it is coded: symmetric without a zero point. Adding zero makes a zero positive, whichever zero came first.
struct CodedRange {
  float range, middle;
};
KVMIX_HOST_DEVICE inline CodedRange coded_range(GroupRange limits, bool zero_point) {
  if (zero_point) return {(limits.high - limits.low) + 0.0f, (limits.high + limits.low) * 0.5f + 0.0f};
  const float magnitude = limits.high > -limits.low ? limits.high : -limits.low;
  return {(magnitude + magnitude) + 0.0f, 0.0f};
}
KVMIX_HOST_DEVICE inline GroupScale min_max_scale(CodedRange r, float top) {
  return {saturate_f16(r.range / top), saturate_f16(r.middle)};
}

// Sums over a group of codes c and values y less the range's middle.
struct FitSums {
  float code, code_squared, product;
};

// The fit starts from clipped ranges, this many times as steep as the whole one, and takes so many rounds of regression from
// the best of them.
inline constexpr int kFitStarts = 3;
KVMIX_HOST_DEVICE constexpr int fit_rounds(int bits) { return bits <= 3 ? 3 : 2; }
KVMIX_HOST_DEVICE constexpr float fit_start(int bits, int start) {
  if (bits <= 3) return start == 0 ? 1.075f : (start == 1 ? 1.3f : 1.6f);
  return start == 0 ? 1.0f : (start == 1 ? 1.09f : 1.19f);
}

// n times the covariance of codes and values, n times the variance of codes, and the mean code, of the codes that explain most
// of the values so far: covariance^2 / variance is what the regression on them takes from the sum of squares.
struct FitState {
  float covariance, variance, mean;
};
KVMIX_HOST_DEVICE inline void regress(const FitSums& s, float sum_y, float count, float share, float centre, bool zero_point,
                                      FitState& best) {
  const float mean = s.code * share;
  const float variance =
      zero_point ? s.code_squared - s.code * mean : (s.code_squared - (centre + centre) * s.code) + count * (centre * centre);
  const float covariance = zero_point ? s.product - mean * sum_y : s.product - centre * sum_y;
  const bool better = variance > 0.0f && covariance > 0.0f &&
                      (covariance * covariance) * best.variance > (best.covariance * best.covariance) * variance;
  if (better) best = {covariance, variance, mean};
}

// Fits n values of a range; sums(map) sums their codes under a map of y, sum_y is the sum of y, square_y that of their squares
// for an unbiased fit and 0 for one of least squares. The line y = mid + scale (c -
// centre) through the means has scale covariance / variance, and as a map of y the factor 1 / (scale top).
#ifdef __CUDACC__
#pragma nv_exec_check_disable  // `sums` is the host's or the device's, as the caller
#endif
template <class Sums>
KVMIX_HOST_DEVICE inline GroupScale fit_scale(CodedRange r, int n, int bits, bool zero_point, float sum_y, float square_y,
                                              const Sums& sums) {
  const float top = static_cast<float>((1 << bits) - 1), centre = code_centre(bits), count = static_cast<float>(n);
  const float share = 1.0f / count, unit = 1.0f / top, mean_y = sum_y * share;
  const float whole = r.range > 0.0f ? 1.0f / r.range : 0.0f;
  FitState best{0.0f, 1.0f, 0.0f};
  for (int start = 0; start < kFitStarts; ++start) {
    regress(sums(CodeMap{whole * fit_start(bits, start), 0.5f}), sum_y, count, share, centre, zero_point, best);
  }
  for (int round = 0; round < fit_rounds(bits); ++round) {
    const float factor = best.covariance > 0.0f ? best.variance / (best.covariance * top) : 0.0f;
    const float offset = zero_point ? best.mean * unit - mean_y * factor : 0.5f;
    regress(sums(CodeMap{factor, offset}), sum_y, count, share, centre, zero_point, best);
  }
  if (!(best.covariance > 0.0f)) return min_max_scale(r, top);
  const float spread = zero_point ? square_y - mean_y * sum_y : square_y;
  const float scale = spread > 0.0f ? spread / best.covariance : best.covariance / best.variance;
  const float mid = zero_point ? mean_y - scale * (best.mean - centre) : 0.0f;
  return {saturate_f16(scale), saturate_f16(r.middle + mid)};
}

// x: n finite floats (1 <= n <= kMaxGroup); codes: n bytes.
inline GroupScale quantize_group(const float* x, int n, int bits, Fit fit, bool zero_point, uint8_t* codes) {
  GroupRange limits{x[0], x[0]};
  for (int i = 1; i < n; ++i) {
    limits.low = x[i] < limits.low ? x[i] : limits.low;
    limits.high = x[i] > limits.high ? x[i] : limits.high;
  }
  const float top = static_cast<float>((1 << bits) - 1);
  const CodedRange range = coded_range(limits, zero_point);
  GroupScale stored = min_max_scale(range, top);
  if (fit != Fit::kMinMax) {
    const auto all = [](const float(&p)[kPartialSums]) { return (p[0] + p[1]) + (p[2] + p[3]); };
    float y[kMaxGroup], sum_y[kPartialSums] = {}, square_y[kPartialSums] = {};
    for (int i = 0; i < n; ++i) {
      y[i] = x[i] - range.middle;
      sum_y[i / 2 % kPartialSums] += y[i];
      if (fit == Fit::kUnbiased)
        square_y[i / 2 % kPartialSums] = fused_multiply_add(y[i], y[i], square_y[i / 2 % kPartialSums]);
    }
    stored = fit_scale(range, n, bits, zero_point, all(sum_y), all(square_y), [&](CodeMap map) {
      float code = 0.0f, squared = 0.0f, product[kPartialSums] = {};
      for (int i = 0; i < n; ++i) {
        const float c = quantize_code(y[i], map, top);
        code += c;
        squared += c * c;
        product[i / 2 % kPartialSums] = fused_multiply_add(c, y[i], product[i / 2 % kPartialSums]);
      }
      return FitSums{code, squared, all(product)};
    });
  }
  const CodeMap map = code_map(f16_to_f32(stored.scale), f16_to_f32(stored.mid), top);
  for (int i = 0; i < n; ++i) codes[i] = static_cast<uint8_t>(quantize_code(x[i], map, top));
  return stored;
}

}  // namespace kvmix
