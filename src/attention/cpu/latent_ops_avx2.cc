#include <cstddef>
#include <type_traits>

#include "attention/cpu/latent_ops_body.h"
#include "base/simd_avx2.h"

namespace kvmix {
namespace {

// As this file's flags: the compiler may use any of them.
bool available() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }

}  // namespace

extern const LatentOps kAvx2LatentOps;
const LatentOps kAvx2LatentOps = ops<Avx2>("avx2", available);

}  // namespace kvmix
