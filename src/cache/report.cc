// What the cache says of itself, and reading rows back.
#include <cmath>
#include <cstring>
#include <limits>
#include <set>

#include "base/fp16.h"
#include "cache/state.h"
#include "kvmix/error.h"

namespace kvmix {

MemoryReport Cache::memory() const {
  const Impl& impl = *impl_;
  MemoryReport report;
  std::set<const std::byte*> seen;  // records that forks share count once
  const auto once = [&](const std::byte* record) { return !impl.pool.shared(record) || seen.insert(record).second; };
  for (const auto& [id, sequence] : impl.sequences) {
    report.tokens += sequence.length;
    report.table_bytes += sizeof(SequenceState) + sequence.layers.capacity() * sizeof(LayerState);
    for (size_t l = 0; l < sequence.layers.size(); ++l) {
      const LayerState& state = sequence.layers[l];
      report.table_bytes += state.heads.capacity() * sizeof(HeadState);
      for (const HeadState& head : state.heads) {
        report.table_bytes += head.pages.capacity() * sizeof(std::byte*);
        if (head.sinks != nullptr && once(head.sinks)) report.sink_bytes += impl.sizes[l].sink_bytes;
        for (size_t p = 0; p < head.pages.size(); ++p) {
          if (head.pages[p] == nullptr || !once(head.pages[p])) continue;
          const bool packed = static_cast<int64_t>(p) < state.sealed;
          (packed ? report.sealed_bytes : report.open_bytes) += packed ? impl.sizes[l].packed_bytes : impl.sizes[l].open_bytes;
        }
      }
    }
  }
  report.slack_bytes = impl.pool.taken_bytes() - report.sealed_bytes - report.open_bytes - report.sink_bytes;
  report.total_bytes = impl.pool.taken_bytes() + report.table_bytes;
  for (const ThreadScratch& t : impl.threads) {
    report.scratch_bytes += t.kernel.capacity() + t.q.capacity() * sizeof(float) + t.rows.capacity() * sizeof(uint16_t) +
                            t.positions.capacity() * sizeof(int64_t) +
                            (t.pages.capacity() + t.open_pages.capacity()) * sizeof(PageRef);
    for (const PartialRoom* room : {&t.whole, &t.open}) {
      report.scratch_bytes += (room->m.capacity() + room->l.capacity() + room->acc.capacity()) * sizeof(float);
    }
  }
  report.scratch_bytes += (impl.part_m.capacity() + impl.part_l.capacity() + impl.part_acc.capacity()) * sizeof(float);
  return report;
}

Cache::TailReport Cache::tail(SequenceId id, int layer_index) const {
  const SequenceState& sequence = impl_->find(id);
  const auto l = static_cast<size_t>(layer_index);
  const LayerConfig& layer = impl_->config.layers.at(l);
  const LayerState& state = sequence.layers[l];
  const int64_t sinks = std::min<int64_t>(sequence.length, layer.sinks);
  return {sinks, (state.sealed - state.freed) * kPageTokens, sequence.length - sinks - state.sealed * kPageTokens};
}

CacheStats Cache::stats() const {
  CacheStats stats;
  for (const std::string& name : impl_->kernels_used) {
    if (stats.kernel.find(name) == std::string::npos) stats.kernel += (stats.kernel.empty() ? "" : "+") + name;
  }
  stats.sealed_pages = impl_->sealed_pages;
  for (const ThreadScratch& t : impl_->threads) {
    stats.seal_seconds += t.seal_seconds;
    stats.append_seconds += t.append_seconds;
    stats.attend_seconds += t.attend_seconds;
  }
  return stats;
}

void Cache::read(SequenceId id, int layer_index, int kv_head, Side side, bool original_space, float* rows) const {
  const Impl& impl = *impl_;
  const SequenceState& sequence = impl.find(id);
  const auto l = static_cast<size_t>(layer_index);
  if (layer_index < 0 || l >= sequence.layers.size() || kv_head < 0 || kv_head >= impl.config.layers[l].kv_heads) {
    throw Error(Status::kInvalidArgument,
                "the cache has no layer " + std::to_string(layer_index) + ", KV head " + std::to_string(kv_head));
  }
  const LayerConfig& layer = impl.config.layers[l];
  const LayerSizes& s = impl.sizes[l];
  const LayerState& state = sequence.layers[l];
  const HeadState& head = state.heads[static_cast<size_t>(kv_head)];
  const int dim = layer.head_dim;
  const auto expand = [&](const std::byte* from, int n, float* to) {
    for (int i = 0; i < n * dim; ++i) {
      uint16_t h;
      std::memcpy(&h, from + static_cast<size_t>(i) * 2, 2);
      to[i] = f16_to_f32(h);
    }
  };
  const auto sinks = static_cast<int>(std::min<int64_t>(layer.sinks, sequence.length));
  const size_t sink_values = static_cast<size_t>(layer.sinks) * static_cast<size_t>(dim) * 2;
  if (sinks > 0) expand(head.sinks + (side == Side::kValue ? sink_values : 0), sinks, rows);
  std::vector<float> tile(static_cast<size_t>(kPageTokens) * static_cast<size_t>(dim));
  for (size_t p = 0; p < head.pages.size(); ++p) {
    const auto page = static_cast<int64_t>(p);
    float* to = rows + (layer.sinks + page * kPageTokens) * dim;
    const int live = live_slots(layer, page, sequence.length);
    if (head.pages[p] == nullptr) {
      std::fill_n(to, static_cast<ptrdiff_t>(live) * dim, std::numeric_limits<float>::quiet_NaN());
      continue;
    }
    const bool sealed = page < state.sealed;
    const TileFormat &key = sealed ? s.key : s.open_key, &value = sealed ? s.value : s.open_value;
    const TileFormat& format = side == Side::kKey ? key : value;
    const std::byte* from = head.pages[p] + (side == Side::kValue ? key.bytes : 0);
    if (format.spec.is_f16()) {
      expand(from, live, to);
    } else {
      decode_tile(format.spec, side, dim, from, tile.data());
      std::copy_n(tile.data(), static_cast<ptrdiff_t>(live) * dim, to);
    }
  }
  if (!original_space) return;
  const RowMapChain& maps = (side == Side::kKey ? impl.key_rows : impl.value_rows)[static_cast<size_t>(layer_index)];
  for (int64_t t = 0; t < sequence.length; ++t) maps.output(kv_head, rows + t * dim);
}

}  // namespace kvmix
