// Attention with AVX-512 bf16 products: codes become 128 + code exactly, queries and probabilities are rounded to bf16, sums
// are fp32. 8-bit codes, which with 128 added would not fit 8 significant bits, go as two nibbles.
#include "attention/cpu/expand_avx512.h"
#include "attention/cpu/page_flow.h"
#include "base/simd_avx512.h"

namespace kvmix {
namespace {

struct Bf16 {
  using Simd = Avx512;
  using Weight = uint16_t;  // bf16; per quad in the order 0, 2, 1, 3: even bytes of a unit pair up, then odd ones
  static constexpr int kValueVectors = 4;
  template <int kBits>
  using Plain = PlainCodes<kBits>;
  template <int kBits, Side kSide>
  using Trellis = TrellisCodes<kBits, kSide>;

  static int terms(int, bool) { return 1; }
  static constexpr bool takes(int, int terms) { return terms == 1; }
  static constexpr int rows(int) { return 4; }

  static void prepare(const Source& from, int n, int, int rows, uint16_t* w, ptrdiff_t row_stride, Prepared& out) {
    for (int r = 0; r < rows; ++r) prepare(from.x + r * from.stride, from.scale, from.mid, n, w + r * row_stride, out, r);
  }

  static void prepare(const float* x, const float* s, const float* mid, int n, uint16_t* w, Prepared& out, int row) {
    __m512 sum = _mm512_setzero_ps(), middle = _mm512_setzero_ps();
    for (int i = 0; i < n; i += 16) {
      const __m512 v = _mm512_loadu_ps(x + i);
      if (s == nullptr) middle = _mm512_add_ps(middle, v);
      if (mid != nullptr) middle = _mm512_fmadd_ps(v, _mm512_loadu_ps(mid + i), middle);
      const __m512 y = s != nullptr ? _mm512_mul_ps(v, _mm512_loadu_ps(s + i)) : v;
      const __m256i rounded = reinterpret_bits(_mm512_cvtneps_pbh(_mm512_permute_ps(y, 0xd8)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(w + i), rounded);
      sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16)));
    }
    out.scale[row] = 1.0f;
    out.sum[row] = Avx512::reduce_add(sum);
    out.mid[row] = Avx512::reduce_add(middle);
  }

