#include <cstddef>
#include <type_traits>

#include "attention/cpu/latent_ops_body.h"
#include "base/simd_avx2.h"

namespace kvmix {

extern const LatentOps kAvx2LatentOps;
const LatentOps kAvx2LatentOps = ops<Avx2>("avx2", Avx2::available);

}  // namespace kvmix
