#include <immintrin.h>

#include <cstddef>
#include <type_traits>

#include "attention/cpu/latent_ops_body.h"

namespace kvmix {
namespace {

struct Vector {
  using Type = __m512;
  static constexpr int kWidth = 16;
  static Type zero() { return _mm512_setzero_ps(); }
  static Type set(float x) { return _mm512_set1_ps(x); }
  static Type load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Type x) { _mm512_storeu_ps(p, x); }
  static Type add_product(Type a, Type b, Type c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(Type x) { return _mm512_reduce_add_ps(x); }
};

// As this file's flags: the compiler may use any of them.
bool available() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
}

}  // namespace

extern const LatentOps kAvx512LatentOps;
const LatentOps kAvx512LatentOps = ops<Vector>("avx512", available);

}  // namespace kvmix
