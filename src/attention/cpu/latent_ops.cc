// The portable operations, and which there are.
#include "attention/cpu/latent_ops.h"

#include <array>
#include <cstddef>
#include <type_traits>

#include "attention/cpu/latent_ops_body.h"

namespace kvmix {
namespace {

struct Vector {
  static constexpr int kWidth = 4;
  struct Type {
    float x[kWidth];
  };
  static Type zero() { return {}; }
  static Type set(float x) { return {{x, x, x, x}}; }
  static Type load(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static void store(float* p, const Type& x) {
    for (int i = 0; i < kWidth; ++i) p[i] = x.x[i];
  }
  static Type add_product(const Type& a, const Type& b, Type c) {
    for (int i = 0; i < kWidth; ++i) c.x[i] += a.x[i] * b.x[i];
    return c;
  }
  static float sum(const Type& x) { return (x.x[0] + x.x[1]) + (x.x[2] + x.x[3]); }
};

constexpr LatentOps kPortableLatentOps = ops<Vector>("portable", [] { return true; });

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
