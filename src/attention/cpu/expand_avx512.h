// Takes the codes of a block out of their vectors (tile_layout.h), for the AVX-512 kernels, and what they stand for.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "codec/trellis_code.h"

namespace kvmix {
namespace {

// The 8 fields of a block of 512 codes, one vector each, as u8 code * field_factor(bits, field % 4). In place where the width
// allows: one AND a field.
template <int kBits>
constexpr int field_factor(int j) {
  return kBits == 1   ? 1 << j
         : kBits == 2 ? 1 << (2 * j)
         : kBits == 3 ? (j % 2 != 0 ? 8 : 1)
         : kBits == 4 ? (j % 2 != 0 ? 16 : 1)
                      : 1;  // expanded to whole bytes
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
    static_assert(kBits == 8);
    for (int f = 0; f < 8; ++f) e[f] = vec(f);
  }
}

// Codes of the uniform family: they are what is multiplied, times factor(field).
template <int kCodeBits>
struct PlainCodes {
  static constexpr int kBits = kCodeBits, kFieldBits = kCodeBits;  // of a code, and of what is multiplied
  static constexpr bool kTwoSets = true, kFewBlocks = true;
  static constexpr int factor(int j) { return field_factor<kBits>(j); }

  template <int kBlocks>
  struct Reader {
    void read(const uint8_t* codes, __m512i (&e)[8]) { expand_block<kBits>(codes, e); }
  };
};

// Codes of the trellis family: the level of a field's window is what is multiplied. Of keys a chain runs through the four lane
// blocks and then on by a lane, in each half of the lanes; of values through the quads (chain_token).
template <int kCodeBits, Side kSide>
struct TrellisCodes {
  static constexpr int kBits = kCodeBits, kFieldBits = kLevelBits;
  static constexpr bool kTwoSets = false, kFewBlocks = kSide == Side::kValue;
  alignas(64) static constexpr auto kTable = level_table(kBits);
  static constexpr int factor(int) { return 1; }

  template <int kBlocks>
  struct Reader {
    Reader() {
      for (int i = 0; i < 4; ++i) table[i] = _mm512_load_si512(kTable.data() + 64 * i);
      for (__m512i& w : window) w = _mm512_setzero_si512();
    }

    void read(const uint8_t* codes, __m512i (&e)[8]) {
      expand_block<kBits>(codes, e);
      for (int f = 0; f < 8; ++f) {
        const int down = __builtin_ctz(static_cast<unsigned>(field_factor<kBits>(f % 4)));
        if (down != 0) e[f] = _mm512_srli_epi16(e[f], down);
      }
      if constexpr (kSide == Side::kKey) {
        static_assert(kBlocks == 4);
        for (int q = 0; q < 8; q += 4) {
          __m512i before = e[q + 3];
          if constexpr (kBits == 3) before = then(e[q + 2], e[q + 3]);
          if constexpr (kBits == 2) before = then(then(e[q + 1], e[q + 2]), e[q + 3]);
          const __m512i lane_before = _mm512_setr_epi32(0, 0, 1, 2, 3, 4, 5, 6, 0, 8, 9, 10, 11, 12, 13, 14);
          __m512i w = _mm512_maskz_permutexvar_epi32(0xfefe, lane_before, before);
          for (int i = 0; i < 4; ++i) {
            w = then(w, e[q + i]);
            e[q + i] = level(w);
          }
        }
      } else {
        for (int f = 0; f < 8; ++f) {
          __m512i& w = window[f % kBlocks];
          w = then(w, e[f]);
          e[f] = level(w);
        }
      }
    }

   private:
    // The window that a code makes of the one before.
    static __m512i then(__m512i w, __m512i code) {
      return _mm512_ternarylogic_epi32(_mm512_slli_epi16(w, kBits), _mm512_set1_epi8(static_cast<char>(0xff << kBits)), code,
                                       0xea);  // (shifted & mask) | code
    }
    __m512i level(__m512i w) const {
      return _mm512_mask_blend_epi8(_mm512_movepi8_mask(w), _mm512_permutex2var_epi8(table[0], w, table[1]),
                                    _mm512_permutex2var_epi8(table[2], w, table[3]));
    }

    __m512i table[4], window[kSide == Side::kKey ? 1 : kBlocks];
  };
};

}  // namespace
}  // namespace kvmix
