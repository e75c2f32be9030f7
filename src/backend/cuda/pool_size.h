// How the device's pool takes memory, by formula. Host code of every build.
#pragma once

#include <cstddef>

namespace kvmix::cuda {

inline constexpr size_t kSmallChunk = size_t{2} << 20, kLargeChunk = size_t{16} << 20;

// What is mapped at once if so much is mapped already; at most a chunk.
constexpr size_t part_bytes(size_t taken) { return taken < (size_t{1} << 30) ? kSmallChunk : kLargeChunk; }
// Memory is taken in chunks of this size, each for pages of one size: small ones where the limit is.
constexpr size_t chunk_bytes(size_t max_bytes) {
  return max_bytes == 0 || max_bytes >= (size_t{1} << 30) ? kLargeChunk : kSmallChunk;
}
// The most that pages of one size, this many bytes in all and none released, take beyond their own bytes.
constexpr size_t most_chunk_slack(size_t page_bytes, size_t bytes, size_t chunk) {
  if (bytes == 0) return 0;
  const size_t each = chunk / page_bytes * page_bytes;
  return (bytes + each - 1) / each * chunk - bytes;
}

}  // namespace kvmix::cuda
