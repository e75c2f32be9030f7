#include "base/simd_avx2.h"
#include "codec/encode_simd.h"
#include "codec/encoders.h"

namespace kvmix {
namespace {

bool available() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }

}  // namespace

extern const TileEncoder kAvx2TileEncoder;
const TileEncoder kAvx2TileEncoder = {"avx2", available, TileSeal<Avx2>::encode, TileSeal<Avx2>::encode_rows};

extern const HalfEncoder kAvx2HalfEncoder;
const HalfEncoder kAvx2HalfEncoder = {"avx2", available, TileSeal<Avx2>::to_f16};

}  // namespace kvmix
