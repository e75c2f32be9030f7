#include <immintrin.h>

#include <cstddef>
#include <type_traits>

#include "attention/cpu/latent_ops_body.h"

namespace kvmix {
namespace {

struct Vector {
  using Type = __m256;
  static constexpr int kWidth = 8;
  static Type zero() { return _mm256_setzero_ps(); }
  static Type set(float x) { return _mm256_set1_ps(x); }
  static Type load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Type x) { _mm256_storeu_ps(p, x); }
  static Type add_product(Type a, Type b, Type c) { return _mm256_fmadd_ps(a, b, c); }
  static float sum(Type x) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
  }
};

bool available() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

}  // namespace

extern const LatentOps kAvx2LatentOps;
const LatentOps kAvx2LatentOps = ops<Vector>("avx2", available);

}  // namespace kvmix
