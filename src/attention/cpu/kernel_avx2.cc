// Attention with AVX2 int8 products (vpmaddubsw). Sums stay in 16 bits as long as they cannot saturate; 8-bit codes go as two
// nibbles.
#include "attention/cpu/int8_avx2.h"

namespace kvmix {
namespace {

struct Maddubs {
  static constexpr bool kWholeBytes = false;
  // Each 16-bit sum gains two products of a pair of codes per block.
  static constexpr int run(int largest) { return 32767 / (2 * 2 * largest * 128); }

  static __m256i add(__m256i sum, __m256i codes, __m256i weights) {
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, weights));
  }
  static __m256i widen(__m256i sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
};

}  // namespace

extern const AttentionKernel kAvx2Kernel;
const AttentionKernel kAvx2Kernel = {
    "avx2",
    "AVX2 and FMA: int8 products on packed codes, fp32 for fp16 rows",
    Avx2::available,
    Flow<Int8Avx2<Maddubs>>::supports,
    Flow<Int8Avx2<Maddubs>>::scratch_bytes,
    Flow<Int8Avx2<Maddubs>>::attend,
};

}  // namespace kvmix
