// Decode and prefill attention with int8 dot products (AVX-512 VNNI): packed codes stay in place as u8, queries and
// probabilities become s8 with their scales folded in; midpoints stay fp32. Widths above 4 bits and exact jobs use 16-bit
// weights as two s8 terms, whose rounding (2^-16 of the largest weight) lies below that of bf16.
#include "attention/expand_avx512.h"
#include "attention/page_flow.h"
#include "base/simd_avx512.h"

namespace kvmix {
namespace {

struct Vnni {
  using Simd = Avx512;
  using Weight = int8_t;
  static constexpr int kValueVectors = 4;

  static int terms(int bits, bool exact) { return exact || bits > 4 ? 2 : 1; }
  static int rows(int terms) { return terms == 1 ? 4 : 2; }

  static Prepared prepare(int terms, const float* x, const float* s, const float* mid, int n, int8_t* w,
                          ptrdiff_t term_stride) {
    if (s == nullptr)
      return terms == 1 ? prepare<1, false>(x, s, mid, n, w, term_stride) : prepare<2, false>(x, s, mid, n, w, term_stride);
    return terms == 1 ? prepare<1, true>(x, s, mid, n, w, term_stride) : prepare<2, true>(x, s, mid, n, w, term_stride);
  }

  template <int kTerms, bool kScaled>
  static Prepared prepare(const float* x, const float* s, const float* mid, int n, int8_t* w, ptrdiff_t term_stride) {
    const auto product = [&](int i) {
      return kScaled ? _mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_loadu_ps(s + i)) : _mm512_loadu_ps(x + i);
    };
    __m512 top = _mm512_setzero_ps(), middle = _mm512_setzero_ps();
    for (int i = 0; i < n; i += 16) top = _mm512_max_ps(top, _mm512_abs_ps(product(i)));
    if (!kScaled) {
      for (int i = 0; i < n; i += 16) middle = _mm512_add_ps(middle, _mm512_loadu_ps(x + i));
    } else if (mid != nullptr) {
      for (int i = 0; i < n; i += 16) middle = _mm512_fmadd_ps(_mm512_loadu_ps(x + i), _mm512_loadu_ps(mid + i), middle);
    }
    constexpr float kLevels = kTerms == 1 ? 127.0f : 127.0f * 256.0f;
    const float largest = Avx512::reduce_max(top);
    const __m512 inverse = _mm512_set1_ps(largest > 1e-30f ? kLevels / largest : 0.0f);
    __m512i sum = _mm512_setzero_si512();
    for (int i = 0; i < n; i += 16) {
      const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(product(i), inverse));
      sum = _mm512_add_epi32(sum, v);
      if constexpr (kTerms == 1) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(w + i), _mm512_cvtepi32_epi8(v));
      } else {
        const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(128)), 8);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(w + i), _mm512_cvtepi32_epi8(high));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(w + term_stride + i), _mm512_cvtepi32_epi8(v));
      }
    }
    const float scale = largest / kLevels;
    return {scale, scale * static_cast<float>(_mm512_reduce_add_epi32(sum)), Avx512::reduce_add(middle)};
  }

  // Weight rows at w + (row * terms + term) * stride; w2 serves lane blocks 2 and 3.
  using Dots = void (*)(const uint8_t* codes, int blocks, const int8_t* w, const int8_t* w2, ptrdiff_t stride, float* out,
                        ptrdiff_t out_stride, const char* ahead);

  template <int kBits, int kTerms, int kRows, int kBlocks, bool kTwoSets>
  static void dots(const uint8_t* codes, int blocks, const int8_t* w, const int8_t* w2, ptrdiff_t stride, float* out,
                   ptrdiff_t out_stride, const char* ahead) {
    constexpr int kWeightRows = kRows * kTerms, kQuads = kBlockUnits / kBlocks;
    __m512i acc[kWeightRows][4];
    for (int r = 0; r < kWeightRows; ++r)
      for (int j = 0; j < 4; ++j) acc[r][j] = _mm512_setzero_si512();
    const auto weight = [](const int8_t* p) {
      int32_t four;
      __builtin_memcpy(&four, p, 4);
      return _mm512_set1_epi32(four);
    };
    for (int b = 0; b < blocks; ++b) {
      for (int i = 0; i < kBits; ++i) __builtin_prefetch(ahead + i * kVectorBytes, 0, 2);
      __m512i e[8];
      expand_block<kBits>(codes, e);
#pragma GCC unroll 8
      for (int q = 0; q < kQuads; ++q) {
#pragma GCC unroll 4
        for (int r = 0; r < kWeightRows; ++r) {
          const __m512i x = weight(w + r * stride + 4 * q);
          const __m512i y = kTwoSets ? weight(w2 + r * stride + 4 * q) : x;
#pragma GCC unroll 4
          for (int i = 0; i < kBlocks; ++i) {
            const int f = q * kBlocks + i;
            acc[r][f % 4] = _mm512_dpbusd_epi32(acc[r][f % 4], e[f], kTwoSets && i >= 2 ? y : x);
          }
        }
      }
      codes += kBits * kVectorBytes;
      ahead += kBits * kVectorBytes;
      w += 4 * kQuads;
      w2 += 4 * kQuads;
    }
    const float factor[4] = {1.0f / field_factor<kBits>(0), 1.0f / field_factor<kBits>(1), 1.0f / field_factor<kBits>(2),
                             1.0f / field_factor<kBits>(3)};
    for (int r = 0; r < kRows; ++r) {
      __m512 total[kBlocks];
      for (int j = 0; j < 4; ++j) {
        __m512 x = _mm512_cvtepi32_ps(acc[r * kTerms][j]);
        if constexpr (kTerms == 2) {
          x = _mm512_fmadd_ps(x, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(acc[r * kTerms + 1][j]));
        }
        const __m512 y = _mm512_mul_ps(x, _mm512_set1_ps(factor[j]));
        total[j % kBlocks] = j < kBlocks ? y : _mm512_add_ps(total[j % kBlocks], y);
      }
      for (int i = 0; i < kBlocks; ++i) _mm512_storeu_ps(out + r * out_stride + i * kUnitLanes, total[i]);
    }
  }

  template <int kBits, int kTerms, int kRows>
  static Dots dots(int lane_blocks, bool two_sets) {
    switch (lane_blocks) {
      case 1:
        return dots<kBits, kTerms, kRows, 1, false>;
      case 2:
        return dots<kBits, kTerms, kRows, 2, false>;
      default:
        return two_sets ? dots<kBits, kTerms, kRows, 4, true> : dots<kBits, kTerms, kRows, 4, false>;
    }
  }

  template <int kBits>
  static Dots dots(int terms, int rows, int lane_blocks, bool two_sets) {
    if (terms == 2) return rows == 1 ? dots<kBits, 2, 1>(lane_blocks, two_sets) : dots<kBits, 2, 2>(lane_blocks, two_sets);
    if constexpr (kBits <= 4) {
      switch (rows) {
        case 1:
          return dots<kBits, 1, 1>(lane_blocks, two_sets);
        case 2:
          return dots<kBits, 1, 2>(lane_blocks, two_sets);
        case 3:
          return dots<kBits, 1, 3>(lane_blocks, two_sets);
        default:
          return dots<kBits, 1, 4>(lane_blocks, two_sets);
      }
    }
    __builtin_unreachable();  // terms(): wider codes always take two terms
  }

  static Dots dots(int bits, int terms, int rows, int lane_blocks, bool two_sets) {
    switch (bits) {
      case 1:
        return dots<1>(terms, rows, lane_blocks, two_sets);
      case 2:
        return dots<2>(terms, rows, lane_blocks, two_sets);
      case 3:
        return dots<3>(terms, rows, lane_blocks, two_sets);
      case 4:
        return dots<4>(terms, rows, lane_blocks, two_sets);
      case 5:
        return dots<5>(terms, rows, lane_blocks, two_sets);
      case 6:
        return dots<6>(terms, rows, lane_blocks, two_sets);
      default:
        return dots<8>(terms, rows, lane_blocks, two_sets);
    }
  }
};

bool available() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
}

}  // namespace

extern const AttentionKernel kAvx512VnniKernel;
const AttentionKernel kAvx512VnniKernel = {
    "avx512-vnni",
    "AVX-512 VNNI: int8 dot products on packed codes, fp32 for fp16 rows",
    available,
    Flow<Vnni>::supports,
    Flow<Vnni>::scratch_bytes,
    Flow<Vnni>::attend,
};

}  // namespace kvmix
