#include <cstddef>
#include <type_traits>

#include "attention/cpu/float_ops_body.h"
#include "base/simd_avx512.h"

namespace kvmix {

extern const FloatOps kAvx512FloatOps;
const FloatOps kAvx512FloatOps = ops<Avx512>("avx512", Avx512::available);

}  // namespace kvmix
