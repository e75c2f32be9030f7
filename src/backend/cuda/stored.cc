// Pages on their way to the host: what they hold, and as files write them, which are the CPU's. Recent rows are fp16 here
// whatever the plan's `recent` says; a file holds them as the plan says.
#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <new>

#include "backend/cuda/cuda_backend.h"
#include "base/cuda/launch.h"
#include "base/fp16.h"
#include "codec/cuda/record.h"
#include "codec/row.h"

namespace kvmix::cuda {
namespace {

constexpr std::align_val_t kTileAlignment{64};
struct FreeTile {
  void operator()(std::byte* tile) const { operator delete[](tile, kTileAlignment); }
};
using Tile = std::unique_ptr<std::byte[], FreeTile>;
Tile make_tile(const TileFormat& format) { return Tile(new (kTileAlignment) std::byte[format.bytes]); }

struct Tiles {
  explicit Tiles(const PageFormat& format) : key(make_tile(format.key)), value(make_tile(format.value)) {}
  Tile key, value;
};

uint8_t* bytes_of(std::byte* p) { return reinterpret_cast<uint8_t*>(p); }
const uint8_t* bytes_of(const std::byte* p) { return reinterpret_cast<const uint8_t*>(p); }

size_t saved_row_bytes(const TileFormat& side) {
  return side.spec.is_f16() ? static_cast<size_t>(side.width) * sizeof(uint16_t) : row_bytes(side.spec, side.width);
}
// Of an open page's fp16 rows, keys before values.
size_t side_offset(const PageFormat& format, Side side) {
  return side == Side::kKey ? 0
                            : static_cast<size_t>(format.slots) * static_cast<size_t>(format.value.width) * sizeof(uint16_t);
}

}  // namespace

// A layer whose pages have this format; what a record looks like is the same for all.
const CudaBackend::Layer& CudaBackend::layer_of(const PageFormat& format) const {
  return *std::find_if(layers_.begin(), layers_.end(),
                       [&](const Layer& layer) { return &formats_[layer.ids.sealed] == &format; });
}

std::vector<std::byte> CudaBackend::host_copy(const PageEntry& page) const {
  use_device();
  join();
  std::vector<std::byte> bytes(format(page).bytes);
  check_cuda(cudaMemcpyAsync(bytes.data(), memory(page.handle), bytes.size(), cudaMemcpyDeviceToHost, stream_.get()),
             "read a page");
  check_cuda(cudaStreamSynchronize(stream_.get()), "read a page");
  return bytes;
}

void CudaBackend::read(const PageEntry& page, Side side, float* rows) const {
  const PageFormat& f = format(page);
  const TileFormat& t = side == Side::kKey ? f.key : f.value;
  const std::vector<std::byte> bytes = host_copy(page);
  const auto width = static_cast<size_t>(t.width), numbers = static_cast<size_t>(page.live) * width;
  if (f.appendable()) {
    const auto* const halves = reinterpret_cast<const uint16_t*>(bytes.data() + side_offset(f, side));
    for (size_t i = 0; i < numbers; ++i) rows[i] = f16_to_f32(halves[i]);
    return;
  }
  const Tiles tiles(f);
  tiles_from_record(record_shape(layer_of(f).format), bytes_of(bytes.data()), bytes_of(tiles.key.get()),
                    bytes_of(tiles.value.get()));
  std::vector<float> all(kPageTokens * width);
  codec_of(t.spec).decode(t.spec, t.shape(), side == Side::kKey ? tiles.key.get() : tiles.value.get(), all.data());
  std::copy_n(all.begin(), numbers, rows);
}

size_t CudaBackend::saved_bytes(const PageFormat& f, int live) const {
  if (!f.appendable()) return f.key.bytes + f.value.bytes;
  return static_cast<size_t>(live) * (saved_row_bytes(f.key) + saved_row_bytes(f.value));
}

void CudaBackend::save(const PageEntry& page, std::string& to) const {
  const PageFormat& f = format(page);
  const std::vector<std::byte> bytes = host_copy(page);
  const auto add = [&](const std::byte* from, size_t n) { to.append(reinterpret_cast<const char*>(from), n); };
  if (!f.appendable()) {
    const Tiles tiles(f);
    tiles_from_record(record_shape(layer_of(f).format), bytes_of(bytes.data()), bytes_of(tiles.key.get()),
                      bytes_of(tiles.value.get()));
    add(tiles.key.get(), f.key.bytes);
    add(tiles.value.get(), f.value.bytes);
    return;
  }
  for (const TileFormat* side : {&f.key, &f.value}) {
    const std::byte* const rows = bytes.data() + side_offset(f, side->side);
    const auto width = static_cast<size_t>(side->width);
    if (side->spec.is_f16()) {
      add(rows, static_cast<size_t>(page.live) * width * sizeof(uint16_t));
      continue;
    }
    std::array<float, kMostWidth> row;
    std::array<std::byte, kMostRowBytes> record;
    for (int t = 0; t < page.live; ++t) {
      for (size_t c = 0; c < width; ++c) {
        uint16_t half;
        std::memcpy(&half, rows + (static_cast<size_t>(t) * width + c) * sizeof half, sizeof half);
        row[c] = f16_to_f32(half);
      }
      encode_rows(side->spec, side->width, 1, row.data(), nullptr, record.data());
      add(record.data(), saved_row_bytes(*side));
    }
  }
}

void CudaBackend::load(const PageEntry& page, const char* from) {
  use_device();
  join();
  const PageFormat& f = format(page);
  std::vector<std::byte> bytes(f.bytes);
  if (!f.appendable()) {
    const Tiles tiles(f);
    std::memcpy(tiles.key.get(), from, f.key.bytes);
    std::memcpy(tiles.value.get(), from + f.key.bytes, f.value.bytes);
    record_from_tiles(record_shape(layer_of(f).format), bytes_of(tiles.key.get()), bytes_of(tiles.value.get()),
                      bytes_of(bytes.data()));
  } else {
    for (const TileFormat* side : {&f.key, &f.value}) {
      std::byte* const rows = bytes.data() + side_offset(f, side->side);
      const size_t record = saved_row_bytes(*side), width = static_cast<size_t>(side->width);
      for (int t = 0; t < page.live; ++t, from += record) {
        std::byte* const to = rows + static_cast<size_t>(t) * width * sizeof(uint16_t);
        if (side->spec.is_f16()) {
          std::memcpy(to, from, record);
          continue;
        }
        std::array<float, kMostWidth> row;
        std::array<uint16_t, kMostWidth> halves;
        decode_row(side->spec, side->width, reinterpret_cast<const std::byte*>(from), row.data());
        for (size_t c = 0; c < width; ++c) halves[c] = f32_to_f16(row[c]);
        std::memcpy(to, halves.data(), width * sizeof(uint16_t));
      }
    }
  }
  check_cuda(cudaMemcpyAsync(memory(page.handle), bytes.data(), bytes.size(), cudaMemcpyHostToDevice, stream_.get()),
             "load a page");
  check_cuda(cudaStreamSynchronize(stream_.get()), "load a page");
}

}  // namespace kvmix::cuda
