#include "codec/encoders.h"

#include <array>

#include "base/fp16.h"
#include "codec/uniform.h"

namespace kvmix {

#if defined(KVMIX_SIMD)
extern const TileEncoder kAvx512TileEncoder, kAvx2TileEncoder;
extern const HalfEncoder kAvx512HalfEncoder, kAvx2HalfEncoder;
#endif

namespace {

bool always() { return true; }

const TileEncoder kSerialTileEncoder = {"serial", always, encode_uniform, encode_uniform_rows};

const HalfEncoder kSerialHalfEncoder = {"serial", always, [](const float* x, int n, uint16_t* out) {
                                          for (int i = 0; i < n; ++i) out[i] = f32_to_f16(x[i]);
                                        }};

const std::array kTileEncoders = {
#if defined(KVMIX_SIMD)
    &kAvx512TileEncoder,
    &kAvx2TileEncoder,
#endif
    &kSerialTileEncoder,
};

const std::array kHalfEncoders = {
#if defined(KVMIX_SIMD)
    &kAvx512HalfEncoder,
    &kAvx2HalfEncoder,
#endif
    &kSerialHalfEncoder,
};

}  // namespace

std::span<const TileEncoder* const> tile_encoders() { return kTileEncoders; }
std::span<const HalfEncoder* const> half_encoders() { return kHalfEncoders; }

void to_f16(const float* x, int n, uint16_t* out) {
  static const HalfEncoder& best = []() -> const HalfEncoder& {
    for (const HalfEncoder* encoder : kHalfEncoders) {
      if (encoder->available()) return *encoder;
    }
    return kSerialHalfEncoder;
  }();
  best.to_f16(x, n, out);
}

}  // namespace kvmix
