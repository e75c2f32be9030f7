// encode_tile with one group per vector lane: every lane does what quantize_group (quantize.h) does, operation by operation,
// so that the bytes are the same. Compile without contraction into fused multiply-adds; n is a multiple of 8. Internal linkage:
// included once per instruction set.
#pragma once

#include <cmath>
#include <cstring>

#include "codec/codec_family.h"
#include "codec/pack_block.h"
#include "codec/quantize.h"
#include "codec/row_feedback.h"
#include "codec/tile_layout.h"

namespace kvmix {
namespace {

template <class S>
class TileSeal {
  using V = typename S::V;
  using Mask = typename S::Mask;
  static constexpr int kW = S::kWidth;

 public:
  // TileEncoder::encode.
  static void encode(const CodecSpec& spec, const TileShape& shape, const uint16_t* x, const float* feedback, std::byte* out) {
    if (spec.is_f16()) {
      std::memcpy(out, x, uniform_bytes(spec, shape.width));
    } else if (feedback != nullptr) {
      encode_feedback(spec, shape.side, shape.width, x, feedback, out);
    } else {
      alignas(64) uint8_t flat[kPageTokens * kMostWidth];  // the tile's codes, one a byte, unit by unit
      seal_tile(spec, shape.side, shape.width, x, flat, out);
      pack(spec.bits, flat, shape.width, reinterpret_cast<uint8_t*>(out + uniform_scale_bytes(spec, shape.width)));
    }
  }

  // encode_tile for the scales; codes kStrip tokens at a time, kW tokens side by side.
  static void encode_feedback(const CodecSpec& spec, Side side, int width, const uint16_t* x, const float* weights,
                              std::byte* tile) {
    constexpr int kStrip = 64, kVectors = kStrip / kW;
    alignas(64) uint8_t flat[kPageTokens * kMostWidth];
    V exact[kMostWidth][kVectors], errors[kMostWidth][kVectors];
    seal_tile(spec, side, width, x, nullptr, tile);
    const auto* scales = reinterpret_cast<const uint16_t*>(tile);
    const uint16_t* mids = scales + scale_count(spec, width);
    const TileGeometry geometry = tile_geometry(side, width);
    const V centre = S::set1(code_centre(spec.bits)), top = S::set1(static_cast<float>((1 << spec.bits) - 1));
    const bool by_channel = spec.axis == Axis::kChannel;
    for (int first = 0; first < kPageTokens; first += kStrip) {
      for (int c = 0; c < width; c += kW) {
        for (int v = 0; v < kVectors; ++v) {
          V rows[kW], columns[kW];
          for (int k = 0; k < kW; ++k) rows[k] = finite(S::load_f16(x + (first + v * kW + k) * width + c));
          S::transpose(rows, columns);
          for (int k = 0; k < kW; ++k) exact[c + k][v] = columns[k];
        }
      }
      const float* row = weights;
      V scale[kVectors], mid[kVectors], codes[kUnitReduce][kVectors];
      Map maps[kVectors];
      for (int c = 0; c < width; ++c) {
        // One number for the tokens of a channel's group, of which a vector sees one; or one for the channels of a token's.
        for (int v = 0; (by_channel || c % spec.group == 0) && v < kVectors; ++v) {
          const int t = first + v * kW, index = scale_index(spec, width, t, c);
          if (by_channel && v > 0 && t % spec.group != 0) {
            scale[v] = scale[v - 1], mid[v] = mid[v - 1], maps[v] = maps[v - 1];
            continue;
          }
          const auto read = [&](const uint16_t* from) {
            return by_channel ? S::set1(f16_to_f32(from[index])) : S::load_f16(from + index);
          };
          scale[v] = read(scales);
          mid[v] = spec.zero_point ? read(mids) : S::zero();
          maps[v] = map_of({scale[v], mid[v]}, top);
        }
        V wanted[kVectors];
        for (int v = 0; v < kVectors; ++v) wanted[v] = exact[c][v];
        for (int i = 0; i < c; ++i) {
          const V weight = S::set1(row[i]);
          for (int v = 0; v < kVectors; ++v) wanted[v] = S::add(wanted[v], S::mul(weight, errors[i][v]));
        }
        row += c;
        for (int v = 0; v < kVectors; ++v) {
          const V code = quantize(finite(wanted[v]), maps[v], top);
          errors[c][v] = S::sub(exact[c][v], S::add(mid[v], S::mul(scale[v], S::sub(code, centre))));
          codes[c % kUnitReduce][v] = code;
          const int t = first + v * kW;
          if (side == Side::kValue) {
            store_along_reduce(flat, geometry, c, t, code);
          } else if (c % kUnitReduce == kUnitReduce - 1) {
            const V quad[kUnitReduce] = {codes[0][v], codes[1][v], codes[2][v], code};
            store_along_lanes(flat, geometry, t, c + 1 - kUnitReduce, quad);
          }
        }
      }
    }
    pack(spec.bits, flat, width, reinterpret_cast<uint8_t*>(tile + uniform_scale_bytes(spec, width)));
  }

