#include "base/simd_avx512.h"
#include "codec/encode_simd.h"
#include "codec/encoders.h"

namespace kvmix {
namespace {

bool available() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
}

}  // namespace

extern const TileEncoder kAvx512TileEncoder;
const TileEncoder kAvx512TileEncoder = {"avx512", available, TileSeal<Avx512>::encode, TileSeal<Avx512>::encode_rows};

extern const HalfEncoder kAvx512HalfEncoder;
const HalfEncoder kAvx512HalfEncoder = {"avx512", available, TileSeal<Avx512>::to_f16};

}  // namespace kvmix
