#include <cstddef>
#include <type_traits>

#include "attention/cpu/latent_ops_body.h"
#include "base/simd_avx512.h"

namespace kvmix {

extern const LatentOps kAvx512LatentOps;
const LatentOps kAvx512LatentOps = ops<Avx512>("avx512", Avx512::available);

}  // namespace kvmix
