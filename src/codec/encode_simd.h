// encode_tile with one group per vector lane: every lane does what quantize_group (quantize.h) does, operation by operation,
// so that the bytes are the same. Compile without contraction into fused multiply-adds. Internal linkage: included once per
// instruction set.
#pragma once

#include <cmath>
#include <cstring>

#include "codec/quantize.h"
#include "codec/tile_layout.h"

namespace kvmix {
namespace {

// Packs the 8 units of a block, one code a byte, into `bits` vectors (tile_layout.h).
template <int kBits>
inline void pack_block(const uint8_t* c, uint8_t* out) {
  constexpr int kV = kVectorBytes;
  const auto byte = [](int v) { return static_cast<uint8_t>(v); };
  for (int i = 0; i < kV; ++i) {
    const auto at = [c, i](int f) { return static_cast<int>(c[f * kV + i]); };
    if constexpr (kBits == 1) {
      out[i] = byte(at(0) | at(1) << 1 | at(2) << 2 | at(3) << 3 | at(4) << 4 | at(5) << 5 | at(6) << 6 | at(7) << 7);
    } else if constexpr (kBits == 2) {
      out[i] = byte(at(0) | at(1) << 2 | at(2) << 4 | at(3) << 6);
      out[kV + i] = byte(at(4) | at(5) << 2 | at(6) << 4 | at(7) << 6);
    } else if constexpr (kBits == 3) {
      const int rest = at(6) | at(7) << 3;
      out[i] = byte(at(0) | at(1) << 3 | (rest & 3) << 6);
      out[kV + i] = byte(at(2) | at(3) << 3 | (rest >> 2 & 3) << 6);
      out[2 * kV + i] = byte(at(4) | at(5) << 3 | (rest >> 4) << 6);
    } else if constexpr (kBits < 8) {
      for (int v = 0; v < 4; ++v) out[v * kV + i] = byte((at(2 * v) & 15) | (at(2 * v + 1) & 15) << 4);
      if constexpr (kBits == 5) {
        int plane = 0;
        for (int f = 0; f < 8; ++f) plane |= (at(f) >> 4) << f;
        out[4 * kV + i] = byte(plane);
      }
      if constexpr (kBits == 6) {
        for (int v = 0; v < 2; ++v) {
          int plane = 0;
          for (int f = 0; f < 4; ++f) plane |= (at(4 * v + f) >> 4) << (2 * f);
          out[(4 + v) * kV + i] = byte(plane);
        }
      }
    }
  }
}

template <class S>
class TileSeal {
  using V = typename S::V;
  using Mask = typename S::Mask;
  static constexpr int kW = S::kWidth;

 public:
  static void encode(const CodecSpec& spec, Side side, int head_dim, const uint16_t* x, std::byte* out) {
    if (spec.is_f16()) {
      std::memcpy(out, x, tile_bytes(spec, head_dim));
      return;
    }
    alignas(64) uint8_t flat[kPageTokens * 256];  // the tile's codes, one a byte, unit by unit
    seal_tile(spec, side, head_dim, x, flat, out);
    pack(spec.bits, flat, head_dim, reinterpret_cast<uint8_t*>(out + tile_scale_bytes(spec, head_dim)));
  }

