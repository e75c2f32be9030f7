#include "base/simd_avx512.h"
#include "codec/encode_simd.h"
#include "codec/encoders.h"

namespace kvmix {

extern const TileEncoder kAvx512TileEncoder;
const TileEncoder kAvx512TileEncoder = {"avx512", Avx512::available, TileSeal<Avx512>::encode, TileSeal<Avx512>::encode_rows};

extern const HalfEncoder kAvx512HalfEncoder;
const HalfEncoder kAvx512HalfEncoder = {"avx512", Avx512::available, TileSeal<Avx512>::to_f16};

}  // namespace kvmix
