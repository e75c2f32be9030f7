// Attention with int8 dot products of 256 bits (AVX-VNNI): for processors that have them without AVX-512, such as Intel's Core
// since the twelfth generation.
#include "attention/cpu/int8_avx2.h"

namespace kvmix {
namespace {

struct Dpbusd {
  static constexpr bool kWholeBytes = true;
  // 32-bit sums hold a whole tile: 256 products of at most 255 * 128.
  static constexpr int run(int) { return kMaxDim; }

  static __m256i add(__m256i sum, __m256i codes, __m256i weights) { return _mm256_dpbusd_avx_epi32(sum, codes, weights); }
  static __m256i widen(__m256i sum) { return sum; }
};

bool available() { return Avx2::available() && __builtin_cpu_supports("avxvnni"); }

}  // namespace

extern const AttentionKernel kAvxVnniKernel;
const AttentionKernel kAvxVnniKernel = {
    "avx-vnni",
    "AVX-VNNI: int8 dot products of 256 bits on packed codes, fp32 for fp16 rows",
    available,
    Flow<Int8Avx2<Dpbusd>>::supports,
    Flow<Int8Avx2<Dpbusd>>::scratch_bytes,
    Flow<Int8Avx2<Dpbusd>>::attend,
};

}  // namespace kvmix
