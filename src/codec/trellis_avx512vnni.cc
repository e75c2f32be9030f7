#include "base/simd_avx512.h"
#include "codec/trellis_encode.h"

namespace kvmix {

extern const TileEncoder kAvx512TrellisEncoder;
const TileEncoder kAvx512TrellisEncoder = {"avx512", Avx512::available, encode_trellis, nullptr};

}  // namespace kvmix
