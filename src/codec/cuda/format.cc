#include "codec/cuda/format.h"

#include <cstdio>

namespace kvmix::cuda {

std::string format_name(const kvmix_cuda_format& f) {
  char text[160];
  std::snprintf(text, sizeof text, "int%d.%s.g%d keys, int%d.token.g%d values, head_dim %d", f.key_bits,
                f.key_per_token != 0 ? "token" : "channel", f.key_group, f.value_bits, f.value_group, f.head_dim);
  return text;
}

void check_format(const kvmix_cuda_format& f) {
  const auto group = [](int32_t g, int32_t bits) { return bits == 16 || Groups::has(g); };
  if (HeadDims::has(f.head_dim) && Widths::has(f.key_bits) && Widths::has(f.value_bits) && group(f.key_group, f.key_bits) &&
      group(f.value_group, f.value_bits))
    return;
  throw Error(Status::kUnsupported, "no CUDA kernel for " + format_name(f) + "; there are widths " + Widths::text() +
                                        ", groups " + Groups::text() + ", head_dim " + HeadDims::text());
}

}  // namespace kvmix::cuda
