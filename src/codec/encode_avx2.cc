#include "base/simd_avx2.h"
#include "codec/encode_simd.h"
#include "codec/encoders.h"

namespace kvmix {

extern const TileEncoder kAvx2TileEncoder;
const TileEncoder kAvx2TileEncoder = {"avx2", Avx2::available, TileSeal<Avx2>::encode, TileSeal<Avx2>::encode_rows};

extern const HalfEncoder kAvx2HalfEncoder;
const HalfEncoder kAvx2HalfEncoder = {"avx2", Avx2::available, TileSeal<Avx2>::to_f16};

}  // namespace kvmix
