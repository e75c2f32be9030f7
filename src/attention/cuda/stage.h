// How the decode kernel holds a record: what lies where in a warp's two buffers of shared memory.
#pragma once

#include <algorithm>
#include <bit>

#include "codec/cuda/tile_layout.h"

namespace kvmix::cuda {

inline constexpr int kMaxSplits = 256;  // of a head
// Of a block of the decode kernel: most warps, those of the kernel that takes the most registers, those that stay, query rows.
inline constexpr int kMaxWarps = 12, kFewWarps = 8, kWarps = 4, kRows = 8;
inline constexpr int kQueryLift = 12;  // queries stand at up to 2^this

KVMIX_HOST_DEVICE constexpr int query_bytes(int head_dim) { return head_dim / 16 * 32 * 8; }
KVMIX_HOST_DEVICE constexpr int merge_row(int head_dim) { return head_dim + 8; }  // floats, without bank conflicts

struct Stage {
  int key_bits, value_bits;
  int key_groups;                       // of tokens
  int value_groups, value_group_shift;  // of channels
  // Both copies of a record start at a 128-byte line of it, that of the values value_shift bytes before them.
  int key_bytes, value_begin, value_shift, value_bytes;
  int key_pitch, ring;  // ring: both buffers of a warp
  // Levels of trellis codes (trellis.cuh), once a block: of keys first, of values value_table bytes further.
  int table_bytes, value_table;
};
inline constexpr int kLevelTableBytes = 256 * 32 * 4;  // and a multiple of it is where they begin, behind the rings

template <class Shape>  // RecordShape or ThinShape
Stage stage_of(const Shape& shape) {
  const auto log2 = [](int v) { return std::bit_width(static_cast<unsigned>(v)) - 1; };
  const auto whole_lines = [](int bytes) { return (bytes + 127) / 128 * 128; };
  Stage s{};
  s.key_bits = shape.key_bits, s.value_bits = shape.value_bits;
  s.key_groups = shape.key_groups();
  s.value_groups = shape.value_groups(), s.value_group_shift = log2(shape.value_group);
  s.key_bytes = shape.key_bytes();
  s.value_begin = s.key_bytes / 128 * 128, s.value_shift = s.key_bytes - s.value_begin;
  s.value_bytes = s.value_shift + shape.value().bytes();
  s.key_pitch = whole_lines(s.key_bytes);
  // A warp's part of the merge and its share of the sums of all splits lie there too.
  s.ring = std::max({s.key_pitch + whole_lines(s.value_bytes), whole_lines(kRows * (merge_row(shape.head_dim) + 2) * 4),
                     kRows * kMaxSplits * 8 / kWarps});
  s.value_table = is_trellis_width(shape.key_bits) && shape.key_bits != shape.value_bits ? kLevelTableBytes : 0;
  s.table_bytes = is_trellis_width(shape.value_bits) ? s.value_table + kLevelTableBytes
                  : is_trellis_width(shape.key_bits) ? kLevelTableBytes
                                                     : 0;
  return s;
}
inline int decode_shared_bytes(const Stage& stage, int head_dim, int warps) {
  const int rings = query_bytes(head_dim) + warps * stage.ring;
  if (stage.table_bytes == 0) return rings;
  constexpr int kLeastBefore = 1024, kMostBefore = 2048;  // of shared memory: the system's, and what the kernel declares
  return (kMostBefore + rings + kLevelTableBytes - 1) / kLevelTableBytes * kLevelTableBytes - kLeastBefore + stage.table_bytes;
}

}  // namespace kvmix::cuda
