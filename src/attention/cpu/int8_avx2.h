// int8 products with 256-bit vectors, on codes shifted down to 0..2^bits - 1: what kernel_avx2.cc and kernel_avxvnni.cc share.
// Widths above 4 bits and exact jobs use weights of two s8 terms.
#pragma once

#include "attention/cpu/page_flow.h"
#include "base/simd_avx2.h"

namespace kvmix {
namespace {

// Which codes a pass over a tile takes: 8-bit codes are split where 255 * 127 would saturate a 16-bit lane.
enum class Part { kWhole, kLowNibble, kHighNibble };

// `Dot` multiplies codes (u8) and weights (s8) and sums them:
//   kWholeBytes       takes 8-bit codes at once
//   run(largest)      blocks whose sums of codes up to `largest` it holds without saturation
//   add(sum, codes, weights), widen(sum): to eight 32-bit sums
// Codes of the uniform family, as they are; of 8 bits a nibble at a time where `Dot` does not take them whole.
template <int kCodeBits, Part kPart = Part::kWhole>
struct PlainAvx2 {
  static constexpr int kBits = kCodeBits, kLargest = kPart != Part::kWhole ? 15 : (1 << kBits) - 1;
  static constexpr Part kCodePart = kPart;
  static constexpr bool kTwoSets = true, kFewBlocks = true;
  template <Part kOther>
  using Of = PlainAvx2<kBits, kOther>;

  // Fields kFirst..kLast - 1 of every quad of a block, of one half of the lanes.
  template <int kBlocks, int kFirst, int kLast>
  struct Reader {
    // For the quad that begins with field f.
    void begin(const uint8_t*, int) {}
    __m256i read(const uint8_t* codes, int f, int) const { return field(codes, f); }
  };

  // Field f of a block for the 8 lanes of one half, shifted down to 0..2^bits - 1.
  static __m256i field(const uint8_t* codes, int f) {
    const auto vec = [codes](int i) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i * kVectorBytes)); };
    const auto down = [](__m256i v, int shift, int mask) {
      return _mm256_and_si256(shift == 0 ? v : _mm256_srli_epi16(v, shift), _mm256_set1_epi8(static_cast<char>(mask)));
    };
    const auto up = [](__m256i v, int shift, int mask) {
      return _mm256_and_si256(shift >= 0 ? _mm256_slli_epi16(v, shift) : _mm256_srli_epi16(v, -shift),
                              _mm256_set1_epi8(static_cast<char>(mask)));
    };
    if constexpr (kBits == 1) return down(vec(0), f, 1);
    if constexpr (kBits == 2) return down(vec(f / 4), 2 * (f % 4), 3);
    if constexpr (kBits == 3) {
      if (f < 6) return down(vec(f / 2), 3 * (f % 2), 7);
      if (f == 6) return _mm256_or_si256(down(vec(0), 6, 3), up(vec(1), -4, 4));
      return _mm256_or_si256(down(vec(1), 7, 1), up(vec(2), -5, 6));
    }
    if constexpr (kBits == 4) return down(vec(f / 2), 4 * (f % 2), 15);
    if constexpr (kBits == 5) return _mm256_or_si256(down(vec(f / 2), 4 * (f % 2), 15), up(vec(4), 4 - f, 16));
    if constexpr (kBits == 6)
      return _mm256_or_si256(down(vec(f / 2), 4 * (f % 2), 15), up(vec(4 + f / 4), 4 - 2 * (f % 4), 48));
    static_assert(kBits != 7 && kBits <= 8);
    if constexpr (kPart == Part::kWhole) return vec(f);
    return down(vec(f), kPart == Part::kHighNibble ? 4 : 0, 15);
  }
};

// Codes of the trellis family: the level of a field's window (chain_token). Of keys a chain runs through the four lane blocks
// and then on by a lane; of values through the quads.
template <int kCodeBits, Side kSide>
struct TrellisAvx2 {
  static constexpr int kBits = kCodeBits, kLargest = (1 << kLevelBits) - 1;
  static constexpr Part kCodePart = Part::kWhole;
  static constexpr bool kTwoSets = false, kFewBlocks = kSide == Side::kValue;
  static constexpr const TrellisCode& kCode = trellis_code(kBits);
  template <Part>
  using Of = TrellisAvx2;

