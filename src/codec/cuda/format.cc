#include "codec/cuda/format.h"

#include "codec/trellis_code.h"

namespace kvmix::cuda {

namespace {
std::string side_name(int32_t bits, int32_t group, bool per_token) {
  if (is_trellis_width(bits)) return "trellis" + std::to_string(code_bits(bits));
  return "int" + std::to_string(bits) + (per_token ? ".token.g" : ".channel.g") + std::to_string(group);
}
}  // namespace

std::string format_name(const kvmix_cuda_format& f) {
  return side_name(f.key_bits, f.key_group, f.key_per_token != 0) + " keys, " + side_name(f.value_bits, f.value_group, true) +
         " values, head_dim " + std::to_string(f.head_dim);
}

void check_format(const kvmix_cuda_format& f) {
  const auto side = [](int32_t bits, int32_t group, bool offsets) {
    if (TrellisWidths::has(bits)) return group == kTrellisGroup && offsets;
    return Widths::has(bits) && (bits == 16 || Groups::has(group));
  };
  if (HeadDims::has(f.head_dim) && side(f.key_bits, f.key_group, f.key_per_token == 0) &&
      side(f.value_bits, f.value_group, true))
    return;
  throw Error(Status::kUnsupported, "no CUDA kernel for " + format_name(f) + "; there are widths " + Widths::text() +
                                        " in groups of " + Groups::text() + ", trellis codes of " + TrellisBits::text() +
                                        " bits in groups of 128 (keys with offsets), head_dim " + HeadDims::text());
}

}  // namespace kvmix::cuda
