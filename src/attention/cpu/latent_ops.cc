// The portable operations, and which there are.
#include "attention/cpu/latent_ops.h"

#include <array>
#include <cstddef>
#include <type_traits>

#include "attention/cpu/latent_ops_body.h"

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

constexpr LatentOps kPortableLatentOps = ops<Portable>("portable", [] { return true; });

}  // namespace

#if defined(KVMIX_SIMD)
extern const LatentOps kAvx512LatentOps, kAvx2LatentOps;
#endif

namespace {

const std::array kOps = {
#if defined(KVMIX_SIMD)
    &kAvx512LatentOps,
    &kAvx2LatentOps,
#endif
    &kPortableLatentOps,
};

}  // namespace

std::span<const LatentOps* const> latent_ops_registry() { return kOps; }

const LatentOps& latent_ops(bool portable) {
  static const LatentOps& best = []() -> const LatentOps& {
    for (const LatentOps* each : kOps) {
      if (each->available()) return *each;
    }
    return kPortableLatentOps;
  }();
  return portable ? kPortableLatentOps : best;
}

}  // namespace kvmix
