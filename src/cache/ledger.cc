#include "cache/ledger.h"

#include <algorithm>
#include <string>

#include "kvmix/error.h"

namespace kvmix {

SequencePages& Ledger::find(SequenceId id) {
  const auto it = sequences_.find(id);
  if (it == sequences_.end()) throw Error(Status::kNotFound, "the cache has no sequence " + std::to_string(id));
  return it->second;
}

SequenceId Ledger::create() {
  SequencePages sequence;
  sequence.layers.resize(layers_.size());
  for (size_t l = 0; l < layers_.size(); ++l) sequence.layers[l].heads.resize(static_cast<size_t>(layers_[l].kv_heads));
  sequences_.emplace(next_id_, std::move(sequence));
  return next_id_++;
}

SequenceId Ledger::fork(SequenceId id) {
  SequencePages copy = find(id);
  for (LayerPages& layer : copy.layers) {
    for (PageList& list : layer.heads) {
      for (const PageEntry& entry : list.pages) ++extra_references_[entry.handle];
    }
  }
  sequences_.emplace(next_id_, std::move(copy));
  return next_id_++;
}

std::vector<FreedPage> Ledger::remove(SequenceId id) {
  SequencePages& sequence = find(id);
  std::vector<FreedPage> freed;
  for (const LayerPages& layer : sequence.layers) {
    for (const PageList& list : layer.heads) {
      for (const PageEntry& entry : list.pages) drop(entry, freed);
    }
  }
  sequences_.erase(id);
  return freed;
}

void Ledger::drop(const PageEntry& entry, std::vector<FreedPage>& freed) {
  const auto extra = extra_references_.find(entry.handle);
  if (extra == extra_references_.end()) {
    freed.push_back({entry.handle, static_cast<FormatId>(entry.format)});
  } else if (--extra->second == 0) {
    extra_references_.erase(extra);
  }
}

size_t Ledger::body(size_t layer, const PageList& list) const {
  return !list.pages.empty() && list.pages[0].format == ids_[layer].sinks ? 1 : 0;
}

void Ledger::begin_change() {
  plan_.entries.clear();
  plan_.transcodes.resize(layers_.size());
  for (std::vector<Transcode>& transcodes : plan_.transcodes) transcodes.clear();
  changes_.clear();
  undo_.clear();
  old_sizes_.clear();
  cuts_.clear();
  lengths_.clear();
  open_ = true;
}

void Ledger::end_change() { open_ = false; }

void Ledger::replace(PageList& list, size_t index, FormatId format, bool copies) {
  PageEntry& entry = list.pages[index];
  changes_.push_back({&list, index, entry, copies});
  entry.handle = kNoPage;
  entry.format = format;
}

void Ledger::set_live(PageList& list, size_t index, int64_t end) {
  PageEntry& entry = list.pages[index];
  const int slots = formats_[static_cast<FormatId>(entry.format)].slots;
  const auto live = static_cast<int32_t>(std::clamp<int64_t>(end - entry.first, 0, slots));
  if (live == entry.live) return;
  undo_.push_back({&list, index, entry});
  entry.live = live;
}

// Recent pages that the window has passed become sealed ones; `length` is that before the step's tokens.
void Ledger::seal(size_t layer, int kv_head, int64_t length, PageList& list) {
  const LayerConfig& config = layers_[layer];
  size_t recent = list.pages.size();
  while (recent > 0 && list.pages[recent - 1].format == ids_[layer].recent) --recent;
  if (recent == list.pages.size()) return;
  size_t end = recent;
  if (uses_ratio(config)) {
    end += static_cast<size_t>(ratio_surplus_pages(config, length - list.pages[recent].first));
  } else {
    while (end < list.pages.size() && list.pages[end].first + kPageTokens + config.window.tokens <= length) ++end;
  }
  for (size_t i = recent; i < end; ++i) {
    const PageEntry open = list.pages[i];
    replace(list, i, ids_[layer].sealed, false);
    plan_.transcodes[layer].push_back({static_cast<int>(layer), kv_head, open, &list, i});
  }
}

void Ledger::open_layer(size_t layer, SequencePages& sequence, const StepEntry& entry) {
  const LayerConfig& config = layers_[layer];
  std::vector<PageList>& heads = sequence.layers[layer].heads;
  const int64_t end = entry.end();
  if (ids_[layer].seals) {
    // Head by head, so that a head's pages come out next to each other.
    for (size_t h = 0; h < heads.size(); ++h) seal(layer, static_cast<int>(h), entry.start, heads[h]);
  }
  for (PageList& list : heads) {
    old_sizes_.push_back({&list, list.pages.size()});
    const size_t room = std::max(list_room(config, end), table_room(list.pages.size()));
    if (list.pages.capacity() < room) list.pages.reserve(room);
    if (config.sinks > 0 && entry.start < config.sinks) {
      if (list.pages.empty()) {
        list.pages.push_back({kNoPage, ids_[layer].sinks, 0, 0});
        changes_.push_back({&list, 0, {}, false});
      } else if (shared(list.pages[0].handle)) {
        replace(list, 0, ids_[layer].sinks, true);
      }
      set_live(list, 0, end);
    }
    // A partly filled page that a fork shares is copied before it is written to.
    int64_t next = config.sinks;
    if (list.pages.size() > body(layer, list)) {
      const size_t last = list.pages.size() - 1;
      const PageEntry& page = list.pages[last];
      next = page.first + kPageTokens;
      if (page.live < kPageTokens) {
        if (shared(page.handle)) replace(list, last, ids_[layer].recent, true);
        set_live(list, last, end);
      }
    }
    for (; next < end; next += kPageTokens) {
      if (list.pages.size() == list.pages.capacity()) list.pages.reserve(list.pages.capacity() + kTableStep);
      const auto live = static_cast<int32_t>(std::min<int64_t>(end - next, kPageTokens));
      list.pages.push_back({kNoPage, ids_[layer].recent, static_cast<int32_t>(next), live});
      changes_.push_back({&list, list.pages.size() - 1, {}, false});
    }
  }
}

const StepPlan& Ledger::open(std::span<const StepItem> items) {
  if (open_) throw Error(Status::kInvalidArgument, "a step is already open; end or abort it first");
  if (items.empty()) throw Error(Status::kInvalidArgument, "a step needs at least one sequence");
  begin_change();
  open_ = false;  // until the items are known to be sound
  int64_t row = 0;
  for (const StepItem& item : items) {
    SequencePages& sequence = find(item.sequence);
    if (item.n_tokens < 1) {
      throw Error(Status::kInvalidArgument, "a step of " + std::to_string(item.n_tokens) + " tokens; expected at least 1");
    }
    if (sequence.length + item.n_tokens > INT32_MAX) {
      throw Error(Status::kUnsupported, "sequence " + std::to_string(item.sequence) + " would exceed 2147483647 tokens");
    }
    for (const StepEntry& entry : plan_.entries) {
      if (entry.id == item.sequence) {
        throw Error(Status::kInvalidArgument, "sequence " + std::to_string(item.sequence) + " appears twice in a step");
      }
    }
    plan_.entries.push_back({item.sequence, &sequence, sequence.length, item.n_tokens, row});
    lengths_.emplace_back(&sequence, sequence.length + item.n_tokens);
    row += item.n_tokens;
  }
  open_ = true;
  for (size_t l = 0; l < layers_.size(); ++l) {
    for (size_t e = 0; e < plan_.entries.size(); ++e) open_layer(l, *lengths_[e].first, plan_.entries[e]);
  }
  return plan_;
}

size_t Ledger::bytes_needed(std::span<const StepItem> items) {
  open(items);
  size_t bytes = 0;
  for (const PageChange& change : changes_) bytes += formats_[static_cast<FormatId>(change.entry().format)].bytes;
  abort();
  return bytes;
}

const StepPlan& Ledger::open_truncation(SequenceId id, int64_t n_tokens) {
  SequencePages& sequence = find(id);
  if (open_) throw Error(Status::kInvalidArgument, "a sequence cannot be truncated inside a step; end it first");
  if (n_tokens < 0 || n_tokens > sequence.length) {
    throw Error(Status::kInvalidArgument, "cannot truncate sequence " + std::to_string(id) + " of " +
                                              std::to_string(sequence.length) + " tokens to " + std::to_string(n_tokens));
  }
  for (size_t l = 0; l < layers_.size() && n_tokens > 0; ++l) {
    const PageList& list = sequence.layers[l].heads[0];
    const size_t first = body(l, list);
    if (first == list.pages.size() || list.pages[first].first == layers_[l].sinks) continue;
    if (n_tokens + 1 - layers_[l].sliding_window < list.pages[first].first) {
      throw Error(Status::kUnsupported, "sequence " + std::to_string(id) + " cannot go back to " + std::to_string(n_tokens) +
                                            " tokens: layer " + std::to_string(l) +
                                            " has freed what its sliding window left behind");
    }
  }
  begin_change();
  lengths_.emplace_back(&sequence, n_tokens);
  for (size_t l = 0; l < layers_.size(); ++l) {
    for (size_t h = 0; h < sequence.layers[l].heads.size(); ++h) {
      PageList& list = sequence.layers[l].heads[h];
      size_t keep = list.pages.size();
      while (keep > 0 && list.pages[keep - 1].first >= n_tokens) --keep;
      cuts_.push_back({&list, keep});
      if (keep == 0) continue;
      const PageEntry last = list.pages[keep - 1];
      const PageFormat& format = formats_[static_cast<FormatId>(last.format)];
      // A cut page is appended to again.
      if (!format.appendable() && last.first + format.slots > n_tokens) {
        replace(list, keep - 1, ids_[l].recent, false);
        plan_.transcodes[l].push_back({static_cast<int>(l), static_cast<int>(h), last, &list, keep - 1});
      }
      set_live(list, keep - 1, n_tokens);
    }
  }
  return plan_;
}

// Takes out pages that no later query sees: one at position `length` sees keys after length - sliding_window.
void Ledger::leave_window(size_t layer, SequencePages& sequence, std::vector<FreedPage>& freed) {
  const int64_t first_visible = sequence.length - layers_[layer].sliding_window;
  std::vector<PageList>& heads = sequence.layers[layer].heads;
  const auto gone = [&](const PageList& list) {
    const size_t first = body(layer, list);
    return first < list.pages.size() && list.pages[first].first + kPageTokens <= first_visible;
  };
  bool any = false;
  while (gone(heads[0])) {
    for (PageList& list : heads) {
      const auto at = list.pages.begin() + static_cast<ptrdiff_t>(body(layer, list));
      drop(*at, freed);
      list.pages.erase(at);
    }
    any = true;
  }
  const size_t room = list_room(layers_[layer], sequence.length);
  for (PageList& list : heads) {
    if (!any || list.pages.capacity() <= room || list.pages.size() > room) continue;
    std::vector<PageEntry> fitting;
    fitting.reserve(room);
    fitting.assign(list.pages.begin(), list.pages.end());
    list.pages = std::move(fitting);
  }
}

std::vector<FreedPage> Ledger::commit() {
  if (!open_) throw Error(Status::kInvalidArgument, "no step is open");
  std::vector<FreedPage> freed;
  for (const PageChange& change : changes_) {
    if (change.before.handle != kNoPage) drop(change.before, freed);
  }
  for (const Size& cut : cuts_) {
    std::vector<PageEntry>& pages = cut.list->pages;
    while (pages.size() > cut.entries) {
      drop(pages.back(), freed);
      pages.pop_back();
    }
  }
  for (const auto& [sequence, length] : lengths_) {
    sequence->length = length;
    for (size_t l = 0; l < layers_.size() && cuts_.empty(); ++l) {
      if (layers_[l].sliding_window > 0) leave_window(l, *sequence, freed);
    }
  }
  end_change();
  return freed;
}

std::vector<FreedPage> Ledger::abort() {
  if (!open_) throw Error(Status::kInvalidArgument, "no step is open");
  std::vector<FreedPage> fresh;
  for (auto it = changes_.rbegin(); it != changes_.rend(); ++it) {
    const PageEntry& entry = it->entry();
    if (entry.handle != kNoPage) fresh.push_back({entry.handle, static_cast<FormatId>(entry.format)});
    it->entry() = it->before;
  }
  // Newest first, so that an entry changed twice ends as it was.
  for (auto it = undo_.rbegin(); it != undo_.rend(); ++it) it->list->pages[it->index].live = it->before.live;
  for (const Size& old : old_sizes_) old.list->pages.resize(old.entries);
  end_change();
  return fresh;
}

}  // namespace kvmix
