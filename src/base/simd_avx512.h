// AVX-512 vectors, as the code that is written once for several instruction sets sees them. Everything has internal linkage:
// each kernel file is compiled with its own instruction set.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace kvmix {
namespace {

struct Avx512 {
  using V = __m512;
  using Mask = __mmask16;
  static constexpr int kWidth = 16;

  // What every file that is compiled for these vectors may use (cmake/Flags.cmake).
  static bool available() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
  }

  static V zero() { return _mm512_setzero_ps(); }
  static V set1(float x) { return _mm512_set1_ps(x); }
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  static V load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static V load_i8(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  // Of n bytes, a multiple of 64.
  static uint8_t largest_byte(const uint8_t* p, size_t n) {
    __m512i top = _mm512_loadu_si512(p);
    for (size_t i = 64; i < n; i += 64) top = _mm512_max_epu8(top, _mm512_loadu_si512(p + i));
    const __m256i half = _mm256_max_epu8(_mm512_castsi512_si256(top), _mm512_extracti64x4_epi64(top, 1));
    const __m128i quarter = _mm_max_epu8(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    const __m128i flipped = _mm_xor_si128(_mm_max_epu8(quarter, _mm_srli_epi16(quarter, 8)), _mm_set1_epi8(-1));
    const __m128i words = _mm_or_si128(flipped, _mm_set1_epi16(static_cast<int16_t>(0xff00)));
    return static_cast<uint8_t>(~_mm_cvtsi128_si32(_mm_minpos_epu16(words)));
  }
  // Bytes x as the float of bits (x << shift) + base; 0 is 0.
  static V load_small_float(const uint8_t* p, int shift, uint32_t base) {
    const __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm512_castsi512_ps(_mm512_maskz_add_epi32(_mm512_test_epi32_mask(x, x),
                                                      _mm512_slli_epi32(x, static_cast<unsigned>(shift)),
                                                      _mm512_set1_epi32(static_cast<int>(base))));
  }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static V div(V a, V b) { return _mm512_div_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  // Where neither is the larger, and of numbers with a NaN, the second.
  static V max(V a, V b) { return _mm512_max_ps(a, b); }
  static V min(V a, V b) { return _mm512_min_ps(a, b); }
  static V abs(V a) { return _mm512_abs_ps(a); }

  // Lanes i with lo <= first + i < hi.
  static Mask range(int first, int lo, int hi) {
    const auto below = [first](int x) {
      const int n = x - first;
      return n <= 0 ? 0u : n >= 16 ? 0xffffu : (1u << n) - 1u;
    };
    return static_cast<Mask>(below(hi) & ~below(lo));
  }
  static Mask less(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static bool any(Mask m) { return m != 0; }
  static V select(Mask m, V yes, V no) { return _mm512_mask_blend_ps(m, no, yes); }

  static float reduce_max(V v) {
    v = max(v, _mm512_shuffle_f32x4(v, v, 0x4e));
    v = max(v, _mm512_shuffle_f32x4(v, v, 0xb1));
    v = max(v, _mm512_permute_ps(v, 0x4e));
    v = max(v, _mm512_permute_ps(v, 0xb1));
    return _mm512_cvtss_f32(v);
  }
  static float reduce_add(V v) {
    v = add(v, _mm512_shuffle_f32x4(v, v, 0x4e));
    v = add(v, _mm512_shuffle_f32x4(v, v, 0xb1));
    v = add(v, _mm512_permute_ps(v, 0x4e));
    v = add(v, _mm512_permute_ps(v, 0xb1));
    return _mm512_cvtss_f32(v);
  }

  // out[i] = the largest lane (sum of the lanes) of v[i], i < n <= 4. `out` has room for 4; those beyond n are undefined.
  static void reduce_max(const V* v, int n, float* out) {
    reduce(v, n, out, [](V a, V b) { return max(a, b); });
  }
  static void reduce_add(const V* v, int n, float* out) {
    reduce(v, n, out, [](V a, V b) { return add(a, b); });
  }
  template <class Op>
  static __m128 reduce4(V a, V b, V c, V d, Op op) {
    const __m512d x = _mm512_castps_pd(op(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    const __m512d y = _mm512_castps_pd(op(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
    V z = op(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    z = op(z, _mm512_shuffle_f32x4(z, z, 0x4e));
    return _mm512_castps512_ps128(op(z, _mm512_shuffle_f32x4(z, z, 0xb1)));
  }
  template <class Op>
  static void reduce(const V* v, int n, float* out, Op op) {
    const __m128 r = reduce4(v[0], v[n > 1 ? 1 : 0], v[n > 2 ? 2 : 0], v[n > 3 ? 3 : 0], op);
    _mm_storeu_ps(out, r);  // whole: a masked store would not forward to the load that follows
  }

  // 2^x for x <= 0, relative error 2e-7; below 2^-126 where x < -126, exactly 0 where x <= -127 or NaN.
  static V exp2(V x) {
    x = _mm512_max_ps(x, set1(-127.0f));  // the second operand if x is NaN
    const V magic = set1(12582912.0f);    // 1.5 * 2^23: the sum's low bits are round(x)
    const V t = add(x, magic);
    const V f = sub(x, sub(t, magic));
    V p = fma(set1(0.0013390863f), f, set1(0.009676032f));
    p = fma(p, f, set1(0.05550357f));
    p = fma(p, f, set1(0.24022107f));
    p = fma(p, f, set1(0.6931472f));
    p = fma(p, f, set1(1.0f));
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(t), 23)));
  }

  // Lane i of the result is the sum of a[i].
  static V transpose_sum(const V* a) {
    V b[8], c[4];
    for (int i = 0; i < 8; ++i)
      b[i] = add(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
    for (int i = 0; i < 4; ++i) {
      const __m512d lo = _mm512_castps_pd(b[2 * i]), hi = _mm512_castps_pd(b[2 * i + 1]);
      c[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi)), _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi)));
    }
    const V d0 = add(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
    const V d1 = add(_mm512_shuffle_f32x4(c[2], c[3], 0x88), _mm512_shuffle_f32x4(c[2], c[3], 0xdd));
    return add(_mm512_shuffle_f32x4(d0, d1, 0x88), _mm512_shuffle_f32x4(d0, d1, 0xdd));
  }

  // The rest is for encoders.
  static V negate(V v) { return _mm512_xor_ps(v, set1(-0.0f)); }
  static Mask both(Mask a, Mask b) { return static_cast<Mask>(a & b); }
  static __m256i to_f16(V v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static V round_f16(V v) { return _mm512_cvtph_ps(to_f16(v)); }
  static void store_f16(uint16_t* p, V v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_f16(v)); }
  // Small non-negative integers as bytes, in order.
  static void store_bytes(uint8_t* p, V v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
  }
  // Lane i of q[0..3] as the four bytes of dword i.
  static void store_quads(uint8_t* p, const V* q) {
    const __m512i low = _mm512_or_si512(_mm512_cvtps_epi32(q[0]), _mm512_slli_epi32(_mm512_cvtps_epi32(q[1]), 8));
    const __m512i high = _mm512_or_si512(_mm512_cvtps_epi32(q[2]), _mm512_slli_epi32(_mm512_cvtps_epi32(q[3]), 8));
    _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  // out[i] lane j = rows[j] lane i.
  static void transpose(const V* rows, V* out) {
    V a[16], b[16];
    for (int i = 0; i < 8; ++i) {
      a[2 * i] = _mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
      a[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
      for (int h = 0; h < 2; ++h) {
        const __m512d x = _mm512_castps_pd(a[4 * i + h]), y = _mm512_castps_pd(a[4 * i + 2 + h]);
        b[4 * i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
        b[4 * i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
      }
    }
    // b[4 i + k]: 128-bit lane l holds column 4 l + k of rows 4 i .. 4 i + 3.
    for (int k = 0; k < 4; ++k) {
      const V even0 = _mm512_shuffle_f32x4(b[k], b[4 + k], 0x88), odd0 = _mm512_shuffle_f32x4(b[k], b[4 + k], 0xdd);
      const V even1 = _mm512_shuffle_f32x4(b[8 + k], b[12 + k], 0x88), odd1 = _mm512_shuffle_f32x4(b[8 + k], b[12 + k], 0xdd);
      out[k] = _mm512_shuffle_f32x4(even0, even1, 0x88);
      out[4 + k] = _mm512_shuffle_f32x4(odd0, odd1, 0x88);
      out[8 + k] = _mm512_shuffle_f32x4(even0, even1, 0xdd);
      out[12 + k] = _mm512_shuffle_f32x4(odd0, odd1, 0xdd);
    }
  }
};

}  // namespace
}  // namespace kvmix