  template <int kBlocks, int kFirst, int kLast>
  struct Reader {
    __m256i window[kSide == Side::kKey ? 1 : kLaneGroupBlocks] = {};

    void begin(const uint8_t* codes, int f) {
      if constexpr (kSide == Side::kKey) {
        static_assert(kBlocks == 4);
        const auto code = [&](int i) { return PlainAvx2<kBits>::field(codes, f + i); };
        __m256i before = code(3);
        if constexpr (kBits == 3) before = then(code(2), before);
        if constexpr (kBits == 2) before = then(then(code(1), code(2)), before);
        const __m256i lane_before = _mm256_permutevar8x32_epi32(before, _mm256_setr_epi32(0, 0, 1, 2, 3, 4, 5, 6));
        window[0] = _mm256_blend_epi32(lane_before, _mm256_setzero_si256(), 1);
        for (int i = 0; i < kFirst; ++i) window[0] = then(window[0], code(i));
      }
    }
    __m256i read(const uint8_t* codes, int f, int i) {
      __m256i& w = window[kSide == Side::kKey ? 0 : i];
      w = then(w, PlainAvx2<kBits>::field(codes, f));
      return level(w);
    }
  };

  // The window that a code makes of the one before.
  static __m256i then(__m256i w, __m256i code) {
    const __m256i shifted = _mm256_and_si256(_mm256_slli_epi16(w, kBits), _mm256_set1_epi8(static_cast<char>(0xff << kBits)));
    return _mm256_or_si256(shifted, code);
  }
  template <int kTimes>
  static __m256i times(__m256i x) {
    if constexpr (kTimes == 1) {
      return x;
    } else {
      const __m256i half = times<kTimes / 2>(x), twice = _mm256_add_epi8(half, half);
      return kTimes % 2 != 0 ? _mm256_add_epi8(twice, x) : twice;
    }
  }
  // (a low + b high) % 16 of the halves of w.
  template <int kLow, int kHigh>
  static __m256i index(__m256i low, __m256i high) {
    __m256i x;
    if constexpr (kHigh == 0) {
      x = times<kLow>(low);
    } else if constexpr (kLow == 0) {
      x = times<kHigh>(high);
    } else {
      x = _mm256_add_epi8(times<kLow>(low), times<kHigh>(high));
    }
    return _mm256_and_si256(x, _mm256_set1_epi8(15));
  }
  static __m256i table(const uint8_t* bytes) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  }
  // The first table's bytes say in their highest bit which second one goes with them.
  static constexpr auto kFirstTable = [] {
    std::array<uint8_t, 16> bytes{};
    for (size_t i = 0; i < 16; ++i) bytes[i] = static_cast<uint8_t>(kCode.a[i] | ((kCode.outer >> i) & 1) << 7);
    return bytes;
  }();
  static __m256i level(__m256i w) {
    const __m256i high = _mm256_srli_epi16(w, 4);  // of its bytes the low halves
    const __m256i a = _mm256_shuffle_epi8(table(kFirstTable.data()), index<kCode.first[0], kCode.first[1]>(w, high));
    const __m256i at = index<kCode.second[0], kCode.second[1]>(w, high);
    const __m256i b =
        _mm256_blendv_epi8(_mm256_shuffle_epi8(table(kCode.b[0]), at), _mm256_shuffle_epi8(table(kCode.b[1]), at), a);
    return _mm256_and_si256(_mm256_add_epi8(a, b), _mm256_set1_epi8(kLargest));
  }
};

template <class Dot>
struct Int8Avx2 {
  using Simd = Avx2;
  using Weight = int8_t;
  static constexpr int kValueVectors = 4;
  template <int kBits>
  using Plain = PlainAvx2<kBits>;
  template <int kBits, Side kSide>
  using Trellis = TrellisAvx2<kBits, kSide>;

  static int terms(int bits, bool exact) { return exact || bits > 4 ? 2 : 1; }
  static constexpr bool takes(int bits, int terms) { return terms == 2 || bits <= 4; }
  static constexpr int rows(int terms) { return terms == 1 ? 3 : 1; }

