// Pages on their way to the host: what they hold, and as files write them, which are the CPU's.
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
Tile make_tile(const TileFormat& format) { return Tile(new (kTileAlignment) std::byte[format.bytes]()); }

struct Tiles {
  explicit Tiles(const PageFormat& format) : key(make_tile(format.key)), value(make_tile(format.value)) {}
  Tile key, value;
};

uint8_t* bytes_of(std::byte* p) { return reinterpret_cast<uint8_t*>(p); }
const uint8_t* bytes_of(const std::byte* p) { return reinterpret_cast<const uint8_t*>(p); }

size_t saved_row_bytes(const TileFormat& side) {
  return side.spec.is_f16() ? static_cast<size_t>(side.width) * sizeof(uint16_t) : row_bytes(side.spec, side.width);
}
// Of a page of fp16 rows, keys before values.
size_t side_offset(const PageFormat& format, Side side) {
  return side == Side::kKey ? 0
                            : static_cast<size_t>(format.slots) * static_cast<size_t>(format.value.width) * sizeof(uint16_t);
}

}  // namespace

// What a page that is not rows looks like: the same in all layers that have its format.
ThinShape CudaBackend::shape_of(const PageFormat& format) const {
  for (const Layer& layer : layers_) {
    if (&formats_[layer.ids.sealed] == &format) return {record_shape(layer.format)};
    if (&formats_[layer.ids.recent] == &format) return {layer.open};
    if (layer.ids.thins && &formats_[layer.ids.thin] == &format) return layer.thin;
  }
  throw Error(Status::kInternal, "a page of a format that no layer has");
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
  if (is_rows(f)) {
    const auto* const halves = reinterpret_cast<const uint16_t*>(bytes.data() + side_offset(f, side));
    for (size_t i = 0; i < numbers; ++i) rows[i] = f16_to_f32(halves[i]);
    return;
  }
  const Tiles tiles(f);
  tiles_from_record(shape_of(f), bytes_of(bytes.data()), bytes_of(tiles.key.get()), bytes_of(tiles.value.get()));
  const std::byte* const tile = side == Side::kKey ? tiles.key.get() : tiles.value.get();
  std::vector<float> all(kPageTokens * width);
  codec_of(t.spec).decode(t.spec, t.shape(), tile, all.data());
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
  const auto live = static_cast<size_t>(page.live);
  if (is_rows(f)) {
    for (const TileFormat* side : {&f.key, &f.value})
      add(bytes.data() + side_offset(f, side->side), live * saved_row_bytes(*side));
    return;
  }
  const Tiles tiles(f);
  tiles_from_record(shape_of(f), bytes_of(bytes.data()), bytes_of(tiles.key.get()), bytes_of(tiles.value.get()));
  for (const TileFormat* side : {&f.key, &f.value}) {
    const std::byte* const tile = side == &f.key ? tiles.key.get() : tiles.value.get();
    if (!f.appendable()) {
      add(tile, side->bytes);
    } else if (side->spec.is_f16()) {
      add(tile, live * saved_row_bytes(*side));
    } else {
      std::array<std::byte, kMostRowBytes> record;
      for (int t = 0; t < page.live; ++t) {
        load_row(side->spec, side->side, side->width, tile, t, record.data());
        add(record.data(), saved_row_bytes(*side));
      }
    }
  }
}

void CudaBackend::load(const PageEntry& page, const char* from) {
  use_device();
  join();
  const PageFormat& f = format(page);
  std::vector<std::byte> bytes(f.bytes);
  const auto live = static_cast<size_t>(page.live);
  if (is_rows(f)) {
    for (const TileFormat* side : {&f.key, &f.value}) {
      const size_t n = live * saved_row_bytes(*side);
      std::memcpy(bytes.data() + side_offset(f, side->side), from, n);
      from += n;
    }
  } else {
    const Tiles tiles(f);
    for (const TileFormat* side : {&f.key, &f.value}) {
      std::byte* const tile = side == &f.key ? tiles.key.get() : tiles.value.get();
      const size_t row = f.appendable() ? saved_row_bytes(*side) : 0, n = f.appendable() ? live * row : side->bytes;
      if (!f.appendable() || side->spec.is_f16()) {
        std::memcpy(tile, from, n);
      } else {
        for (int t = 0; t < page.live; ++t) {
          store_row(side->spec, side->side, side->width,
                    reinterpret_cast<const std::byte*>(from) + static_cast<size_t>(t) * row, t, tile);
        }
      }
      from += n;
    }
    record_from_tiles(shape_of(f), bytes_of(tiles.key.get()), bytes_of(tiles.value.get()), bytes_of(bytes.data()));
  }
  check_cuda(cudaMemcpyAsync(memory(page.handle), bytes.data(), bytes.size(), cudaMemcpyHostToDevice, stream_.get()),
             "load a page");
  check_cuda(cudaStreamSynchronize(stream_.get()), "load a page");
}

}  // namespace kvmix::cuda
