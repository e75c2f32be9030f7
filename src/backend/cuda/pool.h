// Pages in device memory: one range of addresses, cut into chunks for pages of one size each, into which memory is mapped as
// pages need it: a part of a chunk at a time while there is little, so that small caches take little, then whole chunks.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <set>
#include <vector>

#include "backend/cuda/layer_format.h"
#include "backend/cuda/pool_size.h"

namespace kvmix::cuda {

struct DriverCalls;  // of virtual memory, which the runtime does not offer

// Not thread safe. A page is known by its unit: base() + unit * kPageUnit is its address, for as long as it lives.
class DevicePool {
 public:
  // Of the current device. `stream` is the one on which all work with pages is queued: chunks are given back behind it.
  DevicePool(size_t max_bytes, cudaStream_t stream);
  ~DevicePool();
  DevicePool(const DevicePool&) = delete;
  DevicePool& operator=(const DevicePool&) = delete;

  // Of `bytes`, a multiple of kPageUnit and at most a chunk. Throws kOutOfMemory at the limit, which pages and chunks each
  // keep to (the limit counts as whole chunks for these), or when the device refuses.
  uint32_t allocate(size_t bytes);
  void release(uint32_t unit, size_t bytes);
  // Gives chunks without a page back, all but a few that decoding takes again at once, or twice as many while the device has
  // work that it would have to wait for; all of them where no page is left.
  void trim();

  size_t used_bytes() const { return used_; }
  size_t taken_bytes() const { return taken_; }
  std::byte* base() const { return reinterpret_cast<std::byte*>(base_); }

 private:
  struct Memory {
    unsigned long long handle;
    size_t bytes;
  };
  struct Chunk {
    std::vector<Memory> memory;  // mapped from the chunk's beginning on
    size_t mapped = 0;
    size_t bytes = 0;  // of its pages; 0: it has none
    uint32_t carved = 0, live = 0;
    std::vector<uint32_t> free;  // pages to use again
  };

  // Maps memory to a chunk until so many bytes are there.
  void map(uint32_t index, size_t bytes);
  [[noreturn]] void throw_limit() const;
  void unmap(Chunk& chunk, uint32_t index);

  const DriverCalls& driver_;
  cudaStream_t stream_;
  int device_;
  size_t max_bytes_, chunk_bytes_, range_bytes_ = 0;
  unsigned long long base_ = 0;
  size_t used_ = 0, taken_ = 0;
  std::vector<Chunk> chunks_;  // of the range
  // Of pages of one size: chunks with room, the first is filled first. There are few sizes.
  struct Size {
    size_t bytes;
    std::set<uint32_t> open;
  };
  std::set<uint32_t>& open_chunks(size_t bytes);
  std::vector<Size> sizes_;
  size_t recent_ = 0;            // of sizes_: pages of one size follow each other
  std::vector<uint32_t> spare_;  // mapped, without a page
  std::set<uint32_t> unmapped_;
};

}  // namespace kvmix::cuda