  static void prepare(const Source& from, int n, int terms, int rows, int8_t* w, ptrdiff_t term_stride, Prepared& out) {
    if (terms == 2) return prepare_rows<Int8Avx2, 2, 1>(from, n, w, term_stride, out);
    switch (rows) {
      case 1:
        return prepare_rows<Int8Avx2, 1, 1>(from, n, w, term_stride, out);
      case 2:
        return prepare_rows<Int8Avx2, 1, 2>(from, n, w, term_stride, out);
      default:
        return prepare_rows<Int8Avx2, 1, 3>(from, n, w, term_stride, out);
    }
  }

  // The length is a multiple of 16. A row's numbers do not depend on how many others there are.
  template <int kTerms, int kRows, bool kScaled, int kLength>
  static void prepare(const Source& from, int length, int8_t* w, ptrdiff_t term_stride, Prepared& out) {
    const int n = kLength != 0 ? kLength : length;
    const auto row = [&](int r) { return from.x + r * from.stride; };
    const auto product = [&](int r, int i) {
      return kScaled ? Avx2::mul(Avx2::load(row(r) + i), Avx2::load(from.scale + i)) : Avx2::load(row(r) + i);
    };
    // Sums are two each, so that no chain of additions is waited for.
    __m256 top[kRows], middle[kRows][2];
    for (int r = 0; r < kRows; ++r) top[r] = middle[r][0] = middle[r][1] = Avx2::zero();
    for (int i = 0; i < n; i += 16) {
      for (int k = 0; k < 2; ++k) {
        const int at = i + 8 * k;
        for (int r = 0; r < kRows; ++r) {
          top[r] = Avx2::max(top[r], Avx2::abs(product(r, at)));
          if (!kScaled) {
            middle[r][k] = Avx2::add(middle[r][k], Avx2::load(row(r) + at));
          } else if (from.mid != nullptr) {
            middle[r][k] = Avx2::fma(Avx2::load(row(r) + at), Avx2::load(from.mid + at), middle[r][k]);
          }
        }
      }
    }
    constexpr float kLevels = kTerms == 1 ? 127.0f : 127.0f * 256.0f;
    const __m128 largest = over_rows<kRows>([&](int r) { return top[r]; }, [](__m128 a, __m128 b) { return _mm_max_ps(a, b); });
    // Rows whose products vanish keep weights of 0.
    alignas(16) float inverse[4];
    _mm_store_ps(inverse, _mm_and_ps(_mm_cmpgt_ps(largest, _mm_set1_ps(1e-30f)), _mm_div_ps(_mm_set1_ps(kLevels), largest)));
    __m256i sums[kRows];
    for (int r = 0; r < kRows; ++r) {
      const __m256 by = Avx2::set1(inverse[r]);
      const auto rounded = [&](int i) { return _mm256_cvtps_epi32(Avx2::mul(product(r, i), by)); };
      sums[r] = kTerms == 1 ? store_bytes(n, w + r * term_stride, rounded)
                            : store_two(n, w + 2 * r * term_stride, term_stride, rounded);
    }
    const __m128i sum = _mm_castps_si128(over_rows<kRows>(
        [&](int r) { return _mm256_castsi256_ps(sums[r]); },
        [](__m128 a, __m128 b) { return _mm_castsi128_ps(_mm_add_epi32(_mm_castps_si128(a), _mm_castps_si128(b))); }));
    const __m128 scale = _mm_div_ps(largest, _mm_set1_ps(kLevels));
    _mm_store_ps(out.scale, scale);
    _mm_store_ps(out.sum, _mm_mul_ps(scale, _mm_cvtepi32_ps(sum)));
    _mm_store_ps(out.mid, over_rows<kRows>([&](int r) { return Avx2::add(middle[r][0], middle[r][1]); },
                                           [](__m128 a, __m128 b) { return _mm_add_ps(a, b); }));
  }

