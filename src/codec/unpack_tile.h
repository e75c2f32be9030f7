// Codes of a tile that is read whole.
#pragma once

#include <cstdint>

#include "kvmix/codec.h"

namespace kvmix {

// `codes`: a tile's codes (tile_layout.h) of a width that has a layout. out: a byte each, [kPageTokens][width].
void unpack_tile(int bits, const uint8_t* codes, Side side, int width, uint8_t* out);

}  // namespace kvmix
