// The job of a micro-kernel, and the micro-kernels of a kernel file by what is known at run time. `K` has
//   takes(bits, terms)    whether codes of `bits` ever meet weights of `terms` terms
//   rows(terms)           query rows per block, at most kMaxBlockRows
//   Plain<bits>, Trellis<bits, side>  what reads codes of the families, with kBits, kTwoSets (two sets of scales may meet in a
//                         lane group) and kFewBlocks (lane groups may have fewer than 4 blocks)
//   dots<codes, terms, rows, lane blocks, two sets>(job)
#pragma once

#include <cstddef>
#include <cstdint>

#include "codec/tile_layout.h"
#include "codec/trellis.h"

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
    return with_code_bits(
        bits, [&](auto b) -> Dots { return by_terms<typename K::template Plain<b()>>(terms, rows, lane_blocks, two_sets); });
  }
  // Codes of the trellis family.
  static Dots find_trellis(int bits, Side side, int terms, int rows, int lane_blocks) {
    return with_trellis_bits(bits, [&](auto b) -> Dots {
      return side == Side::kKey ? by_terms<typename K::template Trellis<b(), Side::kKey>>(terms, rows, lane_blocks, false)
                                : by_terms<typename K::template Trellis<b(), Side::kValue>>(terms, rows, lane_blocks, false);
    });
  }

 private:
  template <class Codes>
  static Dots by_terms(int terms, int rows, int lane_blocks, bool two_sets) {
    return terms == 1 ? by_rows<Codes, 1, 1>(rows, lane_blocks, two_sets) : by_rows<Codes, 2, 1>(rows, lane_blocks, two_sets);
  }

  template <class Codes, int kTerms, int kRows>
  static Dots by_rows(int rows, int lane_blocks, bool two_sets) {
    if constexpr (K::takes(Codes::kBits, kTerms) && kRows <= K::rows(kTerms)) {
      return rows == kRows ? by_blocks<Codes, kTerms, kRows>(lane_blocks, two_sets)
                           : by_rows<Codes, kTerms, kRows + 1>(rows, lane_blocks, two_sets);
    }
    __builtin_unreachable();
  }

  template <class Codes, int kTerms, int kRows>
  static Dots by_blocks(int lane_blocks, bool two_sets) {
    if (lane_blocks == 4) {
      if constexpr (Codes::kTwoSets) {
        if (two_sets) return K::template dots<Codes, kTerms, kRows, 4, true>;
      }
      return K::template dots<Codes, kTerms, kRows, 4, false>;
    }
    if constexpr (Codes::kFewBlocks) {
      if (lane_blocks == 1) return K::template dots<Codes, kTerms, kRows, 1, false>;
      if (lane_blocks == 2) return K::template dots<Codes, kTerms, kRows, 2, false>;
    }
    __builtin_unreachable();  // Flow::supports
  }
};

}  // namespace
}  // namespace kvmix