  template <class Codes, int kTerms, int kRows, int kBlocks, bool kTwoSets>
  static void dots(const DotJob<uint16_t>& job) {
    constexpr int kBits = Codes::kFieldBits, kCodeVectors = Codes::kBits;
    typename Codes::template Reader<kBlocks> reader;
    const uint8_t* codes = job.codes;
    const char* ahead = job.ahead;
    const uint16_t *w = job.weights[0], *w2 = job.weights[1];
    const ptrdiff_t stride = job.stride;
    const int blocks = job.blocks;
    constexpr int kQuads = kBlockUnits / kBlocks;
    // A bf16 with exponent 2^7 whose mantissa is the field in place. Field 3 of 1 and 2 bits would reach bit 7: it goes one
    // or two bits down. `at` is where a field then starts.
    constexpr auto at = [](int j) {
      if (kBits == 1) return j;
      if (kBits == 2) return j < 3 ? 2 * j : 4;
      if (kBits == 3) return j % 2 != 0 ? 3 : 0;
      return 0;
    };
    constexpr int kCodeMask = kBits == 8 ? 15 : (1 << kBits) - 1;
    const __m512i one = _mm512_set1_epi16(0x4300);
    __m512 acc[kRows][4], high[kBits == 8 ? kRows : 1][4];
    // Sums start at -128 times the weights that they will meet.
    for (int r = 0; r < kRows; ++r) {
      float sums[2][4];
      quad_sums(w + r * stride, 4 * kQuads * blocks, sums[0]);
      if constexpr (kTwoSets) quad_sums(w2 + r * stride, 4 * kQuads * blocks, sums[1]);
      for (int j = 0; j < 4; ++j) {
        const float* of = sums[kTwoSets && j >= 2 ? 1 : 0];
        const float sum = kBlocks == 4 ? of[0] + of[1] + of[2] + of[3] : kBlocks == 2 ? of[j / 2] + of[j / 2 + 2] : of[j];
        acc[r][j] = high[kBits == 8 ? r : 0][j] = _mm512_set1_ps(-128.0f * sum);
      }
    }
    const auto weight = [](const uint16_t* p) {
      int32_t two;
      __builtin_memcpy(&two, p, 4);
      return as_bf16(_mm512_set1_epi32(two));
    };
    const auto take = [one](__m512i e, int m) {
      return as_bf16(_mm512_ternarylogic_epi32(e, _mm512_set1_epi16(static_cast<int16_t>(m)), one, 0xea));  // (e & m) | one
    };
    for (int b = 0; b < blocks; ++b) {
      for (int i = 0; i < kCodeVectors; ++i) __builtin_prefetch(ahead + i * kVectorBytes, 0, 2);
      __m512i e[8];
      reader.read(codes, e);
#pragma GCC unroll 8
      for (int q = 0; q < kQuads; ++q) {
#pragma GCC unroll 4
        for (int i = 0; i < kBlocks; ++i) {
          const int f = q * kBlocks + i, j = f % 4;
          // expand_block leaves width-4 fields in the high nibble and 1- and 2-bit fields up to bit 7.
          const int down = kBits == 4 ? (j % 2 != 0 ? 4 : 0) : kBits == 2 && j == 3 ? 2 : 0;
          const int mask = kCodeMask << at(j);
          const __m512i even = down == 0 ? e[f] : _mm512_srli_epi16(e[f], down);
          const __m512bh even_codes = take(even, mask), odd_codes = take(_mm512_srli_epi16(e[f], 8 + down), mask);
          __m512bh even_high{}, odd_high{};
          if constexpr (kBits == 8) {
            even_high = take(_mm512_srli_epi16(e[f], 4), mask);
            odd_high = take(_mm512_srli_epi16(e[f], 12), mask);
          }
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            const uint16_t* x = (kTwoSets && i >= 2 ? w2 : w) + r * stride + 4 * q;
            acc[r][j] = _mm512_dpbf16_ps(_mm512_dpbf16_ps(acc[r][j], even_codes, weight(x)), odd_codes, weight(x + 2));
            if constexpr (kBits == 8) {
              high[r][j] = _mm512_dpbf16_ps(_mm512_dpbf16_ps(high[r][j], even_high, weight(x)), odd_high, weight(x + 2));
            }
          }
        }
      }
      codes += kCodeVectors * kVectorBytes;
      ahead += kCodeVectors * kVectorBytes;
      w += 4 * kQuads;
      w2 += 4 * kQuads;
    }
    for (int r = 0; r < kRows; ++r) {
      __m512 total[kBlocks];
      for (int j = 0; j < 4; ++j) {
        __m512 y = acc[r][j];
        if constexpr (kBits == 8) y = _mm512_fmadd_ps(high[r][j], _mm512_set1_ps(16.0f), y);
        y = _mm512_mul_ps(y, _mm512_set1_ps(1.0f / static_cast<float>(1 << at(j))));
        total[j % kBlocks] = j < kBlocks ? y : _mm512_add_ps(total[j % kBlocks], y);
      }
      for (int i = 0; i < kBlocks; ++i) {
        const int set = kTwoSets && i >= 2;
        _mm512_storeu_ps(job.out + r * job.out_stride + i * kUnitLanes,
                         _mm512_fmadd_ps(total[i], _mm512_set1_ps(job.a[set][r]), _mm512_set1_ps(job.b[set][r])));
      }
    }
  }

 private:
  static __m256i reinterpret_bits(__m256bh v) {
    __m256i r;
    __builtin_memcpy(&r, &v, sizeof r);
    return r;
  }
  static __m512bh as_bf16(__m512i v) {
    __m512bh r;
    __builtin_memcpy(&r, &v, sizeof r);
    return r;
  }

  // Sums of n weights by quad % 4.
  static void quad_sums(const uint16_t* w, int n, float* sums) {
    __m512 total = _mm512_setzero_ps();
    for (int i = 0; i < n; i += 16) {
      const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + i));
      total = _mm512_add_ps(total, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)));
    }
    alignas(64) float lanes[16];
    _mm512_store_ps(lanes, total);
    for (int j = 0; j < 4; ++j) sums[j] = lanes[4 * j] + lanes[4 * j + 1] + lanes[4 * j + 2] + lanes[4 * j + 3];
  }
};

bool available() { return Avx512::available() && __builtin_cpu_supports("avx512bf16"); }

}  // namespace

extern const AttentionKernel kAvx512Bf16Kernel;
const AttentionKernel kAvx512Bf16Kernel = {
    "avx512-bf16",
    "AVX-512 BF16: bf16 products with fp32 sums on packed codes, fp32 for fp16 rows",
    available,
    Flow<Bf16>::supports,
    Flow<Bf16>::scratch_bytes,
    Flow<Bf16>::attend,
};

}  // namespace kvmix