  static void to_f16(const float* x, int n, uint16_t* out) {
    for (int i = 0; i < n; i += kW) S::store_f16(out + i, S::load(x + i));
  }

  // width is a multiple of 16, so whole vectors.
  static void encode_rows(const CodecSpec& spec, int width, int n, const float* x, const float* columns, std::byte* records) {
    const int groups = scale_groups(spec, width);
    const size_t bytes = uniform_record_bytes(spec, width), codes_at = bytes - static_cast<size_t>(width);
    const float top = static_cast<float>((1 << spec.bits) - 1);
    for (int r = 0; r < n; ++r) {
      const float* row = x + static_cast<ptrdiff_t>(r) * width;
      std::byte* record = records + static_cast<size_t>(r) * bytes;
      uint16_t numbers[2 * kMostWidth / kCodecGroups.front()];
      for (int g = 0; g < groups; ++g) {
        const int first = g * spec.group, in_group = width - first < spec.group ? width - first : spec.group;
        V high = finite(S::load(row + first)), low = S::negate(high);
        for (int c = kW; c < in_group; c += kW) {
          const V v = finite(S::load(row + first + c));
          high = S::max(high, v);
          low = S::max(low, S::negate(v));
        }
        const GroupScale scale = min_max_scale(coded_range({-S::reduce_max(low), S::reduce_max(high)}, spec.zero_point), top);
        numbers[g] = scale.scale;
        numbers[groups + g] = scale.mid;
        if (columns != nullptr) continue;
        const CodeMap map = code_map(f16_to_f32(scale.scale), f16_to_f32(scale.mid), top);
        const Map wide{S::set1(map.factor), S::set1(map.offset)};
        for (int c = 0; c < in_group; c += kW) {
          alignas(16) uint8_t codes[kW];
          S::store_bytes(codes, quantize(finite(S::load(row + first + c)), wide, S::set1(top)));
          std::memcpy(record + codes_at + first + c, codes, kW);
        }
      }
      std::memcpy(record, numbers, codes_at);
    }
    if (columns == nullptr) return;
    encode_with_feedback(n, spec, width, x, columns, records,
                         [](float* wanted, const float* column, float error, int first, int dim) {
                           const V e = S::set1(error);
                           for (int k = first / kW * kW; k < dim; k += kW)
                             S::store(wanted + k, S::add(S::load(wanted + k), S::mul(S::load(column + k), e)));
                         });
  }

 private:
  static void pack(int bits, const uint8_t* flat, int width, uint8_t* codes) {
    const int blocks = kPageTokens * width / (kBlockUnits * kUnitCodes);
    with_code_bits(bits, [&](auto b) { pack<b()>(flat, blocks, codes); });
  }

  struct Tile {
    const CodecSpec& spec;
    Side side;
    int width;
    TileGeometry geometry;
    const uint16_t* x;
    uint8_t* flat;  // null: scales alone
  };
  struct Scale {
    V scale, mid;
  };

  template <int kBits>
  static void pack(const uint8_t* flat, int blocks, uint8_t* codes) {
    if constexpr (kBits == 8) {
      std::memcpy(codes, flat, static_cast<size_t>(blocks) * kBlockUnits * kUnitCodes);
      return;
    }
    for (int b = 0; b < blocks; ++b) pack_block<kBits>(flat + b * kBlockUnits * kUnitCodes, codes + b * kBits * kVectorBytes);
  }

  // Values that are not finite count as 0.
  static V finite(V v) { return S::select(S::less(S::abs(v), S::set1(INFINITY)), v, S::zero()); }
  static V saturate(V v) {
    const V limit = S::set1(65504.0f);
    return S::round_f16(S::select(S::less(limit, v), limit, S::select(S::less(v, S::set1(-65504.0f)), S::set1(-65504.0f), v)));
  }
  struct Map {
    V factor, offset;
  };
  static Map map_of(Scale s, V top) {
    const V factor = S::select(S::less(S::zero(), s.scale), S::div(S::set1(1.0f), S::mul(s.scale, top)), S::zero());
    return {factor, S::sub(S::set1(0.5f), S::mul(s.mid, factor))};
  }
  static V quantize(V x, Map map, V top) {
    const V v = S::fma(x, map.factor, map.offset), one = S::set1(1.0f), magic = S::set1(kRoundToInteger);
    const V limited = S::max(S::zero(), S::min(one, v));
    return S::sub(S::fma(limited, top, magic), magic);
  }

