// The portable operations, and which there are.
#include "attention/cpu/float_ops.h"

#include <array>
#include <cstddef>
#include <cstring>
#include <type_traits>

#include "attention/cpu/float_ops_body.h"
#include "attention/scores.h"

namespace kvmix {
namespace {

struct Portable {
  static constexpr int kWidth = 4;
  using V = float __attribute__((vector_size(16)));
  static V zero() { return V{}; }
  static V set1(float x) { return V{x, x, x, x}; }
  static V load(const float* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
  static V fma(V a, V b, V c) { return c + a * b; }
  static float reduce_add(V x) { return (x[0] + x[1]) + (x[2] + x[3]); }
};

constexpr FloatOps kPortableFloatOps = ops<Portable>(
    "portable", [] { return true; },
    [](float* x, size_t n, float scale, float softcap) {
      kvmix::weigh({x, n}, scale, softcap);
    });

}  // namespace

#if defined(KVMIX_SIMD)
extern const FloatOps kAvx512FloatOps, kAvx2FloatOps;
#endif

namespace {

const std::array kOps = {
#if defined(KVMIX_SIMD)
    &kAvx512FloatOps,
    &kAvx2FloatOps,
#endif
    &kPortableFloatOps,
};

}  // namespace

std::span<const FloatOps* const> float_ops_registry() { return kOps; }

const FloatOps& float_ops(bool portable) {
  static const FloatOps& best = []() -> const FloatOps& {
    for (const FloatOps* each : kOps) {
      if (each->available()) return *each;
    }
    return kPortableFloatOps;
  }();
  return portable ? kPortableFloatOps : best;
}

}  // namespace kvmix
