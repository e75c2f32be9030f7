// What a head's list becomes when a policy has dropped tokens of it.
#include <algorithm>

#include "cache/ledger.h"
#include "kvmix/error.h"

namespace kvmix {

std::span<const Gather> Ledger::open_compaction(SequenceId id, Compactions compactions) {
  SequencePages& sequence = find(id);
  if (open_) throw Error(Status::kInternal, "a layer is compacted inside a step; end it first");
  begin_change();
  revise(sequence);
  sequence.quiet_until = 0;
  open_ = true;
  compactions_ = std::move(compactions);
  for (Compaction& made : compactions_) {
    for (Gather& gather : made.gathers) {
      changes_.push_back({&made.next, gather.index, {}, false, {}});
      gathers_.push_back(std::move(gather));
    }
  }
  return gathers_;
}

Ledger::Compactions Ledger::compacted(SequencePages& sequence, size_t layer, std::span<const Regroup> heads) const {
  Compactions made;
  LayerPages& pages = sequence.layers[layer];
  for (size_t h = 0; h < pages.heads.size(); ++h) {
    PageList& list = pages.heads[h];
    const Regroup& change = heads[h];
    std::vector<Kept> moved;
    std::vector<int32_t> gone = change.drop;
    if (!change.demote.empty()) {
      size_t next = 0, token = 0;
      list.for_each_token([&](const PageEntry& page, int slot, int32_t position) {
        if (next < change.demote.size() && static_cast<size_t>(change.demote[next]) == token) {
          moved.push_back({page, slot, position, list.mass.empty() ? 0.0f : list.mass[token]});
          ++next;
        }
        ++token;
      });
      gone.insert(gone.end(), change.demote.begin(), change.demote.end());
      std::sort(gone.begin(), gone.end());
    }
    const int head = static_cast<int>(h);
    const auto add = [&](PageList& of, bool low, std::span<const int32_t> drop, std::span<const Kept> added) {
      compact({layer, head, low, of, drop, added}, made.emplace_back(Compaction{&of, {}, {}}));
    };
    if (!gone.empty()) add(list, false, gone, {});
    if (!moved.empty() || !change.drop_low.empty()) add(pages.low[h], true, change.drop_low, moved);
  }
  return made;
}

// Slots that stay empty if `page` is kept behind so many tokens that move together.
int64_t Ledger::left_empty(const Compacting& job, size_t tokens, const PageList& next, const PageEntry& page) const {
  auto n = static_cast<int64_t>(tokens);
  if (!job.low && next.pages.empty() && page.format != ids_[job.layer].sinks) n -= layers_[job.layer].sinks;
  const int64_t gap = n <= 0 ? -n : (kPageTokens - n % kPageTokens) % kPageTokens;
  return gap + formats_[static_cast<FormatId>(page.format)].slots - page.live;
}

void Ledger::compact(Compacting job, Compaction& to) const {
  const PageList& list = job.list;
  PageList& next = to.next;
  next.channels = list.channels;
  const size_t left = static_cast<size_t>(list.tokens()) - job.drop.size() + job.added.size();
  next.positions.reserve(left);
  if (ids_[job.layer].mass) next.mass.reserve(mass_room(static_cast<int64_t>(left)));
  std::vector<Kept> moving;
  moving.reserve(left);
  int64_t empty = full_pages_ ? 0 : kPageTokens;  // slots that may be left
  int32_t token = 0;
  int64_t before = 0;
  // Tokens from elsewhere that stand before this position; says whether there were any.
  const auto take_added = [&](int32_t position) {
    const size_t old = moving.size();
    while (!job.added.empty() && job.added.front().position < position) {
      moving.push_back(job.added.front());
      job.added = job.added.subspan(1);
    }
    return moving.size() > old;
  };
  for (const PageEntry& page : list.pages) {
    take_added(list.position(page, before, 0));
    const size_t first_moving = moving.size();
    bool whole = true;
    for (int slot = 0; slot < page.live; ++slot, ++token) {
      const int32_t position = list.position(page, before, slot);
      if (take_added(position)) whole = false;
      if (!job.drop.empty() && job.drop.front() == token) {
        job.drop = job.drop.subspan(1);
        whole = false;
        continue;
      }
      moving.push_back({page, slot, position, list.mass.empty() ? 0.0f : list.mass[static_cast<size_t>(token)]});
    }
    before += page.live;
    const PageFormat& format = formats_[static_cast<FormatId>(page.format)];
    const bool settled = format.role == PageRole::kSealed || (format.role == PageRole::kSinks && page.live == format.slots);
    const int64_t gap = left_empty(job, first_moving, next, page);
    if (!whole || !settled || gap > empty) continue;
    empty -= gap;
    const auto own = static_cast<ptrdiff_t>(first_moving);
    move_together(job, std::span(moving).first(first_moving), false, to);
    next.pages.push_back(page);
    std::for_each(moving.begin() + own, moving.end(), [&](const Kept& kept) {
      next.positions.push_back(kept.position);
      if (ids_[job.layer].mass) next.mass.push_back(kept.mass);
    });
    moving.clear();
  }
  moving.insert(moving.end(), job.added.begin(), job.added.end());
  move_together(job, moving, true, to);
  const std::vector<PageEntry> pages = std::move(next.pages);
  next.pages.reserve(table_room(pages.size()));
  next.pages.assign(pages.begin(), pages.end());
}

// Adds pages of these tokens; `newest`: those behind them are still to come.
void Ledger::move_together(const Compacting& job, std::span<const Kept> tokens, bool newest, Compaction& to) const {
  PageList& next = to.next;
  const LayerConfig& config = layers_[job.layer];
  const LayerFormats& ids = ids_[job.layer];
  const auto add = [&](FormatId format, int slots) {
    const size_t n = std::min(tokens.size(), static_cast<size_t>(slots));
    if (n == 0) return;
    Gather gather{static_cast<int>(job.layer), job.kv_head, &next, next.pages.size(), {}};
    gather.sources.reserve(n);
    for (const Kept& kept : tokens.first(n)) {
      gather.sources.push_back({kept.page, kept.slot});
      next.positions.push_back(kept.position);
      if (ids.mass) next.mass.push_back(kept.mass);
    }
    const auto live = static_cast<int32_t>(n);
    next.pages.push_back({kNoPage, format, tokens[n - 1].position - live + 1, live});
    to.gathers.push_back(std::move(gather));
    tokens = tokens.subspan(n);
  };
  if (job.low) {
    while (!tokens.empty()) add(ids.low, kPageTokens);
    return;
  }
  if (next.pages.empty() && config.sinks > 0) add(ids.sinks, config.sinks);
  const auto n = static_cast<int64_t>(tokens.size());
  int64_t sealed = newest ? settled_seals(config, n - 1) : (n + kPageTokens - 1) / kPageTokens;
  if (!ids.seals_in(next)) sealed = 0;
  for (; sealed > 0; --sealed) add(ids.sealed_in(next), kPageTokens);
  while (!tokens.empty()) add(ids.recent, kPageTokens);
}

}  // namespace kvmix
