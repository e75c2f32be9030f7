#include "backend/cpu/cpu_backend.h"

#include <algorithm>
#include <cstring>

#include "base/fp16.h"
#include "codec/row.h"
#include "kvmix/error.h"

namespace kvmix {
namespace {

// Bytes of a token's row as a file holds it.
size_t saved_row_bytes(const TileFormat& format) {
  return format.spec.is_f16() ? static_cast<size_t>(format.width) * 2 : row_bytes(format.spec, format.width);
}

}  // namespace

std::unique_ptr<Backend> make_cpu_backend(const CacheConfig& config, const FormatTable& formats,
                                          std::vector<LayerFormats> layers) {
  return std::make_unique<CpuBackend>(config, formats, std::move(layers));
}

CpuBackend::CpuBackend(const CacheConfig& config, const FormatTable& formats, std::vector<LayerFormats> layers)
    : formats_(formats), pool_(config.max_bytes), exact_(config.exact), forced_kernel_(config.kernel) {
  bool known = config.kernel.empty();
  for (const AttentionKernel* kernel : attention_kernel_registry()) {
    if (!config.kernel.empty() && config.kernel != kernel->name) continue;
    known = true;
    if (kernel->available()) kernels_.push_back(kernel);
  }
  if (!known) {
    std::string names;
    for (const AttentionKernel* kernel : attention_kernel_registry())
      names += std::string(names.empty() ? "" : ", ") + kernel->name;
    throw Error(Status::kInvalidArgument, "attention kernel \"" + config.kernel + "\" is unknown; expected one of " + names);
  }
  if (kernels_.empty()) {
    throw Error(Status::kUnsupported,
                "attention kernel \"" + config.kernel + "\" cannot run on this processor; see kvmix list");
  }
  threads_.resize(static_cast<size_t>(config.threads));
  cuts_.resize(layers.size());
  layers_.reserve(layers.size());
  for (size_t l = 0; l < layers.size(); ++l) {
    Layer& layer = layers_.emplace_back(config.layers[l], layers[l]);
    layer.tiles.push_back(layer.ids.sealed);
    const PageFormat& recent = formats_[layer.ids.recent];
    if (!recent.rows) layer.tiles.push_back(layer.ids.recent);
    if (layer.ids.thins) layer.tiles.push_back(layer.ids.thin);
    if (layer.ids.low_tier && layer.ids.low != layer.ids.sealed) layer.tiles.push_back(layer.ids.low);
    if (!layer.config.key.transform.feedback.empty() && !recent.key.spec.is_f16()) {
      const int dim = layer.config.head_dim;
      const ptrdiff_t square = static_cast<ptrdiff_t>(dim) * dim;
      layer.key_columns.resize(static_cast<size_t>(layer.config.kv_heads * square));
      for (int h = 0; h < layer.config.kv_heads; ++h) {
        feedback_columns(layer.key_maps.feedback(h), dim, layer.key_columns.data() + h * square);
      }
    }
    if (layer.config.latent()) {
      kernels_used_.emplace_back("portable");
      continue;
    }
    AttendJob job = layer_job(layer.config);
    job.rows = layer.heads_per_kv;
    // What most pages take is what is reported; pages of all channels and of chosen ones must find a kernel.
    for (const FormatId tiles : {layer.ids.sealed, layer.ids.thins ? layer.ids.thin : layer.ids.sealed}) {
      job.key = formats_[tiles].key;
      job.value = formats_[tiles].value;
      const AttentionKernel& kernel = pick_kernel(job);
      kernels_used_.resize(l);
      kernels_used_.emplace_back(kernel.name);
    }
  }
}

AttendJob CpuBackend::layer_job(const LayerConfig& layer) const {
  AttendJob job{};
  job.scale = layer.scale;
  job.softcap = layer.softcap;
  job.sliding_window = layer.sliding_window;
  job.exact = exact_;
  return job;
}

const AttentionKernel& CpuBackend::pick_kernel(const AttendJob& job) const {
  for (const AttentionKernel* kernel : kernels_) {
    if (kernel->supports(job)) return *kernel;
  }
  throw Error(Status::kUnsupported, "attention kernel \"" + forced_kernel_ + "\" does not take keys " +
                                        to_string(job.key.spec) + ", values " + to_string(job.value.spec) + " at head_dim " +
                                        std::to_string(job.key.width) + "; leave the kernel to the library");
}

PageHandle CpuBackend::allocate(const PageFormat& format) {
  return static_cast<PageHandle>(reinterpret_cast<uintptr_t>(pool_.allocate(format.bytes)));
}

void CpuBackend::release(PageHandle page, const PageFormat& format) { pool_.release(memory(page), format.bytes); }

size_t CpuBackend::scratch_bytes() const {
  const auto room = [](const PartialRoom& r) { return (r.m.capacity() + r.l.capacity() + r.acc.capacity()) * sizeof(float); };
  size_t bytes = room(parts_) + (weights_.capacity() + references_.capacity()) * sizeof(float);
  for (const auto& entry : mass_) {
    for (const auto& layer : entry) {
      for (const HeadMass& head : layer) bytes += (head.low.capacity() + head.tokens.capacity()) * sizeof(float);
    }
  }
  for (const Scratch& t : threads_) {
    bytes += t.kernel.capacity() +
             (t.q.capacity() + t.thin_q.capacity() + t.rows.capacity() + t.queries.capacity() + t.scores.capacity() +
              t.lanes.capacity() + t.paid.capacity() + t.references.capacity() + t.factors.capacity()) *
                 sizeof(float) +
             (t.half.capacity() + t.thin_half.capacity()) * sizeof(uint16_t) + t.positions.capacity() * sizeof(int64_t) +
             t.pages.capacity() * sizeof(PageRef) + room(t.whole) + room(t.apart);
  }
  return bytes;
}

void CpuBackend::copy(PageHandle from, PageHandle to, const PageFormat& format) {
  std::memcpy(memory(to), memory(from), format.bytes);
}

void CpuBackend::slot_rows(const PageEntry& page, Side side, int first, int n, float* rows, float* tile) const {
  const PageFormat& f = format(page);
  const TileFormat& t = side == Side::kKey ? f.key : f.value;
  const std::byte* from = memory(page.handle) + (side == Side::kKey ? 0 : f.value_offset);
  const auto begin = static_cast<size_t>(first) * static_cast<size_t>(t.width);
  const auto numbers = static_cast<size_t>(n) * static_cast<size_t>(t.width);
  if (t.spec.is_f16()) {
    for (size_t i = 0; i < numbers; ++i) {
      uint16_t h;
      std::memcpy(&h, from + (begin + i) * sizeof h, sizeof h);
      rows[i] = f16_to_f32(h);
    }
    return;
  }
  codec_of(t.spec).decode(t.spec, t.shape(), from, tile);
  if (rows != tile) std::copy_n(tile + begin, numbers, rows);
}

void CpuBackend::read(const PageEntry& page, Side side, float* rows) const {
  const PageFormat& f = format(page);
  std::vector<float> tile(static_cast<size_t>(kPageTokens) * static_cast<size_t>((side == Side::kKey ? f.key : f.value).width));
  slot_rows(page, side, 0, page.live, rows, tile.data());
}

size_t CpuBackend::saved_bytes(const PageFormat& f, int live) const {
  if (!f.appendable()) return f.bytes;
  return static_cast<size_t>(live) * (saved_row_bytes(f.key) + saved_row_bytes(f.value));
}

void CpuBackend::save(const PageEntry& page, std::string& to) const {
  const PageFormat& f = format(page);
  const std::byte* from = memory(page.handle);
  if (!f.appendable()) {
    to.append(reinterpret_cast<const char*>(from), f.bytes);
    return;
  }
  for (const TileFormat* side : {&f.key, &f.value}) {
    const size_t bytes = saved_row_bytes(*side);
    const std::byte* tile = from + (side == &f.key ? 0 : f.value_offset);
    for (int t = 0; t < page.live; ++t) {
      std::byte record[kMostRowBytes];
      const std::byte* row = tile + static_cast<size_t>(t) * bytes;
      if (!side->spec.is_f16()) {
        load_row(side->spec, side->side, side->width, tile, t, record);
        row = record;
      }
      to.append(reinterpret_cast<const char*>(row), bytes);
    }
  }
}

void CpuBackend::load(const PageEntry& page, const char* from) {
  const PageFormat& f = format(page);
  std::byte* to = memory(page.handle);
  if (!f.appendable()) {
    std::memcpy(to, from, f.bytes);
    return;
  }
  for (const TileFormat* side : {&f.key, &f.value}) {
    const size_t bytes = saved_row_bytes(*side);
    std::byte* tile = to + (side == &f.key ? 0 : f.value_offset);
    for (int t = 0; t < page.live; ++t, from += bytes) {
      if (side->spec.is_f16()) {
        std::memcpy(tile + static_cast<size_t>(t) * bytes, from, bytes);
      } else {
        store_row(side->spec, side->side, side->width, reinterpret_cast<const std::byte*>(from), t, tile);
      }
    }
  }
}

void CpuBackend::report(CacheStats& stats) const {
  for (const std::string& name : kernels_used_) {
    if (stats.kernel.find(name) == std::string::npos) stats.kernel += (stats.kernel.empty() ? "" : "+") + name;
  }
  for (const Scratch& t : threads_) {
    stats.seal_seconds += t.seal_seconds;
    stats.append_seconds += t.append_seconds;
    stats.attend_seconds += t.attend_seconds;
  }
}

}  // namespace kvmix
