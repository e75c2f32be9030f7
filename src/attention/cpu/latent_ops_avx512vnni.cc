#include <cstddef>
#include <type_traits>

#include "attention/cpu/latent_ops_body.h"
#include "base/simd_avx512.h"

namespace kvmix {
namespace {

// As this file's flags: the compiler may use any of them.
bool available() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
}

}  // namespace

extern const LatentOps kAvx512LatentOps;
const LatentOps kAvx512LatentOps = ops<Avx512>("avx512", available);

}  // namespace kvmix