  template <class Codes, int kTerms, int kRows, int kBlocks, bool kTwoSets>
  static void dots(const DotJob<int8_t>& job) {
    if constexpr (Codes::kBits == 8 && !Dot::kWholeBytes) {
      pass<typename Codes::template Of<Part::kLowNibble>, kTerms, kRows, kBlocks, kTwoSets>(job);
      pass<typename Codes::template Of<Part::kHighNibble>, kTerms, kRows, kBlocks, kTwoSets>(job);
    } else {
      pass<Codes, kTerms, kRows, kBlocks, kTwoSets>(job);
    }
  }

 private:
  // Two packed vectors of 8 numbers, as bytes in order.
  static void store_low(int8_t* to, __m256i packed) {
    const __m256i words = _mm256_permute4x64_epi64(packed, 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
  }

  // Element r is the reduction of lanes(r), r < kRows; the rest is undefined.
  template <int kRows, class Lanes, class Op>
  static __m128 over_rows(const Lanes& lanes, const Op& op) {
    const auto half = [&](int r) {
      const __m256 v = lanes(r < kRows ? r : 0);
      return op(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    };
    if constexpr (kRows == 1) {
      __m128 x = half(0);
      x = op(x, _mm_movehl_ps(x, x));
      return op(x, _mm_movehdup_ps(x));
    } else {
      const __m128 a = half(0), b = half(1), c = half(2), d = kRows > 3 ? half(3) : c;
      const __m128 x = op(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b)), y = op(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
      return op(_mm_movelh_ps(x, y), _mm_movehl_ps(y, x));
    }
  }

  // Weights of one row, as one term and as two; returns sums of them.
  template <class Rounded>
  static __m256i store_bytes(int n, int8_t* w, const Rounded& rounded) {
    __m256i pairs = _mm256_setzero_si256();  // sums of at most 256 / 16 weights in 16 bits
    int i = 0;
    for (; i + 32 <= n; i += 32) {
      const __m256i words0 = _mm256_packs_epi32(rounded(i), rounded(i + 8)),
                    words1 = _mm256_packs_epi32(rounded(i + 16), rounded(i + 24));
      const __m256i bytes =
          _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words0, words1), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(w + i), bytes);
      pairs = _mm256_add_epi16(pairs, _mm256_add_epi16(words0, words1));
    }
    if (i < n) {
      const __m256i words = _mm256_packs_epi32(rounded(i), rounded(i + 8));
      store_low(w + i, words);
      pairs = _mm256_add_epi16(pairs, words);
    }
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
  template <class Rounded>
  static __m256i store_two(int n, int8_t* w, ptrdiff_t term_stride, const Rounded& rounded) {
    const __m256i half = _mm256_set1_epi32(128);
    __m256i sums = _mm256_setzero_si256();
    for (int i = 0; i < n; i += 16) {
      const __m256i a = rounded(i), b = rounded(i + 8);
      sums = _mm256_add_epi32(sums, _mm256_add_epi32(a, b));
      const __m256i high_a = _mm256_srai_epi32(_mm256_add_epi32(a, half), 8),
                    high_b = _mm256_srai_epi32(_mm256_add_epi32(b, half), 8);
      store_low(w + i, _mm256_packs_epi32(high_a, high_b));
      store_low(w + term_stride + i, _mm256_packs_epi32(_mm256_sub_epi32(a, _mm256_slli_epi32(high_a, 8)),
                                                        _mm256_sub_epi32(b, _mm256_slli_epi32(high_b, 8))));
    }
    return sums;
  }

  template <class Codes, int kTerms, int kRows, int kBlocks, bool kTwoSets>
  static void pass(const DotJob<int8_t>& job) {
    for (int half = 0; half < 2; ++half) {
      // Four lane blocks go two by two where the sums of all and the weights would not fit 16 registers.
      if constexpr (kBlocks == 4 && (kRows * kTerms > 2 || kTwoSets)) {
        strip<Codes, kTerms, kRows, kBlocks, 0, 2, kTwoSets>(job, half);
        strip<Codes, kTerms, kRows, kBlocks, 2, 4, kTwoSets>(job, half);
      } else {
        strip<Codes, kTerms, kRows, kBlocks, 0, kBlocks, kTwoSets>(job, half);
      }
    }
  }

  // Lane blocks kFirst..kLast - 1 of a pass, 8 lanes of each.
  template <class Codes, int kTerms, int kRows, int kBlocks, int kFirst, int kLast, bool kTwoSets>
  static void strip(const DotJob<int8_t>& job, int half) {
    const int blocks = job.blocks;
    constexpr int kBits = Codes::kBits;
    typename Codes::template Reader<kBlocks, kFirst, kLast> reader;
    constexpr int kWeightRows = kRows * kTerms, kQuads = kBlockUnits / kBlocks;
    // Codes so large that two products fill a sum are widened at once.
    constexpr int kHeld = Dot::run(Codes::kLargest), kRun = kHeld > 0 ? kHeld : 1 << 20;
    constexpr int kWidth = kLast - kFirst, kSums = kBlocks == 4 ? kLast - kFirst : 4, kSet = kTwoSets && kFirst >= 2 ? 1 : 0;
    const auto weight = [](const int8_t* p) {
      int32_t four;
      __builtin_memcpy(&four, p, 4);
      return _mm256_set1_epi32(four);
    };
    __m256i total[kWeightRows][kSums];
    for (int r = 0; r < kWeightRows; ++r)
      for (int i = 0; i < kSums; ++i) total[r][i] = _mm256_setzero_si256();
    for (int b0 = 0; b0 < blocks; b0 += kRun) {
      const int b1 = blocks - b0 < kRun ? blocks : b0 + kRun;
      __m256i acc[kWeightRows][kSums];
      for (int r = 0; r < kWeightRows; ++r)
        for (int i = 0; i < kSums; ++i) acc[r][i] = _mm256_setzero_si256();
      for (int b = b0; b < b1; ++b) {
        const uint8_t* at = job.codes + b * kBits * kVectorBytes + half * 32;
        if (kFirst == 0 && half == 0) {
          for (int i = 0; i < kBits; ++i) __builtin_prefetch(job.ahead + (b * kBits + i) * kVectorBytes, 0, 3);
        }
        const int8_t* w = job.weights[kSet] + 4 * b * kQuads;
#pragma GCC unroll 8
        for (int q = 0; q < kQuads; ++q) {
          reader.begin(at, q * kBlocks);
#pragma GCC unroll 4
          for (int i = 0; i < kWidth; ++i) {
            const int f = q * kBlocks + kFirst + i, sum = f % 4 - kFirst;
            const __m256i e = reader.read(at, f, i);
#pragma GCC unroll 4
            for (int r = 0; r < kWeightRows; ++r) {
              const __m256i x = weight(w + r * job.stride + 4 * q);
              if constexpr (kHeld > 0) {
                acc[r][sum] = Dot::add(acc[r][sum], e, x);
              } else {
                acc[r][sum] = _mm256_add_epi32(acc[r][sum], Dot::widen(Dot::add(_mm256_setzero_si256(), e, x)));
              }
              // The compiler would add products to each other first and run out of registers.
              if constexpr (kTerms == 1) __asm__("" : "+x"(acc[r][sum]));
            }
          }
        }
      }
      for (int r = 0; r < kWeightRows; ++r)
        for (int i = 0; i < kSums; ++i)
          total[r][i] = _mm256_add_epi32(total[r][i], kHeld > 0 ? Dot::widen(acc[r][i]) : acc[r][i]);
    }
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < kWidth; ++i) {
        const auto lanes = [&](int term) {
          __m256i x = total[r * kTerms + term][i];
          for (int j = i + kBlocks; j < kSums; j += kBlocks) x = _mm256_add_epi32(x, total[r * kTerms + term][j]);
          return _mm256_cvtepi32_ps(x);
        };
        __m256 y = lanes(0);
        if constexpr (kTerms == 2) y = Avx2::fma(y, Avx2::set1(256.0f), lanes(1));
        float* to = job.out + r * job.out_stride + (kFirst + i) * kUnitLanes + half * 8;
        const float a = job.a[kSet][r];
        if constexpr (Codes::kCodePart == Part::kHighNibble) {
          y = Avx2::fma(y, Avx2::set1(16.0f * a), Avx2::load(to));
        } else {
          y = Avx2::fma(y, Avx2::set1(a), Avx2::set1(job.b[kSet][r]));
        }
        Avx2::store(to, y);
      }
    }
  }
};

}  // namespace
}  // namespace kvmix
