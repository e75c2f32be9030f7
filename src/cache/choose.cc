// Which channels of its keys a sequence stores from its prompt's end on.
#include <algorithm>

#include "base/parallel.h"
#include "cache/state.h"

namespace kvmix {
namespace {

// Mean of the squares of a list's keys by channel, in fp32, over the tokens that are not among `dropped` (ascending places).
std::vector<float> key_squares(const Backend& backend, const PageList& list, size_t width, std::span<const int32_t> dropped) {
  std::vector<float> sums(width, 0.0f), rows;
  int32_t token = 0;
  size_t stay = 0;
  for (const PageEntry& page : list.pages) {
    rows.resize(static_cast<size_t>(page.live) * width);
    backend.read(page, Side::kKey, rows.data());
    for (size_t slot = 0; slot < static_cast<size_t>(page.live); ++slot, ++token) {
      if (!dropped.empty() && dropped.front() == token) {
        dropped = dropped.subspan(1);
        continue;
      }
      ++stay;
      for (size_t c = 0; c < width; ++c) sums[c] += rows[slot * width + c] * rows[slot * width + c];
    }
  }
  for (float& sum : sums) sum /= static_cast<float>(std::max<size_t>(stay, 1));
  return sums;
}

}  // namespace

void Cache::Impl::choose_channels(SequenceId id, size_t layer, std::span<const Ledger::Regroup> dropped) {
  const LayerConfig& shape = config.layers[layer];
  std::vector<PageList>& heads = ledger.find(id).layers[layer].heads;
  const auto width = static_cast<size_t>(shape.head_dim), kept = static_cast<size_t>(governed.thin[layer].key.width);
  std::vector<size_t> open;
  for (size_t h = 0; h < heads.size(); ++h) {
    const PageList& list = heads[h];
    const bool holds = std::any_of(list.pages.begin(), list.pages.end(),
                                   [&](const PageEntry& page) { return page.format == ids[layer].thin; });
    if (!holds) open.push_back(h);
  }
  std::vector<std::vector<float>> keys(open.size());
  parallel_for(std::clamp(static_cast<int>(open.size()), 1, config.threads), open.size(), [&](size_t i) {
    keys[i] = key_squares(*backend, heads[open[i]], width,
                          dropped.empty() ? std::span<const int32_t>() : std::span(dropped[open[i]].drop));
  });
  for (size_t i = 0; i < open.size(); ++i) {
    const ChannelView view{.heads_per_kv = shape.q_heads / shape.kv_heads,
                           .queries = backend->query_squares(id, static_cast<int>(layer), static_cast<int>(open[i])),
                           .keys = keys[i]};
    std::vector<uint8_t> channels(kept);
    governed.channels->choose(view, channels);
    heads[open[i]].channels = std::move(channels);
  }
}

}  // namespace kvmix
