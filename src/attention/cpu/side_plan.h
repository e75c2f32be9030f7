// What the x86 kernels make of a side of a layer before they walk its pages: where scales apply, and queries or probabilities
// that are ready to meet codes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "codec/codec_family.h"
#include "codec/tile_layout.h"
#include "codec/trellis.h"

namespace kvmix {
namespace {

inline constexpr int kMaxDim = kMostWidth;
inline constexpr int kMaxScales = 1024;  // of a tile: 256 x 128 elements in groups of 32
inline constexpr int kMaxBlockRows = 4;
inline constexpr int kMaxTerms = 2;

// Per row: x * s ~ scale * (Weights); `sum` is the sum of the rounded x * s, `mid` that of x * mid.
struct Prepared {
  alignas(16) float scale[kMaxBlockRows], sum[kMaxBlockRows], mid[kMaxBlockRows];
};

// Rows x[r * stride ..] and what multiplies them; null scale: nothing (mid is then the sum of x), null mid: no zero point.
struct Source {
  const float* x;
  ptrdiff_t stride;
  const float *scale, *mid;
};

// Int8::prepare<kTerms, kRows, scaled, length> of an int8 kernel, with the common lengths as constants, which unrolls them.
template <class Int8, int kTerms, int kRows>
void prepare_rows(const Source& from, int n, int8_t* w, ptrdiff_t term_stride, Prepared& out) {
  if (from.scale == nullptr) return Int8::template prepare<kTerms, kRows, false, 0>(from, n, w, term_stride, out);
  switch (n) {
    case 64:
      return Int8::template prepare<kTerms, kRows, true, 64>(from, n, w, term_stride, out);
    case 128:
      return Int8::template prepare<kTerms, kRows, true, 128>(from, n, w, term_stride, out);
    default:
      return Int8::template prepare<kTerms, kRows, true, 0>(from, n, w, term_stride, out);
  }
}

// One side of a layer as the kernels walk it (tile_layout.h). Scales vary either along `reduce`, with one set per `group`
// lanes (they fold into the weights), or per lane, with one segment per `group` of reduce (they apply after the dot).
struct SidePlan {
  int bits, terms, lanes, reduce, group, group_shift, sets, segments;
  bool packed, lane_scaled, zero_point, trellis;
  bool offsets;  // of channels, in place of midpoints
  Side side;
  float centre;
  size_t scale_bytes, tile_bytes;
};

inline SidePlan side_plan(const TileFormat& f, int terms) {
  const TileGeometry g = tile_geometry(f.side, f.width);
  const bool lane_scaled = (f.side == Side::kKey) == (f.spec.axis == Axis::kToken);
  const int group = f.spec.group;
  SidePlan p{};
  p.bits = f.spec.bits, p.terms = terms, p.lanes = g.lanes, p.reduce = g.reduce, p.group = group;
  p.group_shift = __builtin_ctz(static_cast<unsigned>(group));
  p.packed = !f.spec.is_f16(), p.lane_scaled = lane_scaled, p.zero_point = f.spec.zero_point;
  p.sets = lane_scaled ? 1 : (g.lanes + group - 1) / group;
  p.segments = lane_scaled ? (g.reduce + group - 1) / group : 1;
  p.trellis = is_trellis(f.spec), p.offsets = p.trellis && f.spec.zero_point, p.side = f.side;
  p.centre = p.trellis ? kLevelCentre : 0.5f * static_cast<float>((1 << f.spec.bits) - 1);
  p.scale_bytes = f.scale_bytes, p.tile_bytes = f.bytes;
  return p;
}

struct TileScales {
  alignas(64) float scale[kMaxScales], mid[kMaxScales];
};

// Query rows (or probabilities) ready to meet one tile's codes: per set of scales or segment the factors of dots.
template <class Weight>
struct Operand {
  alignas(64) Weight weights[kMaxBlockRows * kMaxTerms * kMaxScales];
  alignas(16) float a[8][kMaxBlockRows], b[8][kMaxBlockRows], mid[8][kMaxBlockRows];
};

}  // namespace
}  // namespace kvmix