  // encode_tile for the scales, feedback_tile for the codes: kStrip tokens at a time, kW tokens side by side.
  static void encode_feedback(const CodecSpec& spec, Side side, int head_dim, const uint16_t* x, const float* weights,
                              std::byte* tile) {
    constexpr int kStrip = 64, kVectors = kStrip / kW;
    alignas(64) uint8_t flat[kPageTokens * 256];
    V exact[256][kVectors], errors[256][kVectors];
    seal_tile(spec, side, head_dim, x, nullptr, tile);
    const auto* scales = reinterpret_cast<const uint16_t*>(tile);
    const uint16_t* mids = scales + scale_count(spec, head_dim);
    const TileGeometry geometry = tile_geometry(side, head_dim);
    const V centre = S::set1(code_centre(spec.bits)), top = S::set1(static_cast<float>((1 << spec.bits) - 1));
    const bool by_channel = spec.axis == Axis::kChannel;
    for (int first = 0; first < kPageTokens; first += kStrip) {
      for (int c = 0; c < head_dim; c += kW) {
        for (int v = 0; v < kVectors; ++v) {
          V rows[kW], columns[kW];
          for (int k = 0; k < kW; ++k) rows[k] = finite(S::load_f16(x + (first + v * kW + k) * head_dim + c));
          S::transpose(rows, columns);
          for (int k = 0; k < kW; ++k) exact[c + k][v] = columns[k];
        }
      }
      const float* row = weights;
      V scale[kVectors], mid[kVectors], inv[kVectors], codes[kUnitReduce][kVectors];
      for (int c = 0; c < head_dim; ++c) {
        // One number for the tokens of a channel's group, of which a vector sees one; or one for the channels of a token's.
        for (int v = 0; (by_channel || c % spec.group == 0) && v < kVectors; ++v) {
          const int t = first + v * kW, index = scale_index(spec, head_dim, t, c);
          if (by_channel && v > 0 && t % spec.group != 0) {
            scale[v] = scale[v - 1], mid[v] = mid[v - 1], inv[v] = inv[v - 1];
            continue;
          }
          const auto read = [&](const uint16_t* from) {
            return by_channel ? S::set1(f16_to_f32(from[index])) : S::load_f16(from + index);
          };
          scale[v] = read(scales);
          mid[v] = spec.zero_point ? read(mids) : S::zero();
          inv[v] = inverse(scale[v]);
        }
        V wanted[kVectors];
        for (int v = 0; v < kVectors; ++v) wanted[v] = exact[c][v];
        for (int i = 0; i < c; ++i) {
          const V weight = S::set1(row[i]);
          for (int v = 0; v < kVectors; ++v) wanted[v] = S::add(wanted[v], S::mul(weight, errors[i][v]));
        }
        row += c;
        for (int v = 0; v < kVectors; ++v) {
          const V code = quantize(finite(wanted[v]), mid[v], inv[v], centre, top);
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
    pack(spec.bits, flat, head_dim, reinterpret_cast<uint8_t*>(tile + tile_scale_bytes(spec, head_dim)));
  }

  static void to_f16(const float* x, int n, uint16_t* out) {
    for (int i = 0; i < n; i += kW) S::store_f16(out + i, S::load(x + i));
  }

 private:
  static void pack(int bits, const uint8_t* flat, int head_dim, uint8_t* codes) {
    const int blocks = kPageTokens * head_dim / (kBlockUnits * kUnitCodes);
    switch (bits) {
      case 1:
        pack<1>(flat, blocks, codes);
        break;
      case 2:
        pack<2>(flat, blocks, codes);
        break;
      case 3:
        pack<3>(flat, blocks, codes);
        break;
      case 4:
        pack<4>(flat, blocks, codes);
        break;
      case 5:
        pack<5>(flat, blocks, codes);
        break;
      case 6:
        pack<6>(flat, blocks, codes);
        break;
      default:
        std::memcpy(codes, flat, static_cast<size_t>(kPageTokens * head_dim));
        break;
    }
  }

  struct Tile {
    const CodecSpec& spec;
    Side side;
    int head_dim;
    TileGeometry geometry;
    const uint16_t* x;
    uint8_t* flat;  // null: scales alone
  };
  struct Scale {
    V scale, mid;
  };

  template <int kBits>
  static void pack(const uint8_t* flat, int blocks, uint8_t* codes) {
    for (int b = 0; b < blocks; ++b) pack_block<kBits>(flat + b * kBlockUnits * kUnitCodes, codes + b * kBits * kVectorBytes);
  }

  // Values that are not finite count as 0.
  static V finite(V v) { return S::select(S::less(S::abs(v), S::set1(INFINITY)), v, S::zero()); }
  static V saturate(V v) {
    const V limit = S::set1(65504.0f);
    return S::round_f16(S::select(S::less(limit, v), limit, S::select(S::less(v, S::set1(-65504.0f)), S::set1(-65504.0f), v)));
  }
  static V inverse(V scale) { return S::select(S::less(S::zero(), scale), S::div(S::set1(1.0f), scale), S::zero()); }
  static V quantize(V x, V mid, V inv, V centre, V top) {
    const V v = S::add(S::mul(S::sub(x, mid), inv), centre);
    const V limited = S::select(S::less(top, v), top, S::select(S::less(v, S::zero()), S::zero(), v));
    const V magic = S::set1(12582912.0f);
    return S::sub(S::add(limited, magic), magic);
  }

  static V squared_error(const V* x, int n, Scale s, V centre, V top) {
    const V inv = inverse(s.scale);
    V error = S::zero();
    for (int i = 0; i < n; ++i) {
      const V code = quantize(x[i], s.mid, inv, centre, top);
      const V delta = S::sub(x[i], S::add(s.mid, S::mul(s.scale, S::sub(code, centre))));
      error = S::add(error, S::mul(delta, delta));
    }
    return error;
  }

  static Scale fit(const V* x, int n, const CodecSpec& spec, V centre, V top) {
    V low = x[0], high = x[0];
    for (int i = 1; i < n; ++i) {
      low = S::select(S::less(x[i], low), x[i], low);
      high = S::select(S::less(high, x[i]), x[i], high);
    }
    if (!spec.zero_point) {
      const V negative = S::negate(low);
      const V magnitude = S::select(S::less(negative, high), high, negative);
      low = S::negate(magnitude);
      high = magnitude;
    }
    const V range = S::sub(high, low), middle = spec.zero_point ? S::mul(S::add(high, low), S::set1(0.5f)) : S::zero();
    const Scale min_max{saturate(S::div(range, top)), saturate(middle)};
    if (spec.fit == Fit::kMinMax) return min_max;

    const V zero = S::zero(), count = S::set1(static_cast<float>(n));
    const int starts = spec.bits <= 3 ? 3 : 2;
    Scale best = min_max;
    V best_error = zero;
    for (int start = 0; start < starts; ++start) {
      const float clip = start == 0 ? 1.0f : (spec.bits <= 3 ? (start == 1 ? 0.8f : 0.6f) : 0.85f);
      V scale = S::div(S::mul(S::set1(clip), range), top), mid = middle;
      Mask active = S::less(zero, range);
      for (int round = 0; round < 3; ++round) {
        const V inv = inverse(scale);
        V sum_q = zero, sum_x = zero, sum_qq = zero, sum_qx = zero;
        for (int i = 0; i < n; ++i) {
          const V q = S::sub(quantize(x[i], mid, inv, centre, top), centre);
          const V y = S::sub(x[i], middle);
          sum_q = S::add(sum_q, q);
          sum_x = S::add(sum_x, y);
          sum_qq = S::add(sum_qq, S::mul(q, q));
          sum_qx = S::add(sum_qx, S::mul(q, y));
        }
        V fresh, fresh_mid = mid;
        if (spec.zero_point) {
          const V variance = S::sub(sum_qq, S::div(S::mul(sum_q, sum_q), count));
          const V covariance = S::sub(sum_qx, S::div(S::mul(sum_q, sum_x), count));
          active = S::both(active, S::both(S::less(zero, variance), S::less(zero, covariance)));
          fresh = S::div(covariance, variance);
          fresh_mid = S::add(middle, S::div(S::sub(sum_x, S::mul(fresh, sum_q)), count));
        } else {
          active = S::both(active, S::both(S::less(zero, sum_qq), S::less(zero, sum_qx)));
          fresh = S::div(sum_qx, sum_qq);
        }
        scale = S::select(active, fresh, scale);
        mid = S::select(active, fresh_mid, mid);
      }
      const Scale candidate{saturate(scale), saturate(mid)};
      const V error = squared_error(x, n, candidate, centre, top);
      const Mask better = start == 0 ? S::less(zero, range) : S::both(S::less(zero, range), S::less(error, best_error));
      best = {S::select(better, candidate.scale, best.scale), S::select(better, candidate.mid, best.mid)};
      best_error = S::select(better, error, best_error);
    }
    return best;
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
  static void seal_tile(const CodecSpec& spec, Side side, int head_dim, const uint16_t* x, uint8_t* flat, std::byte* out) {
    const int count = scale_count(spec, head_dim);
    const size_t used = static_cast<size_t>(count) * (spec.zero_point ? 2 : 1) * sizeof(uint16_t);
    std::memset(out + used, 0, tile_scale_bytes(spec, head_dim) - used);
    auto* scales = reinterpret_cast<uint16_t*>(out);
    uint16_t* mids = spec.zero_point ? scales + count : nullptr;
    const Tile tile{spec, side, head_dim, tile_geometry(side, head_dim), x, flat};
    if (spec.axis == Axis::kChannel) {
      for (int t = 0; t < kPageTokens; t += spec.group) {
        for (int c = 0; c < head_dim; c += kW) seal_groups(tile, t, c, spec.group, scales, mids);
      }
    } else {
      for (int c = 0; c < head_dim; c += spec.group) {
        const int n = head_dim - c < spec.group ? head_dim - c : spec.group;
        for (int t = 0; t < kPageTokens; t += kW) seal_groups(tile, t, c, n, scales, mids);
      }
    }
  }

  // kW groups side by side: channels c.. of tokens t..t+n-1, or tokens t.. with channels c..c+n-1.
  static void seal_groups(const Tile& tile, int t, int c, int n, uint16_t* scales, uint16_t* mids) {
    const CodecSpec& spec = tile.spec;
    const int d = tile.head_dim;
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
    const V inv = inverse(s.scale);
    const bool lanes_are_unit_lanes = by_channel == (tile.side == Side::kValue);
    for (int i = 0; i < n; i += kUnitReduce) {
      V q[kUnitReduce];
      for (int k = 0; k < kUnitReduce; ++k) q[k] = quantize(x[i + k], s.mid, inv, centre, top);
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
