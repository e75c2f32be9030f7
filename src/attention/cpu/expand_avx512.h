// Takes the codes of a block out of their vectors (tile_layout.h), for the AVX-512 kernels.
#pragma once

#include <immintrin.h>

#include <cstdint>

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

}  // namespace
}  // namespace kvmix
