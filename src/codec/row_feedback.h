// Codes of rows with error feedback, channel after channel: the order of operations of feedback_tile. Compile without
// contraction into fused multiply-adds. Internal linkage: included once per instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/fp16.h"
#include "codec/quantize.h"
#include "codec/tile_layout.h"

namespace kvmix {
namespace {

// Writes the codes of kRows records that have their scales; rows side by side hide each other's latency. add_error(wanted,
// column, error, first, width) adds column[k] * error to wanted[k] for the channels k >= first at least; weights of earlier
// ones are 0.
template <int kRows, class AddError>
inline void encode_with_feedback(const CodecSpec& spec, int width, const float* x, const float* columns, std::byte* records,
                                 AddError add_error) {
  const int groups = scale_groups(spec, width);
  const size_t bytes = uniform_record_bytes(spec, width), codes_at = bytes - static_cast<size_t>(width);
  const float centre = code_centre(spec.bits), top = static_cast<float>((1 << spec.bits) - 1);
  const auto finite = [](float v) { return std::isfinite(v) ? v : 0.0f; };
  const auto half = [](const std::byte* from) {
    uint16_t h;
    std::memcpy(&h, from, 2);
    return f16_to_f32(h);
  };
  alignas(64) float wanted[kRows][kMostWidth];
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < width; ++c) wanted[r][c] = finite(x[r * width + c]);
  }
  for (int g = 0; g < groups; ++g) {
    const int end = std::min(width, (g + 1) * spec.group);
    float scale[kRows], mid[kRows];
    CodeMap map[kRows];
    for (int r = 0; r < kRows; ++r) {
      const std::byte* record = records + static_cast<size_t>(r) * bytes;
      scale[r] = half(record + g * 2);
      mid[r] = spec.zero_point ? half(record + (groups + g) * 2) : 0.0f;
      map[r] = code_map(scale[r], mid[r], top);
    }
    for (int c = g * spec.group; c < end; ++c) {
      float error[kRows];
      for (int r = 0; r < kRows; ++r) {
        const float code = quantize_code(finite(wanted[r][c]), map[r], top);
        records[static_cast<size_t>(r) * bytes + codes_at + static_cast<size_t>(c)] = static_cast<std::byte>(code);
        error[r] = finite(x[r * width + c]) - (mid[r] + scale[r] * (code - centre));
      }
      const float* column = columns + static_cast<ptrdiff_t>(c) * width;
      for (int r = 0; r < kRows; ++r) add_error(wanted[r], column, error[r], c + 1, width);
    }
  }
}

// Of any number of rows.
template <class AddError>
inline void encode_with_feedback(int n, const CodecSpec& spec, int width, const float* x, const float* columns,
                                 std::byte* records, AddError add_error) {
  const size_t bytes = uniform_record_bytes(spec, width);
  int r = 0;
  for (; r + 4 <= n; r += 4)
    encode_with_feedback<4>(spec, width, x + r * width, columns, records + static_cast<size_t>(r) * bytes, add_error);
  for (; r < n; ++r)
    encode_with_feedback<1>(spec, width, x + r * width, columns, records + static_cast<size_t>(r) * bytes, add_error);
}

}  // namespace
}  // namespace kvmix
