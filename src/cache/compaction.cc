// What a head's list becomes when a policy has dropped tokens of it.
#include <algorithm>

#include "cache/ledger.h"
#include "kvmix/error.h"

namespace kvmix {

std::span<const Gather> Ledger::open_compaction(SequenceId id, size_t layer, std::span<const std::vector<int32_t>> drops) {
  SequencePages& sequence = find(id);
  if (open_) throw Error(Status::kInternal, "a layer is compacted inside a step; end it first");
  begin_change();
  revise(sequence);
  open_ = true;
  std::vector<PageList>& heads = sequence.layers[layer].heads;
  for (size_t h = 0; h < heads.size(); ++h) {
    if (!drops[h].empty()) compact(layer, static_cast<int>(h), heads[h], drops[h]);
  }
  return gathers_;
}

void Ledger::compact(size_t layer, int kv_head, PageList& list, std::span<const int32_t> drop) {
  PageList& next = compactions_.emplace_back(Compaction{&list, {}}).next;
  next.positions.reserve(static_cast<size_t>(list.tokens()) - drop.size());
  next.pages.reserve(table_room(list.pages.size()));
  std::vector<Kept> moving;
  int32_t token = 0;
  int64_t before = 0;
  for (const PageEntry& page : list.pages) {
    const size_t first_moving = moving.size();
    for (int slot = 0; slot < page.live; ++slot, ++token) {
      if (!drop.empty() && drop.front() == token) {
        drop = drop.subspan(1);
        continue;
      }
      moving.push_back({page, slot, list.position(page, before, slot)});
    }
    before += page.live;
    const PageFormat& format = formats_[static_cast<FormatId>(page.format)];
    const bool whole = moving.size() - first_moving == static_cast<size_t>(page.live);
    const bool settled = format.role == PageRole::kSealed || (format.role == PageRole::kSinks && page.live == format.slots);
    if (!whole || !settled) continue;
    const auto own = static_cast<ptrdiff_t>(first_moving);
    move_together(layer, kv_head, std::span(moving).first(first_moving), false, next);
    next.pages.push_back(page);
    std::for_each(moving.begin() + own, moving.end(), [&](const Kept& kept) { next.positions.push_back(kept.position); });
    moving.clear();
  }
  move_together(layer, kv_head, moving, true, next);
  const std::vector<PageEntry> pages = std::move(next.pages);
  next.pages.reserve(table_room(pages.size()));
  next.pages.assign(pages.begin(), pages.end());
}

// Adds pages of these tokens; `newest`: those behind them are still to come.
void Ledger::move_together(size_t layer, int kv_head, std::span<const Kept> tokens, bool newest, PageList& next) {
  const LayerConfig& config = layers_[layer];
  const auto add = [&](FormatId format, int slots) {
    const size_t n = std::min(tokens.size(), static_cast<size_t>(slots));
    if (n == 0) return;
    Gather gather{static_cast<int>(layer), kv_head, &next, next.pages.size(), {}};
    for (const Kept& kept : tokens.first(n)) {
      gather.sources.push_back({kept.page, kept.slot});
      next.positions.push_back(kept.position);
    }
    const auto live = static_cast<int32_t>(n);
    next.pages.push_back({kNoPage, format, tokens[n - 1].position - live + 1, live});
    changes_.push_back({&next, next.pages.size() - 1, {}, false});
    gathers_.push_back(std::move(gather));
    tokens = tokens.subspan(n);
  };
  if (next.pages.empty() && config.sinks > 0) add(ids_[layer].sinks, config.sinks);
  const auto n = static_cast<int64_t>(tokens.size());
  int64_t sealed = newest ? settled_seals(config, n - 1) : (n + kPageTokens - 1) / kPageTokens;
  if (!ids_[layer].seals) sealed = 0;
  for (; sealed > 0; --sealed) add(ids_[layer].sealed, kPageTokens);
  while (!tokens.empty()) add(ids_[layer].recent, kPageTokens);
}

}  // namespace kvmix
