// Between the CPU's encoded tiles (tile_layout.h) and the GPU's page record (codec/cuda/tile_layout.h), on the host.
#pragma once

#include <cstdint>

#include "codec/cuda/tile_layout.h"

namespace kvmix::cuda {

// Tiles are of int<bits>.channel.g<key_group>, zero point, and int<bits>.token.g<value_group>, zero point, or of
// trellis<bits>.zero and trellis<bits>.sym.
void record_from_tiles(const ThinShape& shape, const uint8_t* key_tile, const uint8_t* value_tile, uint8_t* record);
void tiles_from_record(const ThinShape& shape, const uint8_t* record, uint8_t* key_tile, uint8_t* value_tile);

}  // namespace kvmix::cuda
