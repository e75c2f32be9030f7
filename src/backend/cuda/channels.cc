// Lists whose keys have chosen channels: which of their pages are thin records, what they chose, and such records made and
// opened again.
#include "backend/cuda/channels.h"

#include <algorithm>
#include <cstring>

#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/gather.h"
#include "backend/cuda/layer_format.h"
#include "base/cuda/launch.h"
#include "codec/cuda/seal.h"

namespace kvmix::cuda {
namespace {

constexpr size_t kMostWhole = size_t{8} << 20;  // bytes of records of all channels on their way to such of chosen ones

}  // namespace

// Brings what the step's lists chose, and where their thin pages stand, up to date. Before a list has such pages its choice may
// be made without another revision, and none is read.
void CudaBackend::begin_channels() {
  const size_t rows = tables_.rows();
  if (channel_revisions_.size() != rows) {
    size_t bytes = 0;
    for (Layer& layer : layers_) {
      if (!layer.ids.thins) continue;
      layer.channels_at = bytes;
      bytes += rows * layer.channel_bytes();
      layer.thin_runs.assign(rows * static_cast<size_t>(layer.config.kv_heads), {});
    }
    if (bytes == 0) return;
    channels_.reserve(bytes, "chosen channels of keys");
    channels_written_.assign(bytes, 0);
    channel_revisions_.assign(rows, 0);
    check_cuda(cudaMemsetAsync(channels_.data(), 0, bytes, stream_.get()), "chosen channels of keys: clear");
  }
  for (size_t row = 0; row < order_.size(); ++row) {
    const SequencePages& pages = *plan_->entries[order_[row]].pages;
    if (channel_revisions_[row] == pages.revision) continue;
    channel_revisions_[row] = pages.revision;
    for (size_t l = 0; l < layers_.size(); ++l) {
      Layer& layer = layers_[l];
      if (!layer.ids.thins) continue;
      const auto heads = static_cast<size_t>(layer.config.kv_heads), width = static_cast<size_t>(layer.thin.key_width);
      const size_t at = layer.channels_at + row * layer.channel_bytes();
      bool changed = false;
      for (size_t h = 0; h < heads; ++h) {
        const PageList& list = pages.layers[l].heads[h];
        ThinRuns& runs = layer.thin_runs[row * heads + h];
        runs.clear();
        for (size_t i = 0; i < list.pages.size(); ++i) {
          if (!is_thin(layer, list.pages[i])) continue;
          const auto place = static_cast<int32_t>(i);
          if (runs.empty() || runs.back().second != place) runs.emplace_back(place, place);
          ++runs.back().second;
        }
        uint8_t* const written = channels_written_.data() + at + h * width;
        if (list.channels.empty() || std::equal(list.channels.begin(), list.channels.end(), written)) continue;
        std::copy(list.channels.begin(), list.channels.end(), written);
        changed = true;
      }
      if (!changed) continue;
      check_cuda(cudaMemcpyAsync(channels_.data() + at, channels_written_.data() + at, layer.channel_bytes(),
                                 cudaMemcpyHostToDevice, stream_.get()),
                 "chosen channels of keys: copy");
    }
  }
}

size_t CudaBackend::whole_together(const Layer& layer) const {
  return std::max<size_t>(kMostWhole / (record_bytes(layer.format) * static_cast<size_t>(layer.config.kv_heads)), 1);
}

// As write_seals, of the jobs whose pages are thin: [pages][kv_heads] of open pages, of places among records of all channels,
// of the pages that they become, and what these chose.
void CudaBackend::write_thin_seals(const Layer& layer, size_t l, std::byte* to) {
  if (layer.thin_seals == 0) return;
  const auto heads = static_cast<size_t>(layer.config.kv_heads), width = static_cast<size_t>(layer.thin.key_width);
  const size_t all = static_cast<size_t>(layer.thin_seals) * heads, together = whole_together(layer) * heads;
  auto* const open = reinterpret_cast<int32_t*>(to + layer.thin_open_ids_at);
  auto* const records = reinterpret_cast<int32_t*>(to + layer.thin_record_ids_at);
  auto* const ids = reinterpret_cast<int32_t*>(to + layer.thin_ids_at);
  auto* const chosen = reinterpret_cast<uint8_t*>(to + layer.thin_chosen_at);
  std::fill_n(open, all, 0);
  std::fill_n(records, all, kNoRecord);
  std::fill_n(ids, all, kNoRecord);
  sealed_of_head_.assign(heads, 0);
  for (const Transcode& job : plan_->transcodes[l]) {
    if (!is_thin(layer, job.to())) continue;
    const auto head = static_cast<size_t>(job.kv_head);
    const size_t at = static_cast<size_t>(sealed_of_head_[head]++) * heads + head;
    open[at] = id_of(job.from.handle);
    records[at] = static_cast<int32_t>(at % together);
    ids[at] = id_of(job.to().handle);
    std::copy_n(job.list->channels.begin(), width, chosen + at * width);
  }
}

// p: as seal_job, its records those of write_thin_seals; ids and chosen channels as PickRecords.
void CudaBackend::seal_thin(const Layer& layer, kvmix_cuda_seal_params p, const RecordShape& open, const int32_t* ids,
                            const uint8_t* chosen, DeviceMemory& whole) {
  const auto heads = static_cast<size_t>(p.kv_heads), pages = static_cast<size_t>(p.pages);
  const size_t together = whole_together(layer), bytes = record_bytes(layer.format);
  whole.reserve(std::min(together, pages) * heads * bytes, "records of all channels");
  p.records = whole.data(), p.record_page_stride = static_cast<int64_t>(bytes);
  const int32_t* const open_ids = p.open_ids;
  const int32_t* const record_ids = p.record_ids;
  for (size_t first = 0; first < pages; first += together) {
    p.pages = static_cast<int32_t>(std::min(together, pages - first));
    p.open_ids = open_ids + first * heads, p.record_ids = record_ids + first * heads;
    seal(std::array{seal_job(layer, p, open)});
    pick_records({.from = reinterpret_cast<const uint8_t*>(whole.data()),
                  .stride = static_cast<int64_t>(bytes),
                  .pages = reinterpret_cast<uint8_t*>(pool_.base()),
                  .ids = ids + first * heads,
                  .chosen = chosen + first * heads * static_cast<size_t>(layer.thin.key_width),
                  .count = p.pages * p.kv_heads,
                  .whole = record_shape(layer.format),
                  .thin = layer.thin},
                 static_cast<cudaStream_t>(p.stream));
  }
}

// Where a list's thin records have each channel, [head_dim].
void CudaBackend::write_columns(const Layer& layer, const PageList& list, uint8_t* to) {
  std::fill_n(to, layer.config.head_dim, RowTarget::kNoColumn);
  for (size_t i = 0; i < list.channels.size(); ++i) to[list.channels[i]] = static_cast<uint8_t>(i);
}

// A thin record as rows again, with zeros for what it does not have.
void CudaBackend::open_thin(const Layer& layer, const Transcode& job) {
  const PageFormat& to = format(job.to());
  constexpr size_t kSources = 256;  // where they begin
  const size_t columns_at = kSources + kPageTokens * sizeof(RowSource);
  const size_t bytes = columns_at + static_cast<size_t>(layer.config.head_dim);
  std::byte* const host = moves_.begin(bytes);
  const RowTarget target{.page = reinterpret_cast<uint8_t*>(memory(job.to().handle)),
                         .first = 0,
                         .sources = kPageTokens,
                         .slots = kPageTokens,
                         .rows = is_rows(to) ? to.slots : 0,
                         .kv_head = job.kv_head,
                         .columns = reinterpret_cast<const uint8_t*>(moves_.device() + columns_at)};
  std::memcpy(host, &target, sizeof target);
  auto* const sources = reinterpret_cast<RowSource*>(host + kSources);
  for (int slot = 0; slot < kPageTokens; ++slot) {
    sources[slot] = {reinterpret_cast<const uint8_t*>(memory(job.from.handle)), slot, RowSource::kThinRecord};
  }
  write_columns(layer, *job.list, reinterpret_cast<uint8_t*>(host + columns_at));
  moves_.upload(bytes, stream_.get());
  move_rows({.targets = reinterpret_cast<const RowTarget*>(moves_.device()),
             .sources = reinterpret_cast<const RowSource*>(moves_.device() + kSources),
             .count = 1,
             .head_dim = layer.config.head_dim,
             .open = layer.open,
             .sealed = record_shape(layer.format),
             .thin = layer.thin,
             .key_panels = nullptr,
             .halves = false},
            stream_.get());
}

std::vector<float> CudaBackend::key_squares(int layer_index, std::span<const KeySquares> lists) {
  use_device();
  join();
  const Layer& layer = layers_[static_cast<size_t>(layer_index)];
  const auto dim = static_cast<size_t>(layer.config.head_dim);
  std::vector<SquarePage> pages;
  std::vector<int32_t> first, tokens;
  for (const auto& [list, gone] : lists) {
    first.push_back(static_cast<int32_t>(pages.size()));
    std::span<const int32_t> dropped = gone;
    int32_t before = 0;
    for (const PageEntry& page : list->pages) {
      const PageFormat& f = format(page);
      const int32_t rows = is_rows(f) ? f.slots : f.appendable() ? RowSource::kOpenRecord : RowSource::kSealedRecord;
      SquarePage& made =
          pages.emplace_back(SquarePage{reinterpret_cast<const uint8_t*>(memory(page.handle)), rows, page.live, {0, 0, 0, 0}});
      for (; !dropped.empty() && dropped.front() < before + page.live; dropped = dropped.subspan(1)) {
        const int slot = dropped.front() - before;
        made.dropped[slot / 32] |= 1u << (slot % 32);
      }
      before += page.live;
    }
    tokens.push_back(before - static_cast<int32_t>(gone.size()));
  }
  first.push_back(static_cast<int32_t>(pages.size()));
  const auto aligned = [](size_t bytes) { return (bytes + 255) / 256 * 256; };
  const size_t first_at = aligned(pages.size() * sizeof(SquarePage)), tokens_at = first_at + aligned(first.size() * 4),
               bytes = tokens_at + aligned(tokens.size() * 4);
  std::byte* const host = moves_.begin(bytes);
  std::copy(pages.begin(), pages.end(), reinterpret_cast<SquarePage*>(host));
  std::copy(first.begin(), first.end(), reinterpret_cast<int32_t*>(host + first_at));
  std::copy(tokens.begin(), tokens.end(), reinterpret_cast<int32_t*>(host + tokens_at));
  moves_.upload(bytes, stream_.get());
  std::vector<float> means(lists.size() * dim);
  key_squares_.reserve((pages.size() * dim + means.size()) * sizeof(float), "squares of keys");
  float* const sums = reinterpret_cast<float*>(key_squares_.data());
  const SquareKeys job{.pages = reinterpret_cast<const SquarePage*>(moves_.device()),
                       .first = reinterpret_cast<const int32_t*>(moves_.device() + first_at),
                       .tokens = reinterpret_cast<const int32_t*>(moves_.device() + tokens_at),
                       .page_count = static_cast<int>(pages.size()),
                       .lists = static_cast<int>(lists.size()),
                       .head_dim = layer.config.head_dim,
                       .open = layer.open,
                       .sealed = record_shape(layer.format),
                       .sums = sums,
                       .means = sums + pages.size() * dim};
  square_keys(job, stream_.get());
  check_cuda(cudaMemcpyAsync(means.data(), job.means, means.size() * sizeof(float), cudaMemcpyDeviceToHost, stream_.get()),
             "squares of keys: copy");
  check_cuda(cudaStreamSynchronize(stream_.get()), "squares of keys");
  return means;
}

std::span<const float> CudaBackend::query_squares(SequenceId id, int layer, int kv_head) const {
  scored_.wait();
  const Layer& of = layers_[static_cast<size_t>(layer)];
  const auto n = static_cast<size_t>(of.heads_per_kv() * of.config.head_dim);
  return {host_squares_.data<float>() + prompts_.at(id).layers[static_cast<size_t>(layer)].squares_at +
              static_cast<size_t>(kv_head) * n,
          n};
}

}  // namespace kvmix::cuda
