// The portable operations, and which there are.
#include "attention/cpu/float_ops.h"

#include <array>
#include <cstddef>
#include <type_traits>

#include "attention/cpu/float_ops_body.h"
#include "attention/scores.h"

namespace kvmix {
namespace {

struct Portable {
  static constexpr int kWidth = 4;
  struct V {
    float x[kWidth];
  };
  static V zero() { return {}; }
  static V set1(float x) { return {{x, x, x, x}}; }
  static V load(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static void store(float* p, const V& x) {
    for (int i = 0; i < kWidth; ++i) p[i] = x.x[i];
  }
  static V fma(const V& a, const V& b, V c) {
    for (int i = 0; i < kWidth; ++i) c.x[i] += a.x[i] * b.x[i];
    return c;
  }
  static float reduce_add(const V& x) { return (x.x[0] + x.x[1]) + (x.x[2] + x.x[3]); }
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
