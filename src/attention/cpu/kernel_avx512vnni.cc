// Decode and prefill attention with int8 dot products (AVX-512 VNNI): packed codes stay in place as u8, queries and
// probabilities become s8 with their scales folded in; midpoints stay fp32. Widths above 4 bits and exact jobs use 16-bit
// weights as two s8 terms, whose rounding (2^-16 of the largest weight) lies below that of bf16.
#include "attention/cpu/expand_avx512.h"
#include "attention/cpu/page_flow.h"
#include "base/simd_avx512.h"

namespace kvmix {
namespace {

struct Vnni {
  using Simd = Avx512;
  using Weight = int8_t;
  static constexpr int kValueVectors = 4;
  template <int kBits>
  using Plain = PlainCodes<kBits>;
  template <int kBits, Side kSide>
  using Trellis = TrellisCodes<kBits, kSide>;

  static int terms(int bits, bool exact) { return exact || bits > 4 ? 2 : 1; }
  static constexpr bool takes(int bits, int terms) { return terms == 2 || bits <= 4; }
  static constexpr int rows(int terms) { return terms == 1 ? 4 : 2; }

  static void prepare(const Source& from, int n, int terms, int rows, int8_t* w, ptrdiff_t term_stride, Prepared& out) {
    if (terms == 2)
      return rows == 1 ? prepare_rows<Vnni, 2, 1>(from, n, w, term_stride, out)
                       : prepare_rows<Vnni, 2, 2>(from, n, w, term_stride, out);
    switch (rows) {
      case 1:
        return prepare_rows<Vnni, 1, 1>(from, n, w, term_stride, out);
      case 2:
        return prepare_rows<Vnni, 1, 2>(from, n, w, term_stride, out);
      case 3:
        return prepare_rows<Vnni, 1, 3>(from, n, w, term_stride, out);
      default:
        return prepare_rows<Vnni, 1, 4>(from, n, w, term_stride, out);
    }
  }

  template <int kTerms, int kRows, bool kScaled, int kLength>
  static void prepare(const Source& from, int length, int8_t* w, ptrdiff_t term_stride, Prepared& out) {
    const int n = kLength != 0 ? kLength : length;
    const auto product = [&](int r, int i) {
      const __m512 x = _mm512_loadu_ps(from.x + r * from.stride + i);
      return kScaled ? _mm512_mul_ps(x, _mm512_loadu_ps(from.scale + i)) : x;
    };
    __m512 top[kRows], middle[kRows], sums[kRows];
    for (int r = 0; r < kRows; ++r) {
      top[r] = _mm512_setzero_ps();
      for (int i = 0; i < n; i += 16) top[r] = _mm512_range_ps(top[r], product(r, i), 0x0b);  // the larger magnitude
      middle[r] = _mm512_setzero_ps();
      if (!kScaled) {
        for (int i = 0; i < n; i += 16) middle[r] = _mm512_add_ps(middle[r], _mm512_loadu_ps(from.x + r * from.stride + i));
      } else if (from.mid != nullptr) {
        for (int i = 0; i < n; i += 16)
          middle[r] = _mm512_fmadd_ps(_mm512_loadu_ps(from.x + r * from.stride + i), _mm512_loadu_ps(from.mid + i), middle[r]);
      }
    }
    constexpr float kLevels = kTerms == 1 ? 127.0f : 127.0f * 256.0f;
    alignas(16) float largest[4], inverse[4];
    Avx512::reduce_max(top, kRows, largest);
    const __m128 l = _mm_load_ps(largest);
    // Rows whose products vanish keep weights of 0.
    _mm_store_ps(inverse, _mm_maskz_div_ps(_mm_cmp_ps_mask(l, _mm_set1_ps(1e-30f), _CMP_GT_OQ), _mm_set1_ps(kLevels), l));
    // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
    const __m512 magic = _mm512_set1_ps(12582912.0f);
    const __m512i magic_bits = _mm512_castps_si512(magic);
    for (int r = 0; r < kRows; ++r) {
      const __m512 inv = _mm512_set1_ps(inverse[r]);
      int8_t* to = w + r * kTerms * term_stride;
      __m512i total = _mm512_setzero_si512();
      for (int i = 0; i < n; i += 16) {
        const __m512i v = _mm512_castps_si512(_mm512_fmadd_ps(product(r, i), inv, magic));
        total = _mm512_add_epi32(total, v);
        if constexpr (kTerms == 1) {
          _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm512_cvtepi32_epi8(v));
        } else {
          const __m512i high = _mm512_srli_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(128)), 8);
          _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm512_cvtepi32_epi8(high));
          _mm_storeu_si128(reinterpret_cast<__m128i*>(to + term_stride + i), _mm512_cvtepi32_epi8(v));
        }
      }
      total = _mm512_sub_epi32(total, _mm512_mullo_epi32(magic_bits, _mm512_set1_epi32(n / 16)));
      sums[r] = _mm512_cvtepi32_ps(total);
    }
    Avx512::reduce_add(sums, kRows, out.sum);
    Avx512::reduce_add(middle, kRows, out.mid);
    const __m128 scale = _mm_mul_ps(l, _mm_set1_ps(1.0f / kLevels));
    _mm_store_ps(out.scale, scale);
    _mm_store_ps(out.sum, _mm_mul_ps(_mm_load_ps(out.sum), scale));
  }

  template <class Codes, int kTerms, int kRows, int kBlocks, bool kTwoSets>
  static void dots(const DotJob<int8_t>& job) {
    constexpr int kBits = Codes::kBits;
    typename Codes::template Reader<kBlocks> reader;
    const uint8_t* codes = job.codes;
    const char* ahead = job.ahead;
    const int8_t *w = job.weights[0], *w2 = job.weights[1];
    const ptrdiff_t stride = job.stride;
    const int blocks = job.blocks;
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
      reader.read(codes, e);
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
    const float factor[4] = {1.0f / Codes::factor(0), 1.0f / Codes::factor(1), 1.0f / Codes::factor(2),
                             1.0f / Codes::factor(3)};
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
      for (int i = 0; i < kBlocks; ++i) {
        const int set = kTwoSets && i >= 2;
        _mm512_storeu_ps(job.out + r * job.out_stride + i * kUnitLanes,
                         _mm512_fmadd_ps(total[i], _mm512_set1_ps(job.a[set][r]), _mm512_set1_ps(job.b[set][r])));
      }
    }
  }
};

}  // namespace

extern const AttentionKernel kAvx512VnniKernel;
const AttentionKernel kAvx512VnniKernel = {
    "avx512-vnni",
    "AVX-512 VNNI: int8 dot products on packed codes, fp32 for fp16 rows",
    Avx512::available,
    Flow<Vnni>::supports,
    Flow<Vnni>::scratch_bytes,
    Flow<Vnni>::attend,
};

}  // namespace kvmix
