// Fitted scales on the GPU: quantize.h's fit_scale with four threads a group, which hold their values in registers. For a file
// that is compiled without fused multiply-adds.
#pragma once

#include "base/cuda/fragments.cuh"
#include "codec/cuda/tile_layout.h"
#include "codec/quantize.h"

namespace kvmix::cuda {

// The sums of kInteger + code over a few codes give those of codes and of their squares at once: with kInteger = 301 * 2^22,
// the square of (kInteger + c) is 301 * 2^23 c + c^2 mod 2^32. So the low 23 bits add up the squares, and the rest, times
// 301^-1 mod 512, the codes, as long as neither overflows: 32 codes of up to 4 bits do not. Codes above, squares below.
__device__ inline uint32_t code_sums(uint32_t sum) {
  constexpr uint32_t kInverse = 165;
  static_assert(301 * kInverse % 512 == 1);
  return ((sum >> 23) * kInverse & 511u) << 16 | (sum & 0x7fffffu);
}

// Fits the groups of a warp: eight rows (tokens) from `line` on, or columns, kValues * kPartialSums values each from `first`
// on. Lanes 4 r .. 4 r + 3 take group r, lane j of them partial sum j's values.
template <int kValues, int row_halves>
__device__ GroupScale fit_values(const __half* tile, bool columns, int line, int first, int bits, bool unbiased) {
  constexpr uint32_t kInteger = 0x4b400000u;  // the bits of kRoundToInteger
  static_assert(kInteger == 301u << 22);
  const float top = static_cast<float>((1 << bits) - 1);
  const int lane = static_cast<int>(threadIdx.x) % 32, j = lane % kPartialSums;
  const auto all = [](auto v) {
    v += __shfl_xor_sync(~0u, v, 1);
    return v + __shfl_xor_sync(~0u, v, 2);
  };
  const uint32_t from = shared_address(columns ? tile + (first + lane) * row_halves + line
                                               : tile + (line + lane % 8) * row_halves + first + lane / 8 * 8);
  const uint32_t step = columns ? 2 * row_halves : 2;
  uint32_t x[kValues / 2];
#pragma unroll
  for (int i = 0; i < kValues / 2; i += 4) {
    uint32_t v[4];
    load_tiles(from + static_cast<uint32_t>(i * 8) * step, columns, v);
#pragma unroll
    for (int k = 0; k < 4; ++k) x[i + k] = v[k];
  }
  __half2 lows = half2_of(x[0]), highs = lows;
#pragma unroll
  for (int i = 1; i < kValues / 2; ++i) lows = __hmin2(lows, half2_of(x[i])), highs = __hmax2(highs, half2_of(x[i]));
#pragma unroll
  for (int other = 1; other < kPartialSums; other *= 2) {
    lows = __hmin2(lows, __shfl_xor_sync(~0u, lows, other)), highs = __hmax2(highs, __shfl_xor_sync(~0u, highs, other));
  }
  const float2 low = __half22float2(lows), high = __half22float2(highs);
  const CodedRange range = coded_range({fminf(low.x, low.y), fmaxf(high.x, high.y)}, true);
  float y[kValues], sum_y = 0.0f, square_y = 0.0f;
#pragma unroll
  for (int i = 0; i < kValues; i += 2) {
    const float2 pair = __half22float2(half2_of(x[i / 2]));
    y[i] = pair.x - range.middle, y[i + 1] = pair.y - range.middle;
    sum_y += y[i];
    sum_y += y[i + 1];
    if (unbiased) square_y = __fmaf_rn(y[i + 1], y[i + 1], __fmaf_rn(y[i], y[i], square_y));
  }
  return fit_scale(range, kValues * kPartialSums, bits, true, all(sum_y), all(square_y), [&](CodeMap map) {
    float product = 0.0f;
    if (bits > 4) {  // sums of wide codes, rarely wanted, in a loop of their own over the tile
      const int step = columns ? row_halves : 1;
      const __half* const mine = columns ? tile + (first + 2 * j) * row_halves + line + lane / 4
                                         : tile + (line + lane / 4) * row_halves + first + 2 * j;
      float code = 0.0f, squared = 0.0f;
#pragma unroll 1
      for (int i = 0; i < kValues; ++i) {
        const float v = __half2float(mine[(i / 2 * 2 * kPartialSums + i % 2) * step]) - range.middle;
        const float c = quantize_code(v, map, top);
        code += c;
        squared = __fmaf_rn(c, c, squared);
        product = __fmaf_rn(c, v, product);
      }
      return FitSums{all(code), all(squared), all(product)};
    }
    uint32_t squares[2] = {};
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const float raised = raised_code(y[i], map, top);
      squares[i % 2] += __float_as_uint(raised) * __float_as_uint(raised);
      product = __fmaf_rn(raised - kRoundToInteger, y[i], product);
    }
    const uint32_t sums = all(code_sums(squares[0] + squares[1]));
    return FitSums{static_cast<float>(sums >> 16), static_cast<float>(sums & 0xffffu), all(product)};
  });
}

}  // namespace kvmix::cuda
