// The job of a micro-kernel, and the micro-kernels of a kernel file by what is known at run time. `K` has
//   takes(bits, terms)    whether codes of `bits` ever meet weights of `terms` terms
//   rows(terms)           query rows per block, at most kMaxBlockRows
//   dots<bits, terms, rows, lane blocks, two sets>(job)
#pragma once

#include <cstddef>
#include <cstdint>

#include "codec/tile_layout.h"

namespace kvmix {
namespace {

// What a micro-kernel reads and writes. Weight rows at weights[half] + (row * terms + term) * stride; half 1 serves lane blocks
// 2 and 3 and differs from half 0 only where two sets of scales meet in a lane group. out[row * out_stride + lane] =
// a[half][row] * dot + b[half][row]. `ahead` is prefetched line by line.
template <class Weight>
struct DotJob {
  const uint8_t* codes;
  int blocks;
  const Weight* weights[2];
  ptrdiff_t stride;
  const float *a[2], *b[2];
  float* out;
  ptrdiff_t out_stride;
  const char* ahead;
};

template <class K>
class DotsTable {
 public:
  using Dots = void (*)(const DotJob<typename K::Weight>& job);

  static Dots find(int bits, int terms, int rows, int lane_blocks, bool two_sets) {
    return with_code_bits(bits, [&](auto b) -> Dots { return by_terms<b()>(terms, rows, lane_blocks, two_sets); });
  }

 private:
  template <int kBits>
  static Dots by_terms(int terms, int rows, int lane_blocks, bool two_sets) {
    return terms == 1 ? by_rows<kBits, 1, 1>(rows, lane_blocks, two_sets) : by_rows<kBits, 2, 1>(rows, lane_blocks, two_sets);
  }

  template <int kBits, int kTerms, int kRows>
  static Dots by_rows(int rows, int lane_blocks, bool two_sets) {
    if constexpr (K::takes(kBits, kTerms) && kRows <= K::rows(kTerms)) {
      return rows == kRows ? by_blocks<kBits, kTerms, kRows>(lane_blocks, two_sets)
                           : by_rows<kBits, kTerms, kRows + 1>(rows, lane_blocks, two_sets);
    }
    __builtin_unreachable();
  }

  template <int kBits, int kTerms, int kRows>
  static Dots by_blocks(int lane_blocks, bool two_sets) {
    switch (lane_blocks) {
      case 1:
        return K::template dots<kBits, kTerms, kRows, 1, false>;
      case 2:
        return K::template dots<kBits, kTerms, kRows, 2, false>;
      case 4:
        return two_sets ? K::template dots<kBits, kTerms, kRows, 4, true> : K::template dots<kBits, kTerms, kRows, 4, false>;
      default:  // Flow::supports
        __builtin_unreachable();
    }
  }
};

}  // namespace
}  // namespace kvmix
