// AVX-512 vectors for page_flow.h. Everything has internal linkage: each kernel file is compiled with its own instruction set.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace kvmix {
namespace {

struct Avx512 {
  using V = __m512;
  using Mask = __mmask16;
  static constexpr int kWidth = 16;

  static V zero() { return _mm512_setzero_ps(); }
  static V set1(float x) { return _mm512_set1_ps(x); }
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  static V load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static V div(V a, V b) { return _mm512_div_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V max(V a, V b) { return _mm512_max_ps(a, b); }
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

  // 2^x for x <= 0, relative error 2e-7; exactly 0 below -126.
  static V exp2(V x) {
    const V magic = set1(12582912.0f);  // 1.5 * 2^23: the sum's low bits are round(x)
    const V t = add(x, magic);
    const V f = sub(x, sub(t, magic));
    V p = fma(set1(0.0013390863f), f, set1(0.009676032f));
    p = fma(p, f, set1(0.05550357f));
    p = fma(p, f, set1(0.24022107f));
    p = fma(p, f, set1(0.6931472f));
    p = fma(p, f, set1(1.0f));
    const __m512i scaled = _mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(t), 23));
    return _mm512_castsi512_ps(_mm512_maskz_mov_epi32(_mm512_cmp_ps_mask(x, set1(-126.0f), _CMP_GE_OQ), scaled));
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
};

// The 8 fields of a block of 512 codes, one vector each, as u8 code * field_factor(bits, field % 4). In place where the width
// allows: one AND a field.
template <int kBits>
constexpr int field_factor(int j) {
  return kBits == 1   ? 1 << j
         : kBits == 2 ? 1 << (2 * j)
         : kBits == 3 ? (j % 2 != 0 ? 8 : 1)
         : kBits == 4 ? (j % 2 != 0 ? 16 : 1)
                      : 1;
}

template <int kBits>
inline void expand_block(const uint8_t* codes, __m512i (&e)[8]) {
  const auto vec = [codes](int i) { return _mm512_loadu_si512(codes + i * 64); };
  const auto mask = [](int m) { return _mm512_set1_epi8(static_cast<char>(m)); };
  const auto take = [&mask](__m512i v, int m) { return _mm512_and_si512(v, mask(m)); };
  // Bits of `high` where m is set, of `low` elsewhere.
  const auto merge = [](__m512i low, __m512i high, __m512i m) { return _mm512_ternarylogic_epi32(m, high, low, 0xca); };
  if constexpr (kBits == 1) {
    const __m512i v = vec(0), u = _mm512_srli_epi16(v, 4);
    for (int j = 0; j < 4; ++j) {
      e[j] = take(v, 1 << j);
      e[4 + j] = take(u, 1 << j);
    }
  } else if constexpr (kBits == 2) {
    for (int f = 0; f < 8; ++f) e[f] = take(vec(f / 4), 3 << (2 * (f % 4)));
  } else if constexpr (kBits == 3) {
    const __m512i a = vec(0), b = vec(1), c = vec(2);
    const __m512i low = merge(_mm512_srli_epi16(a, 6), _mm512_srli_epi16(b, 4), mask(0x0c));
    const __m512i rest = merge(low, _mm512_srli_epi16(c, 2), mask(0x30));
    e[0] = take(a, 7), e[1] = take(a, 56), e[2] = take(b, 7), e[3] = take(b, 56);
    e[4] = take(c, 7), e[5] = take(c, 56), e[6] = take(rest, 7), e[7] = take(rest, 56);
  } else if constexpr (kBits == 4) {
    for (int f = 0; f < 8; ++f) e[f] = take(vec(f / 2), f % 2 != 0 ? 0xf0 : 0x0f);
  } else if constexpr (kBits == 5 || kBits == 6) {
    for (int f = 0; f < 8; ++f) {
      const __m512i v = vec(f / 2), low = f % 2 != 0 ? _mm512_srli_epi16(v, 4) : v;
      const int bit = kBits == 5 ? f : 2 * (f % 4);
      const __m512i u = kBits == 5 ? vec(4) : vec(4 + f / 4);
      const __m512i high = bit < 4 ? _mm512_slli_epi16(u, 4 - bit) : _mm512_srli_epi16(u, bit - 4);
      e[f] = _mm512_and_si512(merge(low, high, mask(kBits == 5 ? 0x10 : 0x30)), mask(kBits == 5 ? 0x1f : 0x3f));
    }
  } else {
    for (int f = 0; f < 8; ++f) e[f] = vec(f);
  }
}

}  // namespace
}  // namespace kvmix
