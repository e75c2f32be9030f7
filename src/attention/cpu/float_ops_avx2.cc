#include <cstddef>
#include <type_traits>

#include "attention/cpu/float_ops_body.h"
#include "base/simd_avx2.h"

namespace kvmix {

extern const FloatOps kAvx2FloatOps;
const FloatOps kAvx2FloatOps = ops<Avx2>("avx2", Avx2::available);

}  // namespace kvmix
