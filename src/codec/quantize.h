// The arithmetic of the integer codecs: one group of values to a scale, a midpoint and codes. Every implementation (serial,
// SIMD, CUDA) follows these operations in this order and writes the same bytes. So: float throughout, no contraction into
// fused multiply-adds (-ffp-contract=off, -fmad=false), sums one element after the other, IEEE division.
//
// Sources: min-max as in KVmix b.3 (centred form: mid = min + scale * (2^b - 1) / 2); the least-squares fit alternates
// rounding and regression of the values on their codes, from several clipped ranges.
#pragma once

#include <cstdint>

#include "base/fp16.h"
#include "base/macros.h"
#include "kvmix/codec.h"

namespace kvmix {

inline constexpr int kMaxGroup = 128;

struct GroupScale {
  uint16_t scale, mid;  // fp16 bits
};

// Round to nearest even of |v| < 2^22.
KVMIX_HOST_DEVICE inline float round_even(float v) { return (v + 12582912.0f) - 12582912.0f; }

KVMIX_HOST_DEVICE inline float code_centre(int bits) { return static_cast<float>((1 << bits) - 1) * 0.5f; }

// Largest finite fp16 instead of infinity.
KVMIX_HOST_DEVICE inline uint16_t saturate_f16(float v) {
  const float limited = v > 65504.0f ? 65504.0f : (v < -65504.0f ? -65504.0f : v);
  return f32_to_f16(limited);
}

// v to 0..top.
KVMIX_HOST_DEVICE inline float limit_code(float v, float top) {
#ifdef __CUDA_ARCH__
  return fmaxf(fminf(v, top), 0.0f);
#else
  return v > top ? top : (v < 0.0f ? 0.0f : v);
#endif
}

KVMIX_HOST_DEVICE inline float quantize_code(float x, float mid, float inverse_scale, float centre, float top) {
  const float v = (x - mid) * inverse_scale + centre;
  return round_even(limit_code(v, top));
}

// Quantises x[0..n) with stored scale and mid into codes, unless null; returns the squared error. Values: float x[i].
template <class Values>
KVMIX_HOST_DEVICE inline float quantize_with(const Values& x, int n, int bits, GroupScale stored, uint8_t* codes) {
  const float scale = f16_to_f32(stored.scale), mid = f16_to_f32(stored.mid);
  const float centre = code_centre(bits), top = static_cast<float>((1 << bits) - 1);
  // A scale of zero (constant or vanishing group) leaves the midpoint alone.
  const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  float error = 0.0f;
  for (int i = 0; i < n; ++i) {
    const float code = quantize_code(x[i], mid, inverse, centre, top);
    if (codes != nullptr) codes[i] = static_cast<uint8_t>(code);
    const float delta = x[i] - (mid + scale * (code - centre));
    error = error + delta * delta;
  }
  return error;
}

// The smallest and largest of a group; of zeros, the first.
struct GroupRange {
  float low, high;
};

// x: n finite floats (1 <= n <= kMaxGroup); codes: n bytes, or null for the scale alone.
template <class Values>
KVMIX_HOST_DEVICE inline GroupScale quantize_range(const Values& x, int n, GroupRange limits, int bits, Fit fit,
                                                   bool zero_point, uint8_t* codes) {
  float low = limits.low, high = limits.high;
  if (!zero_point) {
    const float magnitude = high > -low ? high : -low;
    low = -magnitude;
    high = magnitude;
  }
  const float top = static_cast<float>((1 << bits) - 1), centre = code_centre(bits);
  const float range = high - low, middle = zero_point ? (high + low) * 0.5f : 0.0f;
  const GroupScale min_max{saturate_f16(range / top), saturate_f16(middle)};
  if (fit == Fit::kMinMax || !(range > 0.0f)) {
    if (codes != nullptr) quantize_with(x, n, bits, min_max, codes);
    return min_max;
  }

  float sum_x = 0.0f;
  for (int i = 0; i < n; ++i) sum_x = sum_x + (x[i] - middle);
  const int starts = bits <= 3 ? 3 : 2;
  GroupScale best = min_max;
  float best_error = -1.0f;
  for (int start = 0; start < starts; ++start) {
    const float clip = start == 0 ? 1.0f : (bits <= 3 ? (start == 1 ? 0.8f : 0.6f) : 0.85f);
    float scale = clip * range / top, mid = middle;
    for (int round = 0; round < 3; ++round) {
      const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
      float sum_q = 0.0f, sum_qq = 0.0f, sum_qx = 0.0f;
      for (int i = 0; i < n; ++i) {
        const float q = quantize_code(x[i], mid, inverse, centre, top) - centre;
        const float y = x[i] - middle;
        sum_q = sum_q + q;
        sum_qq = sum_qq + q * q;
        sum_qx = sum_qx + q * y;
      }
      const float count = static_cast<float>(n);
      if (zero_point) {
        const float variance = sum_qq - sum_q * sum_q / count;
        const float covariance = sum_qx - sum_q * sum_x / count;
        if (!(variance > 0.0f) || !(covariance > 0.0f)) break;
        scale = covariance / variance;
        mid = middle + (sum_x - scale * sum_q) / count;
      } else {
        if (!(sum_qq > 0.0f) || !(sum_qx > 0.0f)) break;
        scale = sum_qx / sum_qq;
      }
    }
    const GroupScale candidate{saturate_f16(scale), saturate_f16(mid)};
    const float error = quantize_with(x, n, bits, candidate, static_cast<uint8_t*>(nullptr));
    if (best_error < 0.0f || error < best_error) {
      best_error = error;
      best = candidate;
    }
  }
  if (codes != nullptr) quantize_with(x, n, bits, best, codes);
  return best;
}

KVMIX_HOST_DEVICE inline GroupScale quantize_group(const float* x, int n, int bits, Fit fit, bool zero_point, uint8_t* codes) {
  GroupRange limits{x[0], x[0]};
  for (int i = 1; i < n; ++i) {
    limits.low = x[i] < limits.low ? x[i] : limits.low;
    limits.high = x[i] > limits.high ? x[i] : limits.high;
  }
  return quantize_range(x, n, limits, bits, fit, zero_point, codes);
}

}  // namespace kvmix
