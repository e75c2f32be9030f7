// Which formats the CUDA code takes, once: widths, groups and head_dims as lists that checks, messages and dispatch share.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>

#include "codec/cuda/tile_layout.h"
#include "kvmix/error.h"
#include "kvmix/kvmix_cuda.h"

namespace kvmix::cuda {

template <int... values_>
struct List {
  static constexpr bool has(int v) { return ((v == values_) || ...); }
  // Calls body(std::integral_constant) for the entry that equals v; false where there is none.
  template <class Body>
  KVMIX_HOST_DEVICE static bool visit(int v, const Body& body) {
    return ((v == values_ && (body(std::integral_constant<int, values_>{}), true)) || ...);
  }
  template <class Body>
  static void each(const Body& body) {
    (body(values_), ...);
  }
  static std::string text() {
    std::string out;
    ((out += (out.empty() ? "" : ", ") + std::to_string(values_)), ...);
    return out;
  }
};
using CodeWidths = List<1, 2, 3, 4, 8>;  // 16, fp16 as it is, stands beside them
using Widths = List<1, 2, 3, 4, 8, 16>;
using TrellisWidths = List<kTrellis + 2, kTrellis + 3, kTrellis + 4, kTrellis + 5>;
using TrellisBits = List<2, 3, 4, 5>;
using Groups = List<32, 64, 128>;
using HeadDims = List<64, 96, 128, 256>;

inline void require(bool ok, const std::string& message) {
  if (!ok) throw Error(Status::kInvalidArgument, message);
}

std::string format_name(const kvmix_cuda_format& format);
// Throws kUnsupported for a format that no kernel takes.
void check_format(const kvmix_cuda_format& format);

inline bool has_trellis(const kvmix_cuda_format& f) { return is_trellis_width(f.key_bits) || is_trellis_width(f.value_bits); }
inline RecordShape record_shape(const kvmix_cuda_format& f) {
  return {f.head_dim, f.key_bits, f.value_bits, f.key_group, f.value_group, f.key_per_token != 0};
}

}  // namespace kvmix::cuda
