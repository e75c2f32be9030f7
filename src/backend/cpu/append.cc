// Storing rows, and pages that change their format.
#include <algorithm>
#include <chrono>

#include "backend/cpu/cpu_backend.h"
#include "base/fp16.h"
#include "codec/encoders.h"
#include "codec/row.h"

namespace kvmix {
namespace {

constexpr int kAppendBlockTokens = 32;
constexpr int kRowsTogether = 4;  // that are stored together

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Stores n <= kRowsTogether rows of floats into slots of a side that is filled token by token, codes with error feedback
// unless `columns` is null.
void store_rows(const TileFormat& format, int first_slot, int n, const float* rows, const float* columns, std::byte* side) {
  const int dim = format.width;
  if (format.spec.is_f16()) {
    to_f16(rows, n * dim, reinterpret_cast<uint16_t*>(side) + static_cast<ptrdiff_t>(first_slot) * dim);
    return;
  }
  std::byte records[kRowsTogether * kMostRowBytes];
  encode_rows(format.spec, dim, n, rows, columns, records);
  for (int r = 0; r < n; ++r) {
    store_row(format.spec, format.side, dim, records + static_cast<size_t>(r) * row_bytes(format.spec, dim), first_slot + r,
              side);
  }
}

// A tile's slot as an fp16 row: where it stands if it is one, else in `room`.
const uint16_t* half_row_of(const TileFormat& format, const std::byte* side, int slot, uint16_t* room) {
  const int dim = format.width;
  if (format.spec.is_f16()) return reinterpret_cast<const uint16_t*>(side) + static_cast<ptrdiff_t>(slot) * dim;
  std::byte record[kMostRowBytes];
  float row[kMostWidth];
  load_row(format.spec, format.side, dim, side, slot, record);
  decode_row(format.spec, dim, record, row);
  to_f16(row, dim, room);
  return room;
}

// All slots of a tile as fp16 rows: where they stand if they are, else in `room`. Slots behind `live` repeat the last one.
const uint16_t* half_rows(const TileFormat& format, const std::byte* side, int live, std::vector<uint16_t>& room) {
  const int dim = format.width;
  if (format.spec.is_f16() && live == kPageTokens) return reinterpret_cast<const uint16_t*>(side);
  room.resize(static_cast<size_t>(kPageTokens) * static_cast<size_t>(dim));
  for (int t = 0; t < kPageTokens; ++t) {
    uint16_t* to = room.data() + static_cast<ptrdiff_t>(t) * dim;
    const uint16_t* row = half_row_of(format, side, std::min(t, live - 1), to);
    if (row != to) std::copy_n(row, dim, to);
  }
  return room.data();
}

// A stored key as rows of chosen channels hold it, and back over zeros, which is what attention sees of the others.
template <typename T>
void pick(std::span<const uint8_t> channels, const T* from, T* to) {
  for (size_t i = 0; i < channels.size(); ++i) to[i] = from[channels[i]];
}
template <typename T>
void put_back(std::span<const uint8_t> channels, int width, const T* from, T* to) {
  std::fill_n(to, width, T{});
  for (size_t i = 0; i < channels.size(); ++i) to[channels[i]] = from[i];
}

}  // namespace

void CpuBackend::transcode(const Transcode& job, Scratch& scratch) {
  const Layer& layer = layers_[static_cast<size_t>(job.layer)];
  const PageFormat &from = format(job.from), &to = format(job.to());
  const std::byte* source = memory(job.from.handle);
  std::byte* target = memory(job.to().handle);
  for (const Side side : {Side::kKey, Side::kValue}) {
    const bool key = side == Side::kKey;
    const TileFormat &a = key ? from.key : from.value, &b = key ? to.key : to.value;
    const std::byte* in = source + (key ? 0 : from.value_offset);
    std::byte* out = target + (key ? 0 : to.value_offset);
    const RowMapChain& maps = key ? layer.key_maps : layer.value_maps;
    const std::vector<uint8_t>& channels = job.list->channels;
    if (!to.appendable()) {
      const uint16_t* rows = half_rows(a, in, job.from.live, scratch.half);
      if (b.width < a.width) {
        scratch.thin_half.resize(static_cast<size_t>(kPageTokens) * static_cast<size_t>(b.width));
        for (int t = 0; t < kPageTokens; ++t) {
          pick(channels, rows + static_cast<ptrdiff_t>(t) * a.width,
               scratch.thin_half.data() + static_cast<ptrdiff_t>(t) * b.width);
        }
        rows = scratch.thin_half.data();
      }
      codec_of(b.spec).encode(b.spec, b.shape(), rows, maps.feedback(job.kv_head), out);
      continue;
    }
    scratch.rows.resize(static_cast<size_t>(kPageTokens) * static_cast<size_t>(a.width));
    codec_of(a.spec).decode(a.spec, a.shape(), in, scratch.rows.data());
    alignas(64) float whole[kRowsTogether * kMostWidth];
    for (int t = 0; t < kPageTokens; t += kRowsTogether) {
      const float* rows = scratch.rows.data() + static_cast<ptrdiff_t>(t) * a.width;
      if (a.width < b.width) {
        for (int r = 0; r < kRowsTogether; ++r) put_back(channels, b.width, rows + r * a.width, whole + r * b.width);
        rows = whole;
      }
      store_rows(b, t, kRowsTogether, rows, key ? layer.columns(job.kv_head) : nullptr, out);
    }
  }
}

// One side of a page from slots of others. Between equal formats of rows these move as they are. Keys of chosen channels and
// keys of all become each other's.
void CpuBackend::gather(const Gather& job, Side side, Scratch& scratch) const {
  const bool key = side == Side::kKey;
  const Layer& layer = layers_[static_cast<size_t>(job.layer)];
  const PageFormat& to = format(job.to());
  const TileFormat& b = key ? to.key : to.value;
  const auto dim = static_cast<size_t>(b.width);
  const std::vector<uint8_t>& channels = job.list->channels;
  std::byte* out = memory(job.to().handle) + (key ? 0 : to.value_offset);
  scratch.half.resize(kPageTokens * dim);
  scratch.rows.resize(std::max(scratch.rows.size(), kPageTokens * static_cast<size_t>(layer.config.head_dim)));
  const std::byte* decoded = nullptr;  // the tile that scratch.rows holds
  for (size_t i = 0; i < job.sources.size(); ++i) {
    const auto& [page, slot] = job.sources[i];
    const TileFormat& a = key ? format(page).key : format(page).value;
    const std::byte* in = memory(page.handle) + (key ? 0 : format(page).value_offset);
    uint16_t* half = scratch.half.data() + (to.appendable() ? 0 : i * dim);  // a tile's rows are needed together
    if (to.appendable() && a.spec == b.spec && a.width == b.width && takes_rows(a.spec)) {
      std::byte record[kMostRowBytes];
      load_row(a.spec, side, a.width, in, slot, record);
      store_row(b.spec, side, b.width, record, static_cast<int>(i), out);
      continue;
    }
    uint16_t other[kMostWidth];  // a row of another width
    uint16_t* own = a.width == b.width ? half : other;
    if (a.spec.is_f16() || takes_rows(a.spec)) {
      const uint16_t* row = half_row_of(a, in, slot, own);
      if (row != own) std::copy_n(row, a.width, own);
    } else {
      if (decoded != in) codec_of(a.spec).decode(a.spec, a.shape(), in, scratch.rows.data());
      decoded = in;
      to_f16(scratch.rows.data() + static_cast<ptrdiff_t>(slot) * a.width, a.width, own);
    }
    if (a.width > b.width) pick(channels, other, half);
    if (a.width < b.width) put_back(channels, b.width, other, half);
    if (to.appendable()) {
      float row[kMostWidth];
      for (size_t c = 0; c < dim; ++c) row[c] = f16_to_f32(half[c]);
      store_rows(b, static_cast<int>(i), 1, row, key ? layer.columns(job.kv_head) : nullptr, out);
    }
  }
  if (to.appendable()) return;
  const uint16_t* last = scratch.half.data() + (job.sources.size() - 1) * dim;
  for (size_t i = job.sources.size(); i < kPageTokens; ++i) std::copy_n(last, dim, scratch.half.data() + i * dim);
  codec_of(b.spec).encode(b.spec, b.shape(), scratch.half.data(),
                          (key ? layer.key_maps : layer.value_maps).feedback(job.kv_head), out);
}

void CpuBackend::gather(std::span<const Gather> jobs) {
  const size_t threads = std::min(jobs.size(), threads_.size());
  parallel_for(static_cast<int>(threads), threads, [&](size_t t) {
    for (size_t i = t; i < jobs.size(); i += threads) {
      for (const Side side : {Side::kKey, Side::kValue}) gather(jobs[i], side, threads_[t]);
    }
  });
}

void CpuBackend::append(int layer_index, const float* k, int64_t k_stride, const float* v, int64_t v_stride, Worker worker) {
  const auto l = static_cast<size_t>(layer_index);
  const Layer& layer = layers_[l];
  Scratch& scratch = threads_[static_cast<size_t>(worker.ith)];
  const auto start = Clock::now();
  const std::vector<Transcode>& transcodes = plan_->transcodes[l];
  for (size_t i = static_cast<size_t>(worker.ith); i < transcodes.size(); i += static_cast<size_t>(worker.nth)) {
    transcode(transcodes[i], scratch);
  }
  const auto sealed = Clock::now();
  if (!transcodes.empty()) scratch.seal_seconds += std::chrono::duration<double>(sealed - start).count();

  // Threads share heads, and a prompt's blocks of tokens.
  alignas(64) float rows[kRowsTogether * kMostWidth];
  int task = 0;
  for (const StepEntry& entry : plan_->entries) {
    for (int head = 0; head < layer.config.lists(); ++head) {
      const std::vector<PageEntry>& pages = entry.pages->layers[l].heads[static_cast<size_t>(head)].pages;
      for (int block = 0; block < entry.n_tokens; block += kAppendBlockTokens, ++task) {
        if (task % worker.nth != worker.ith) continue;
        const int end = std::min(entry.n_tokens, block + kAppendBlockTokens);
        size_t at = pages.size() - 1;
        while (pages[at].first > entry.start + block) --at;
        for (int t = block, n = 0; t < end; t += n) {
          const PageFormat* f = &format(pages[at]);
          if (entry.start + t >= pages[at].first + f->slots) f = &format(pages[++at]);
          const auto slot = static_cast<int>(entry.start + t - pages[at].first);
          n = std::min({kRowsTogether, end - t, f->slots - slot});
          std::byte* page = memory(pages[at].handle);
          const auto store = [&](const float* from, int64_t stride, const RowMapChain& maps, const TileFormat& side,
                                 const float* columns, std::byte* to) {
            const int dim = side.width;
            for (int r = 0; r < n; ++r) {
              float* row = rows + r * dim;
              std::copy_n(from + (entry.row + t + r) * stride + head * dim, dim, row);
              maps.store(head, row);
            }
            store_rows(side, slot, n, rows, columns, to);
          };
          store(k, k_stride, layer.key_maps, f->key, layer.columns(head), page);
          store(v, v_stride, layer.value_maps, f->value, nullptr, page + f->value_offset);
        }
      }
    }
  }
  scratch.append_seconds += seconds_since(sealed);
}

}  // namespace kvmix
