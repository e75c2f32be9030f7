// What of a layer the CUDA backend can hold and attend to, and the bytes of its pages. Host code of every build.
#pragma once

#include <cstddef>
#include <string>

#include "codec/cuda/format.h"
#include "kvmix/cache.h"

namespace kvmix::cuda {

// Pages stand at multiples of this many bytes: their number from the pool's beginning is the id that kernels take.
inline constexpr size_t kPageUnit = 128;
constexpr size_t whole_units(size_t bytes) { return (bytes + kPageUnit - 1) / kPageUnit * kPageUnit; }

// The record of a layer's sealed pages; of a layer that stays fp16, one of fp16 sides, which is never written. Throws
// kUnsupported naming `where` for what the device has no code for.
kvmix_cuda_format layer_format(const LayerConfig& layer, const std::string& where);

// The record of a layer's sealed pages of so many chosen key channels. Throws as layer_format, and where channels of a token
// share scales.
ThinShape thin_shape(const LayerConfig& layer, int key_width, const std::string& where);

size_t record_bytes(const ThinShape& shape);  // in the pool
size_t record_bytes(const kvmix_cuda_format& format);
size_t open_bytes(int slots, int head_dim);  // fp16 keys, then values

// A layer's open pages: of 16-bit sides fp16 rows next to each other, else a record of 8-bit rows (codec/cuda/tile_layout.h).
// Throws as layer_format, which asks this too.
kvmix_cuda_format open_format(const LayerConfig& layer, const std::string& where);

}  // namespace kvmix::cuda
