#include "codec/record_cuda.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/fp16.h"
#include "codec/tile_layout.h"

namespace kvmix::cuda {
namespace {

CodecSpec side_spec(const RecordShape& shape, bool key) {
  CodecSpec spec;
  spec.bits = key ? shape.key_bits : shape.value_bits;
  spec.axis = key ? Axis::kChannel : Axis::kToken;
  spec.group = key ? shape.key_group : shape.value_group;
  return spec;
}

size_t tile_scale_bytes(const CodecSpec& spec) {
  const size_t bytes = static_cast<size_t>(scale_count(spec, kBlockChannels)) * 2 * sizeof(uint16_t);
  return (bytes + kVectorBytes - 1) / kVectorBytes * kVectorBytes;
}

// Calls visit(tile code unit, byte, address in the record's codes) for every code of a side.
template <class Visit>
void each_code(bool key, int bits, const Visit& visit) {
  const TileGeometry geometry = tile_geometry(key ? Side::kKey : Side::kValue, kBlockChannels);
  for (int token = 0; token < kPageTokens; ++token) {
    for (int channel = 0; channel < kBlockChannels; ++channel) {
      const int lane = key ? token : channel, reduce = key ? channel : token;
      visit(unit_index(geometry, lane, reduce), byte_in_unit(lane, reduce), code_address(key, bits, token, channel));
    }
  }
}

// Calls visit(scale index in the tile, byte offset of the scale, of the midpoint from the part's scales).
template <class Visit>
void each_scale(const RecordShape& shape, bool key, const Visit& visit) {
  const CodecSpec spec = side_spec(shape, key);
  const int groups = scale_groups(spec, kBlockChannels);
  for (int g = 0; g < groups; ++g) {
    for (int i = 0; i < 128; ++i) {  // channels of a key group, tokens of a value group
      const int index =
          key ? scale_index(spec, kBlockChannels, g * spec.group, i) : scale_index(spec, kBlockChannels, i, g * spec.group);
      if (key) {
        const int at = g * kBlockChannels + key_scale_slot(i);
        visit(index, 2 * at, 2 * (at + groups * kBlockChannels));
      } else {
        const int at = g * kPageTokens * 2 + value_scale_slot(i);
        visit(index, 2 * at, 2 * (at + 2));
      }
    }
  }
}

void pack_side(const RecordShape& shape, bool key, const uint8_t* tile, uint8_t* codes, uint8_t* meta, int32_t* exponent) {
  const CodecSpec spec = side_spec(shape, key);
  const uint8_t* const tile_codes = tile + tile_scale_bytes(spec);
  each_code(key, spec.bits, [&](int unit, int byte, CodeAddress to) {
    uint16_t half;
    std::memcpy(&half, codes + to.offset, sizeof half);
    half = static_cast<uint16_t>(half | (get_code(spec.bits, tile_codes, unit, byte) << to.bit));
    std::memcpy(codes + to.offset, &half, sizeof half);
  });
  const int count = scale_count(spec, kBlockChannels);
  float largest = 0.0f;
  each_scale(shape, key, [&](int index, int scale_at, int mid_at) {
    uint16_t scale;
    std::memcpy(&scale, tile + 2 * index, sizeof scale);
    std::memcpy(meta + scale_at, &scale, sizeof scale);
    std::memcpy(meta + mid_at, tile + 2 * (count + index), sizeof scale);
    largest = std::max(largest, f16_to_f32(scale));
  });
  *exponent = scale_exponent(largest);
}

void unpack_side(const RecordShape& shape, bool key, const uint8_t* codes, const uint8_t* meta, uint8_t* tile) {
  const CodecSpec spec = side_spec(shape, key);
  const size_t scale_bytes = tile_scale_bytes(spec);
  uint8_t* const tile_codes = tile + scale_bytes;
  std::memset(tile, 0, scale_bytes + static_cast<size_t>(code_bytes(spec.bits)));
  each_code(key, spec.bits, [&](int unit, int byte, CodeAddress from) {
    uint16_t half;
    std::memcpy(&half, codes + from.offset, sizeof half);
    put_code(spec.bits, tile_codes, unit, byte, (half >> from.bit) & ((1 << spec.bits) - 1));
  });
  const int count = scale_count(spec, kBlockChannels);
  each_scale(shape, key, [&](int index, int scale_at, int mid_at) {
    std::memcpy(tile + 2 * index, meta + scale_at, sizeof(uint16_t));
    std::memcpy(tile + 2 * (count + index), meta + mid_at, sizeof(uint16_t));
  });
}

}  // namespace

void record_from_tiles(const RecordShape& shape, const uint8_t* key_tile, const uint8_t* value_tile, uint8_t* record) {
  std::memset(record, 0, static_cast<size_t>(shape.bytes()));
  RecordHeader header{};
  pack_side(shape, true, key_tile, record + kHeaderBytes, record + shape.key_meta(), &header.key_exponent);
  uint8_t* const values = record + shape.key_bytes();
  pack_side(shape, false, value_tile, values, values + shape.value_meta(), &header.value_exponent);
  std::memcpy(record, &header, sizeof header);
}

void tiles_from_record(const RecordShape& shape, const uint8_t* record, uint8_t* key_tile, uint8_t* value_tile) {
  unpack_side(shape, true, record + kHeaderBytes, record + shape.key_meta(), key_tile);
  const uint8_t* const values = record + shape.key_bytes();
  unpack_side(shape, false, values, values + shape.value_meta(), value_tile);
}

}  // namespace kvmix::cuda
