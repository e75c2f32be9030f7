#include "base/simd_avx2.h"
#include "codec/trellis_encode.h"

namespace kvmix {

extern const TileEncoder kAvx2TrellisEncoder;
const TileEncoder kAvx2TrellisEncoder = {"avx2", Avx2::available, encode_trellis, nullptr};

}  // namespace kvmix
