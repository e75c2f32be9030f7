#include "codec/encoders.h"

#include <array>

#include "base/fp16.h"
#include "codec/row.h"

namespace kvmix {

#if defined(__x86_64__)
extern const TileEncoder kAvx512TileEncoder;
extern const TileEncoder kAvx2TileEncoder;
#endif

namespace {

const TileEncoder kSerialTileEncoder = {
    "serial",
    [] { return true; },
    encode_tile,
    [](const CodecSpec& spec, Side side, int head_dim, const uint16_t* x, const float* feedback, std::byte* tile) {
      encode_tile(spec, side, head_dim, x, tile);
      feedback_tile(spec, side, head_dim, x, feedback, tile);
    },
    [](const float* x, int n, uint16_t* out) {
      for (int i = 0; i < n; ++i) out[i] = f32_to_f16(x[i]);
    },
    encode_rows,
};

const std::array kEncoders = {
#if defined(__x86_64__)
    &kAvx512TileEncoder,
    &kAvx2TileEncoder,
#endif
    &kSerialTileEncoder,
};

}  // namespace

std::span<const TileEncoder* const> tile_encoders() { return kEncoders; }

const TileEncoder& best_tile_encoder() {
  static const TileEncoder& best = []() -> const TileEncoder& {
    for (const TileEncoder* encoder : kEncoders) {
      if (encoder->available()) return *encoder;
    }
    return kSerialTileEncoder;
  }();
  return best;
}

}  // namespace kvmix
