// What the cache says of itself, and reading rows back.
#include <algorithm>
#include <limits>
#include <set>

#include "cache/state.h"
#include "kvmix/error.h"
#include "rows/row_map.h"

namespace kvmix {

MemoryReport Cache::memory() const {
  const Impl& impl = *impl_;
  MemoryReport report;
  std::set<PageHandle> seen;  // pages that forks share count once
  for (const auto& [id, sequence] : impl.ledger.sequences()) {
    report.tokens += sequence.length;
    report.table_bytes += sizeof(SequencePages) + sequence.layers.capacity() * sizeof(LayerPages);
    for (const LayerPages& layer : sequence.layers) {
      report.table_bytes += (layer.heads.capacity() + layer.low.capacity()) * sizeof(PageList);
      layer.for_each_list([&](const PageList& list) {
        report.table_bytes += list.pages.capacity() * sizeof(PageEntry) + list.positions.capacity() * sizeof(int32_t) +
                              list.mass.capacity() * sizeof(float) + list.channels.capacity();
        for (const PageEntry& entry : list.pages) {
          if (impl.ledger.shared(entry.handle) && !seen.insert(entry.handle).second) continue;
          const PageFormat& format = impl.format(entry);
          switch (format.role) {
            case PageRole::kSinks:
              report.sink_bytes += format.bytes;
              break;
            case PageRole::kRecent:
              report.open_bytes += format.bytes;
              break;
            case PageRole::kSealed:
              report.sealed_bytes += format.bytes;
              break;
          }
        }
      });
    }
  }
  const PoolBytes pool = impl.backend->pool();
  report.slack_bytes = pool.taken - report.sealed_bytes - report.open_bytes - report.sink_bytes;
  report.total_bytes = pool.taken + report.table_bytes;
  report.scratch_bytes = impl.backend->scratch_bytes();
  return report;
}

Cache::TailReport Cache::tail(SequenceId id, int layer) const {
  const SequencePages& sequence = impl_->ledger.find(id);
  TailReport report{};
  for (const PageEntry& entry : sequence.layers.at(static_cast<size_t>(layer)).heads[0].pages) {
    switch (impl_->format(entry).role) {
      case PageRole::kSinks:
        report.sinks += entry.live;
        break;
      case PageRole::kRecent:
        report.window += entry.live;
        break;
      case PageRole::kSealed:
        report.sealed += entry.live;
        break;
    }
  }
  return report;
}

std::vector<std::vector<int64_t>> Cache::kept(SequenceId id, int layer) const {
  std::vector<std::vector<int64_t>> heads;
  const LayerPages& pages = impl_->ledger.find(id).layers.at(static_cast<size_t>(layer));
  for (size_t h = 0; h < pages.heads.size(); ++h) {
    std::vector<int64_t>& positions = heads.emplace_back();
    const auto add = [&](const PageEntry&, int, int32_t position) { positions.push_back(position); };
    if (!pages.low.empty()) pages.low[h].for_each_token(add);
    const auto low = static_cast<ptrdiff_t>(positions.size());
    pages.heads[h].for_each_token(add);
    std::inplace_merge(positions.begin(), positions.begin() + low, positions.end());
  }
  return heads;
}

std::vector<std::vector<int64_t>> Cache::low_tier(SequenceId id, int layer) const {
  std::vector<std::vector<int64_t>> heads;
  for (const PageList& list : impl_->ledger.find(id).layers.at(static_cast<size_t>(layer)).low) {
    heads.emplace_back(list.positions.begin(), list.positions.end());
  }
  return heads;
}

std::vector<std::vector<int>> Cache::channels(SequenceId id, int layer) const {
  std::vector<std::vector<int>> heads;
  for (const PageList& list : impl_->ledger.find(id).layers.at(static_cast<size_t>(layer)).heads) {
    heads.emplace_back(list.channels.begin(), list.channels.end());
  }
  return heads;
}

int64_t Cache::next_seal(SequenceId id) const {
  const SequencePages& sequence = impl_->ledger.find(id);
  const Governed& governed = impl_->governed;
  int64_t next = impl_->ledger.next_seal(sequence);
  if (!governed.decodes()) return next;
  const int64_t asked = Governed::decisions(sequence.prompt_length, sequence.length);
  next = std::min(next, sequence.prompt_length + (asked + 1) * kPageTokens - 1);
  return governed.policy->needs().mass == MassReduce::kNone ? next : sequence.length + 1;
}

CacheStats Cache::stats() const {
  CacheStats stats;
  stats.sealed_pages = impl_->sealed_pages;
  impl_->backend->report(stats);
  return stats;
}

void Cache::read(SequenceId id, int layer_index, int kv_head, Side side, bool original_space, float* rows) const {
  const Impl& impl = *impl_;
  const SequencePages& sequence = impl.ledger.find(id);
  const auto l = static_cast<size_t>(layer_index);
  if (layer_index < 0 || l >= sequence.layers.size() || kv_head < 0 || kv_head >= impl.config.layers[l].lists()) {
    throw Error(Status::kInvalidArgument,
                "the cache has no layer " + std::to_string(layer_index) + ", KV head " + std::to_string(kv_head));
  }
  const LayerConfig& layer = impl.config.layers[l];
  if (layer.latent() && original_space) {
    throw Error(Status::kUnsupported, "layer " + std::to_string(layer_index) +
                                          " stores latents, which are read as they are stored alone; ask for that");
  }
  const int dim = layer.stored_width(side);
  std::fill_n(rows, sequence.length * dim, std::numeric_limits<float>::quiet_NaN());
  std::vector<float> page_rows;
  const auto width_of = [&](const PageEntry& entry) {
    const PageFormat& format = impl.format(entry);
    return (side == Side::kKey ? format.key : format.value).width;
  };
  const auto read_list = [&](const PageList& list) {
    int64_t before = 0;
    for (const PageEntry& entry : list.pages) {
      const int width = width_of(entry);
      page_rows.resize(static_cast<size_t>(entry.live) * static_cast<size_t>(width));
      impl.backend->read(entry, side, page_rows.data());
      for (int slot = 0; slot < entry.live; ++slot) {
        const float* from = page_rows.data() + static_cast<ptrdiff_t>(slot) * width;
        float* to = rows + static_cast<int64_t>(list.position(entry, before, slot)) * dim;
        if (width == dim) {
          std::copy_n(from, dim, to);
          continue;
        }
        std::fill_n(to, dim, 0.0f);  // what attention sees of channels that are not stored
        for (size_t c = 0; c < list.channels.size(); ++c) to[list.channels[c]] = from[c];
      }
      before += entry.live;
    }
  };
  const LayerPages& pages = sequence.layers[l];
  read_list(pages.heads[static_cast<size_t>(kv_head)]);
  if (!pages.low.empty()) read_list(pages.low[static_cast<size_t>(kv_head)]);
  if (!original_space) return;
  const RowMapChain maps(side == Side::kKey ? layer.key.transform : layer.value.transform, row_shape(layer, side), "read");
  for (int64_t t = 0; t < sequence.length; ++t) maps.output(kv_head, rows + t * dim);
}

}  // namespace kvmix
