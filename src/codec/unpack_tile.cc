#include "codec/unpack_tile.h"

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "codec/tile_layout.h"

namespace kvmix {
namespace {

// All codes of a block of 8 units, a byte each.
template <int kBits>
void unpack_block(const uint8_t* block, uint8_t* out) {
  for (int f = 0; f < kBlockUnits; ++f) {
    for (int i = 0; i < kUnitCodes; ++i) out[f * kUnitCodes + i] = static_cast<uint8_t>(get_code(kBits, block, f, i));
  }
}

}  // namespace

void unpack_tile(int bits, const uint8_t* codes, Side side, int width, uint8_t* out) {
  using Unpack = void (*)(const uint8_t*, uint8_t*);
  const Unpack unpack = with_code_bits(bits, [](auto b) -> Unpack { return unpack_block<b()>; });
  const TileGeometry geometry = tile_geometry(side, width);
  const int lane_blocks = geometry.lanes / kUnitLanes, quads = geometry.reduce / kUnitReduce;
  uint8_t block[kBlockUnits * kUnitCodes];
  int unit = 0;
  for (int first = 0; first < lane_blocks; first += kLaneGroupBlocks) {
    const int in_group = std::min(kLaneGroupBlocks, lane_blocks - first);
    for (int quad = 0; quad < quads; ++quad) {
      for (int b = 0; b < in_group; ++b, ++unit) {
        if (unit % kBlockUnits == 0) unpack(codes + static_cast<ptrdiff_t>(unit / kBlockUnits) * bits * kVectorBytes, block);
        const uint8_t* q = block + (unit % kBlockUnits) * kUnitCodes;
        const int lane = (first + b) * kUnitLanes, reduce = quad * kUnitReduce;
        if (side == Side::kKey) {
          for (int i = 0; i < kUnitLanes; ++i) std::memcpy(out + (lane + i) * width + reduce, q + i * kUnitReduce, kUnitReduce);
        } else {
          for (int r = 0; r < kUnitReduce; ++r) {
            for (int i = 0; i < kUnitLanes; ++i) out[(reduce + r) * width + lane + i] = q[i * kUnitReduce + r];
          }
        }
      }
    }
  }
}

}  // namespace kvmix
