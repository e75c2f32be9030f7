// Which channels of its keys a sequence stores from its prompt's end on.
#include <algorithm>

#include "cache/state.h"

namespace kvmix {

void Cache::Impl::choose_channels(SequenceId id, size_t layer, std::span<const Ledger::Regroup> dropped) {
  const LayerConfig& shape = config.layers[layer];
  SequencePages& sequence = ledger.find(id);
  sequence.quiet_until = 0;  // lists that kept all their rows as they are have pages to seal from here on
  std::vector<PageList>& heads = sequence.layers[layer].heads;
  const auto width = static_cast<size_t>(shape.head_dim), kept = static_cast<size_t>(governed.thin[layer].key.width);
  std::vector<size_t> open;
  for (size_t h = 0; h < heads.size(); ++h) {
    const PageList& list = heads[h];
    const bool holds = std::any_of(list.pages.begin(), list.pages.end(),
                                   [&](const PageEntry& page) { return page.format == ids[layer].thin; });
    if (!holds) open.push_back(h);
  }
  std::vector<Backend::KeySquares> lists;
  lists.reserve(open.size());
  for (const size_t h : open) lists.push_back({&heads[h], dropped.empty() ? std::span<const int32_t>() : dropped[h].drop});
  const std::vector<float> keys = backend->key_squares(static_cast<int>(layer), lists);
  for (size_t i = 0; i < open.size(); ++i) {
    const ChannelView view{.heads_per_kv = shape.q_heads / shape.kv_heads,
                           .queries = backend->query_squares(id, static_cast<int>(layer), static_cast<int>(open[i])),
                           .keys = std::span(keys).subspan(i * width, width)};
    std::vector<uint8_t> channels(kept);
    governed.channels->choose(view, channels);
    heads[open[i]].channels = std::move(channels);
  }
}

}  // namespace kvmix