  struct Best {
    V covariance, variance, mean;
  };
  static V all(const V (&p)[kPartialSums]) { return S::add(S::add(p[0], p[1]), S::add(p[2], p[3])); }

  // One pass of the fit over y, values less the middle: the codes of a map, and the regression on them.
  static void regress(const V* y, int n, Map map, V sum_y, bool zero_point, V centre, V top, Best& best) {
    V code = S::zero(), squared = code, product[kPartialSums] = {code, code, code, code};
    for (int i = 0; i < n; i += 2 * kPartialSums) {
      for (int k = 0; k < 2 * kPartialSums; ++k) {
        const V c = quantize(y[i + k], map, top);
        code = S::add(code, c);
        squared = S::fma(c, c, squared);  // whole numbers: exact
        product[k / 2] = S::fma(c, y[i + k], product[k / 2]);
      }
    }
    const float count = static_cast<float>(n);
    const V zero = S::zero(), mean = S::mul(code, S::set1(1.0f / count));
    V variance, covariance;
    if (zero_point) {
      variance = S::sub(squared, S::mul(code, mean));
      covariance = S::sub(all(product), S::mul(mean, sum_y));
    } else {
      variance = S::add(S::sub(squared, S::mul(S::add(centre, centre), code)), S::mul(S::set1(count), S::mul(centre, centre)));
      covariance = S::sub(all(product), S::mul(centre, sum_y));
    }
    const Mask more = S::less(S::mul(S::mul(best.covariance, best.covariance), variance),
                              S::mul(S::mul(covariance, covariance), best.variance));
    const Mask better = S::both(S::both(S::less(zero, variance), S::less(zero, covariance)), more);
    best = {S::select(better, covariance, best.covariance), S::select(better, variance, best.variance),
            S::select(better, mean, best.mean)};
  }

  static Scale fit(const V* x, int n, const CodecSpec& spec, V centre, V top) {
    V low = x[0], high = x[0];
    for (int i = 1; i < n; ++i) {
      low = S::min(x[i], low);
      high = S::max(x[i], high);
    }
    const V zero = S::zero();
    V range, middle = zero;
    if (spec.zero_point) {
      range = S::add(S::sub(high, low), zero);
      middle = S::add(S::mul(S::add(high, low), S::set1(0.5f)), zero);
    } else {
      const V negative = S::negate(low), magnitude = S::select(S::less(negative, high), high, negative);
      range = S::add(S::add(magnitude, magnitude), zero);
    }
    if (spec.fit == Fit::kMinMax) return {saturate(S::div(range, top)), saturate(middle)};

    V y[kMaxGroup], sums[kPartialSums] = {zero, zero, zero, zero}, squares[kPartialSums] = {zero, zero, zero, zero};
    for (int i = 0; i < n; i += 2 * kPartialSums) {
      for (int k = 0; k < 2 * kPartialSums; ++k) {
        y[i + k] = S::sub(x[i + k], middle);
        sums[k / 2] = S::add(sums[k / 2], y[i + k]);
        if (spec.fit == Fit::kUnbiased) squares[k / 2] = S::fma(y[i + k], y[i + k], squares[k / 2]);
      }
    }
    const V sum_y = all(sums), mean_y = S::mul(sum_y, S::set1(1.0f / static_cast<float>(n))), one = S::set1(1.0f);
    const V whole = S::select(S::less(zero, range), S::div(one, range), zero), unit = S::div(one, top), half = S::set1(0.5f);
    Best best{zero, one, zero};
    for (int start = 0; start < kFitStarts; ++start) {
      const V factor = S::mul(whole, S::set1(fit_start(spec.bits, start)));
      regress(y, n, {factor, half}, sum_y, spec.zero_point, centre, top, best);
    }
    for (int round = 0; round < fit_rounds(spec.bits); ++round) {
      const Mask fits = S::less(zero, best.covariance);
      const V factor = S::select(fits, S::div(best.variance, S::mul(best.covariance, top)), zero);
      const V offset = spec.zero_point ? S::sub(S::mul(best.mean, unit), S::mul(mean_y, factor)) : half;
      regress(y, n, {factor, offset}, sum_y, spec.zero_point, centre, top, best);
    }
    const Mask fits = S::less(zero, best.covariance);
    const V square_y = all(squares), spread = spec.zero_point ? S::sub(square_y, S::mul(mean_y, sum_y)) : square_y;
    const V scale = S::select(S::less(zero, spread), S::div(spread, best.covariance), S::div(best.covariance, best.variance));
    const V mid = spec.zero_point ? S::sub(mean_y, S::mul(scale, S::sub(best.mean, centre))) : zero;
    return {saturate(S::select(fits, scale, S::div(range, top))), saturate(S::select(fits, S::add(middle, mid), middle))};
  }

