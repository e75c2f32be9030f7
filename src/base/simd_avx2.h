// AVX2 vectors: the counterpart of simd_avx512.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace kvmix {
namespace {

struct Avx2 {
  using V = __m256;
  using Mask = __m256;
  static constexpr int kWidth = 8;

  // What every file that is compiled for these vectors may use (cmake/Flags.cmake).
  static bool available() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }

  static V zero() { return _mm256_setzero_ps(); }
  static V set1(float x) { return _mm256_set1_ps(x); }
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  static V load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static V load_i8(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  // Of n bytes, a multiple of 64.
  static uint8_t largest_byte(const uint8_t* p, size_t n) {
    const auto load = [p](size_t i) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i)); };
    __m256i top = load(0);
    for (size_t i = 32; i < n; i += 32) top = _mm256_max_epu8(top, load(i));
    const __m128i quarter = _mm_max_epu8(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
    const __m128i flipped = _mm_xor_si128(_mm_max_epu8(quarter, _mm_srli_epi16(quarter, 8)), _mm_set1_epi8(-1));
    const __m128i words = _mm_or_si128(flipped, _mm_set1_epi16(static_cast<int16_t>(0xff00)));
    return static_cast<uint8_t>(~_mm_cvtsi128_si32(_mm_minpos_epu16(words)));
  }
  // Bytes x as the float of bits (x << shift) + base; 0 is 0.
  static V load_small_float(const uint8_t* p, int shift, uint32_t base) {
    const __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m256i bits =
        _mm256_add_epi32(_mm256_sll_epi32(x, _mm_cvtsi32_si128(shift)), _mm256_set1_epi32(static_cast<int>(base)));
    return _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_cmpeq_epi32(x, _mm256_setzero_si256()), bits));
  }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static V div(V a, V b) { return _mm256_div_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  // Where neither is the larger, and of numbers with a NaN, the second.
  static V max(V a, V b) { return _mm256_max_ps(a, b); }
  static V min(V a, V b) { return _mm256_min_ps(a, b); }
  static V abs(V a) { return _mm256_andnot_ps(set1(-0.0f), a); }

  static Mask range(int first, int lo, int hi) {
    const __m256i i = _mm256_add_epi32(_mm256_set1_epi32(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    const __m256i below_lo = _mm256_cmpgt_epi32(_mm256_set1_epi32(lo), i),
                  below_hi = _mm256_cmpgt_epi32(_mm256_set1_epi32(hi), i);
    return _mm256_castsi256_ps(_mm256_andnot_si256(below_lo, below_hi));
  }
  static Mask less(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
  static bool any(Mask m) { return _mm256_movemask_ps(m) != 0; }
  static V select(Mask m, V yes, V no) { return _mm256_blendv_ps(no, yes, m); }

  static float reduce_max(V v) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }
  static float reduce_add(V v) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }

  static void reduce_max(const V* v, int n, float* out) {
    for (int i = 0; i < n; ++i) out[i] = reduce_max(v[i]);
  }
  static void reduce_add(const V* v, int n, float* out) {
    for (int i = 0; i < n; ++i) out[i] = reduce_add(v[i]);
  }

  static V exp2(V x) {
    x = max(x, set1(-127.0f));          // the second operand if x is NaN
    const V magic = set1(12582912.0f);  // 1.5 * 2^23: the sum's low bits are round(x)
    const V t = add(x, magic);
    const V f = sub(x, sub(t, magic));
    V p = fma(set1(0.0013390863f), f, set1(0.009676032f));
    p = fma(p, f, set1(0.05550357f));
    p = fma(p, f, set1(0.24022107f));
    p = fma(p, f, set1(0.6931472f));
    p = fma(p, f, set1(1.0f));
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(t), 23)));
  }

  static V transpose_sum(const V* a) {
    const V b0 = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
    const V b1 = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
    return add(_mm256_permute2f128_ps(b0, b1, 0x20), _mm256_permute2f128_ps(b0, b1, 0x31));
  }

  // The rest is for encoders.
  static V negate(V v) { return _mm256_xor_ps(v, set1(-0.0f)); }
  static Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }
  static __m128i to_f16(V v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static V round_f16(V v) { return _mm256_cvtph_ps(to_f16(v)); }
  static void store_f16(uint16_t* p, V v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_f16(v)); }
  static void store_bytes(uint8_t* p, V v) {
    const __m256i i = _mm256_cvtps_epi32(v);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
  }
  static void store_quads(uint8_t* p, const V* q) {
    const __m256i low = _mm256_or_si256(_mm256_cvtps_epi32(q[0]), _mm256_slli_epi32(_mm256_cvtps_epi32(q[1]), 8));
    const __m256i high = _mm256_or_si256(_mm256_cvtps_epi32(q[2]), _mm256_slli_epi32(_mm256_cvtps_epi32(q[3]), 8));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_or_si256(low, _mm256_slli_epi32(high, 16)));
  }
  static void transpose(const V* rows, V* out) {
    V a[8], b[8];
    for (int i = 0; i < 4; ++i) {
      a[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
      a[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
      for (int h = 0; h < 2; ++h) {
        b[4 * i + 2 * h] = _mm256_shuffle_ps(a[4 * i + h], a[4 * i + 2 + h], 0x44);
        b[4 * i + 2 * h + 1] = _mm256_shuffle_ps(a[4 * i + h], a[4 * i + 2 + h], 0xee);
      }
    }
    for (int k = 0; k < 4; ++k) {
      out[k] = _mm256_permute2f128_ps(b[k], b[4 + k], 0x20);
      out[4 + k] = _mm256_permute2f128_ps(b[k], b[4 + k], 0x31);
    }
  }
};

}  // namespace
}  // namespace kvmix
