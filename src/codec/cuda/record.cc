#include "codec/cuda/record.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/fp16.h"
#include "codec/cuda/trellis_layout.h"
#include "codec/tile_layout.h"
#include "codec/trellis.h"

namespace kvmix::cuda {
namespace {

CodecSpec side_spec(const SideShape& side) {
  CodecSpec spec;
  spec.bits = side.bits, spec.group = side.group;
  spec.axis = side.per_token ? Axis::kToken : Axis::kChannel;
  return spec;
}

// Calls visit(token, channel, cell in the record) for every code of a side.
template <class Visit>
void each_code(bool key, int head_dim, const Visit& visit) {
  for (int token = 0; token < kPageTokens; ++token) {
    for (int channel = 0; channel < head_dim; ++channel) visit(token, channel, code_cell(key, token, channel));
  }
}

// The 16-bit half of the record's codes that holds a bit of a code.
struct BitAddress {
  int half, bit;
};
BitAddress bit_address(int bits, const CodeCell& cell, int bit) {
  const CodePlace place = code_bit_place(bits, cell.at.reg, cell.field, bit);
  return {(cell.block * block_bytes(bits) + word_offset(bits, cell.at.lane, place.word)) / 2 + cell.at.half, place.bit};
}

// A code's place in the CPU's tile.
struct TilePlace {
  int unit, byte;
};
TilePlace tile_place(bool key, int head_dim, int token, int channel) {
  const int lane = key ? token : channel, reduce = key ? channel : token;
  return {unit_index(tile_geometry(key ? Side::kKey : Side::kValue, head_dim), lane, reduce), byte_in_unit(lane, reduce)};
}

uint16_t half_at(const uint8_t* bytes, int index) {
  uint16_t v;
  std::memcpy(&v, bytes + 2 * index, sizeof v);
  return v;
}
void set_half(uint8_t* bytes, int index, uint16_t v) { std::memcpy(bytes + 2 * index, &v, sizeof v); }

// Calls visit(scale index in the tile, index of the scale, of the midpoint among the record's scales).
template <class Visit>
void each_scale(const SideShape& side, const Visit& visit) {
  const CodecSpec spec = side_spec(side);
  for (int g = 0; g < side.groups(); ++g) {
    for (int i = 0; i < (side.per_token ? kPageTokens : side.head_dim); ++i) {
      const int token = side.per_token ? i : g * side.group, channel = side.per_token ? g * side.group : i;
      const int at = side.scale_at(token, channel);
      visit(scale_index(spec, side.head_dim, token, channel), at, at + kMidStep);
    }
  }
}

void pack_side(const SideShape& side, bool key, const uint8_t* tile, uint8_t* part, int32_t* exponent) {
  const CodecSpec spec = side_spec(side);
  const uint8_t* const tile_codes = tile + tile_scale_bytes(spec, side.head_dim);
  each_code(key, side.head_dim, [&](int token, int channel, const CodeCell& cell) {
    if (side.bits == 16) {
      set_half(part, bit_address(16, cell, 0).half, half_at(tile, token * side.head_dim + channel));
      return;
    }
    const TilePlace from = tile_place(key, side.head_dim, token, channel);
    const int code = get_code(side.bits, tile_codes, from.unit, from.byte);
    for (int b = 0; b < side.bits; ++b) {
      const BitAddress to = bit_address(side.bits, cell, b);
      set_half(part, to.half, static_cast<uint16_t>(half_at(part, to.half) | (((code >> b) & 1) << to.bit)));
    }
  });
  *exponent = 0;
  if (side.bits == 16) return;
  const int count = scale_count(spec, side.head_dim);
  uint8_t* const meta = part + side.meta();
  float largest = 0.0f;
  each_scale(side, [&](int index, int scale_to, int mid_to) {
    set_half(meta, scale_to, half_at(tile, index));
    set_half(meta, mid_to, half_at(tile, count + index));
    largest = std::max(largest, f16_to_f32(half_at(tile, index)));
  });
  *exponent = scale_exponent(largest);
}

void unpack_side(const SideShape& side, bool key, const uint8_t* part, uint8_t* tile) {
  const CodecSpec spec = side_spec(side);
  uint8_t* const tile_codes = tile + tile_scale_bytes(spec, side.head_dim);
  std::memset(tile, 0, tile_bytes(spec, side.head_dim));
  each_code(key, side.head_dim, [&](int token, int channel, const CodeCell& cell) {
    if (side.bits == 16) {
      set_half(tile, token * side.head_dim + channel, half_at(part, bit_address(16, cell, 0).half));
      return;
    }
    int code = 0;
    for (int b = 0; b < side.bits; ++b) {
      const BitAddress from = bit_address(side.bits, cell, b);
      code |= ((half_at(part, from.half) >> from.bit) & 1) << b;
    }
    const TilePlace to = tile_place(key, side.head_dim, token, channel);
    put_code(side.bits, tile_codes, to.unit, to.byte, code);
  });
  if (side.bits == 16) return;
  const int count = scale_count(spec, side.head_dim);
  const uint8_t* const meta = part + side.meta();
  each_scale(side, [&](int index, int scale_from, int mid_from) {
    set_half(tile, index, half_at(meta, scale_from));
    set_half(tile, count + index, half_at(meta, mid_from));
  });
}

// Trellis codes: bytes of scales and offsets in another order, codes in streams.
void pack_trellis(const SideShape& side, bool key, const uint8_t* tile, uint8_t* part, int32_t* exponent, int32_t* unit) {
  const int bits = code_bits(side.bits), width = side.head_dim;
  const CodecSpec spec = trellis_spec(bits, key ? Side::kKey : Side::kValue);
  const uint8_t* const tile_codes = tile + trellis_head_bytes(spec, width);
  for (int token = 0; token < kPageTokens; ++token) {
    for (int channel = 0; channel < width; ++channel) {
      const TilePlace from = tile_place(key, width, token, channel);
      put_stream_code(part, bits, key, token, channel, static_cast<uint32_t>(get_code(bits, tile_codes, from.unit, from.byte)));
    }
  }
  uint8_t* const scales = part + side.meta();
  const auto count = static_cast<int>(trellis_offsets_at(width));
  for (int i = 0; i < count; ++i) scales[i / kPageTokens * kPageTokens + trellis_scale_slot(key, i % kPageTokens)] = tile[i];
  if (key) {
    for (int c = 0; c < width; ++c) scales[count + trellis_offset_slot(c)] = tile[count + c];
  }
  const uint8_t largest = *std::max_element(tile, tile + count);
  *exponent = scale_exponent(trellis_scale(largest));
  if (key) *unit = largest;
}

void unpack_trellis(const SideShape& side, bool key, const uint8_t* part, uint8_t* tile) {
  const int bits = code_bits(side.bits), width = side.head_dim;
  const CodecSpec spec = trellis_spec(bits, key ? Side::kKey : Side::kValue);
  std::memset(tile, 0, trellis_bytes(spec, width));
  uint8_t* const tile_codes = tile + trellis_head_bytes(spec, width);
  for (int token = 0; token < kPageTokens; ++token) {
    for (int channel = 0; channel < width; ++channel) {
      const TilePlace to = tile_place(key, width, token, channel);
      put_code(bits, tile_codes, to.unit, to.byte, static_cast<int>(stream_code(part, bits, key, token, channel)));
    }
  }
  const uint8_t* const scales = part + side.meta();
  const auto count = static_cast<int>(trellis_offsets_at(width));
  for (int i = 0; i < count; ++i) tile[i] = scales[i / kPageTokens * kPageTokens + trellis_scale_slot(key, i % kPageTokens)];
  if (key) {
    for (int c = 0; c < width; ++c) tile[count + c] = scales[count + trellis_offset_slot(c)];
  }
}

}  // namespace

void record_from_tiles(const ThinShape& shape, const uint8_t* key_tile, const uint8_t* value_tile, uint8_t* record) {
  std::memset(record, 0, static_cast<size_t>(shape.bytes()));
  RecordHeader header{};
  header.key_width = shape.key_width;
  const auto pack = [&](const SideShape& side, bool key, const uint8_t* tile, uint8_t* part, int32_t* exponent) {
    if (side.trellis()) return pack_trellis(side, key, tile, part, exponent, &header.key_unit);
    pack_side(side, key, tile, part, exponent);
  };
  pack(shape.key(), true, key_tile, record + kHeaderBytes, &header.key_exponent);
  pack(shape.value(), false, value_tile, record + shape.key_bytes(), &header.value_exponent);
  std::memcpy(record, &header, sizeof header);
}

void tiles_from_record(const ThinShape& shape, const uint8_t* record, uint8_t* key_tile, uint8_t* value_tile) {
  const auto unpack = [](const SideShape& side, bool key, const uint8_t* part, uint8_t* tile) {
    side.trellis() ? unpack_trellis(side, key, part, tile) : unpack_side(side, key, part, tile);
  };
  unpack(shape.key(), true, record + kHeaderBytes, key_tile);
  unpack(shape.value(), false, record + shape.key_bytes(), value_tile);
}

}  // namespace kvmix::cuda