  // Codes of four elements of reduce of kW unit lanes: a dword each.
  static void store_along_lanes(uint8_t* flat, const TileGeometry& geometry, int lane, int reduce, const V* q) {
    S::store_quads(flat + unit_index(geometry, lane, reduce) * kUnitCodes + byte_in_unit(lane, reduce), q);
  }
  // Codes of kW elements of reduce of a unit lane: kW / 4 dwords.
  static void store_along_reduce(uint8_t* flat, const TileGeometry& geometry, int lane, int reduce, V q) {
    alignas(16) uint8_t bytes[kW];
    S::store_bytes(bytes, q);
    for (int j = 0; j < kW; j += kUnitReduce) {
      std::memcpy(flat + unit_index(geometry, lane, reduce + j) * kUnitCodes + byte_in_unit(lane, reduce + j), bytes + j,
                  kUnitReduce);
    }
  }

  // The scales of a tile and, unless flat is null, its codes, not yet packed.
  static void seal_tile(const CodecSpec& spec, Side side, int width, const uint16_t* x, uint8_t* flat, std::byte* out) {
    const int count = scale_count(spec, width);
    const size_t used = static_cast<size_t>(count) * (spec.zero_point ? 2 : 1) * sizeof(uint16_t);
    std::memset(out + used, 0, uniform_scale_bytes(spec, width) - used);
    auto* scales = reinterpret_cast<uint16_t*>(out);
    uint16_t* mids = spec.zero_point ? scales + count : nullptr;
    const Tile tile{spec, side, width, tile_geometry(side, width), x, flat};
    if (spec.axis == Axis::kChannel) {
      for (int t = 0; t < kPageTokens; t += spec.group) {
        for (int c = 0; c < width; c += kW) seal_groups(tile, t, c, spec.group, scales, mids);
      }
    } else {
      for (int c = 0; c < width; c += spec.group) {
        const int n = width - c < spec.group ? width - c : spec.group;
        for (int t = 0; t < kPageTokens; t += kW) seal_groups(tile, t, c, n, scales, mids);
      }
    }
  }

  // kW groups side by side: channels c.. of tokens t..t+n-1, or tokens t.. with channels c..c+n-1.
  static void seal_groups(const Tile& tile, int t, int c, int n, uint16_t* scales, uint16_t* mids) {
    const CodecSpec& spec = tile.spec;
    const int d = tile.width;
    const bool by_channel = spec.axis == Axis::kChannel;
    V x[kMaxGroup];
    x[0] = S::zero();  // n > 0, which the compiler cannot see
    if (by_channel) {
      for (int i = 0; i < n; ++i) x[i] = finite(S::load_f16(tile.x + (t + i) * d + c));
    } else {
      for (int i = 0; i < n; i += kW) {
        V rows[kW];
        for (int k = 0; k < kW; ++k) rows[k] = finite(S::load_f16(tile.x + (t + k) * d + c + i));
        S::transpose(rows, x + i);
      }
    }
    const V centre = S::set1(code_centre(spec.bits)), top = S::set1(static_cast<float>((1 << spec.bits) - 1));
    const Scale s = fit(x, n, spec, centre, top);
    const int index = scale_index(spec, d, t, c);
    S::store_f16(scales + index, s.scale);
    if (mids != nullptr) S::store_f16(mids + index, s.mid);
    if (tile.flat == nullptr) return;
    const Map map = map_of(s, top);
    const bool lanes_are_unit_lanes = by_channel == (tile.side == Side::kValue);
    for (int i = 0; i < n; i += kUnitReduce) {
      V q[kUnitReduce];
      for (int k = 0; k < kUnitReduce; ++k) q[k] = quantize(x[i + k], map, top);
      if (lanes_are_unit_lanes) {
        const int lane = by_channel ? c : t, reduce = (by_channel ? t : c) + i;
        store_along_lanes(tile.flat, tile.geometry, lane, reduce, q);
      } else {
        const int reduce = by_channel ? c : t;
        for (int k = 0; k < kUnitReduce; ++k) {
          store_along_reduce(tile.flat, tile.geometry, (by_channel ? t : c) + i + k, reduce, q[k]);
        }
      }
    }
  }
};

}  // namespace
}  // namespace kvmix
