#include "cache/ledger.h"

#include <algorithm>
#include <string>
#include <unordered_set>

#include "base/fetch_ahead.h"
#include "kvmix/error.h"

namespace kvmix {
namespace {

void check_prompt(const StepItem& item, const SequencePages& sequence) {
  if (!item.decoded || (!item.more && !sequence.in_prompt)) return;
  throw Error(Status::kInvalidArgument, "sequence " + std::to_string(item.sequence) +
                                            " has decoded tokens inside a prompt; end the prompt with a step that is not "
                                            "marked `more` first");
}

void check_each_once(std::span<const StepItem> items) {
  const auto ascend = [](const StepItem& a, const StepItem& b) { return a.sequence >= b.sequence; };
  if (std::adjacent_find(items.begin(), items.end(), ascend) == items.end()) return;
  std::vector<SequenceId> ids;
  ids.reserve(items.size());
  for (const StepItem& item : items) ids.push_back(item.sequence);
  std::sort(ids.begin(), ids.end());
  if (const auto twice = std::adjacent_find(ids.begin(), ids.end()); twice != ids.end())
    throw Error(Status::kInvalidArgument, "sequence " + std::to_string(*twice) + " appears twice in a step");
}

}  // namespace

SequencePages& Ledger::look_up(SequenceId id) {
  const auto at = std::lower_bound(index_.begin(), index_.end(), id,
                                   [](const auto& known, SequenceId wanted) { return known.first < wanted; });
  if (at == index_.end() || at->first != id) throw Error(Status::kNotFound, "the cache has no sequence " + std::to_string(id));
  return *at->second;
}

SequenceId Ledger::add(SequencePages sequence) {
  revise(sequence);
  // What fails, fails before there is a sequence.
  if (index_.size() == index_.capacity()) index_.reserve(2 * index_.size() + 16);
  index_.emplace_back(next_id_, &sequences_.emplace(next_id_, std::move(sequence)).first->second);
  return next_id_++;
}

SequencePages& Ledger::find(SequenceId id) {
  SequencePages& sequence = look_up(id);
  settle(sequence);
  return sequence;
}

SequenceId Ledger::create() {
  SequencePages sequence;
  sequence.layers.resize(layers_.size());
  for (size_t l = 0; l < layers_.size(); ++l) {
    sequence.layers[l].heads.resize(static_cast<size_t>(layers_[l].lists()));
    if (ids_[l].low_tier) sequence.layers[l].low.resize(static_cast<size_t>(layers_[l].kv_heads));
  }
  return add(std::move(sequence));
}

SequenceId Ledger::fork(SequenceId id) {
  find(id).quiet_until = 0;  // its last pages are shared from now on
  SequencePages copy = find(id);
  for (const LayerPages& layer : copy.layers) {
    layer.for_each_list([&](const PageList& list) {
      for (const PageEntry& entry : list.pages) ++extra_references_[entry.handle];
    });
  }
  return add(std::move(copy));
}

std::vector<FreedPage> Ledger::remove(SequenceId id) {
  SequencePages& sequence = find(id);
  std::vector<FreedPage> freed;
  for (const LayerPages& layer : sequence.layers) {
    layer.for_each_list([&](const PageList& list) {
      for (const PageEntry& entry : list.pages) drop(entry, freed);
    });
  }
  std::erase_if(index_, [&](const auto& known) { return known.first == id; });
  sequences_.erase(id);
  return freed;
}

void Ledger::drop(const PageEntry& entry, std::vector<FreedPage>& freed) {
  const auto extra = extra_references_.empty() ? extra_references_.end() : extra_references_.find(entry.handle);
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
  plan_.changes = {};
  plan_.transcodes.resize(layers_.size());
  for (std::vector<Transcode>& transcodes : plan_.transcodes) transcodes.clear();
  changes_.clear();
  begun_.clear();
  undo_.clear();
  old_sizes_.clear();
  cuts_.clear();
  growth_.clear();
  compactions_.clear();
  gathers_.clear();
}

Ledger::PromptPart Ledger::prompt_part(const StepItem& item, const SequencePages& sequence) {
  const bool prompt = !item.decoded && (item.more || item.n_tokens > 1 || sequence.in_prompt);
  return {prompt, prompt && !item.more};
}

// Changes are written in place: copying one that was just written waits for the writing.
void Ledger::replace(PageList& list, size_t index, FormatId format, bool copies, const PageChange::Owner& owner) {
  PageEntry& entry = list.pages[index];
  PageChange& change = changes_.emplace_back();
  change.list = &list, change.index = index, change.before = entry, change.copies = copies, change.owner = owner;
  entry.handle = kNoPage;
  entry.format = format;
}

void Ledger::begin_page(PageList& list, PageEntry page, const PageChange::Owner& owner) {
  PageChange& change = begun_.emplace_back();
  change.list = &list, change.index = list.pages.size(), change.before.first = page.first, change.owner = owner;
  page.handle = kNoPage;
  list.pages.push_back(page);
}

void Ledger::set_live(PageList& list, size_t index, int64_t end) {
  PageEntry& entry = list.pages[index];
  const int slots = formats_[static_cast<FormatId>(entry.format)].slots;
  const auto live = static_cast<int32_t>(std::clamp<int64_t>(end - entry.first, 0, slots));
  if (live == entry.live) return;
  undo_.push_back({&list, index, entry});
  entry.live = live;
}

Ledger::Due Ledger::due(size_t layer, const PageList& list) const {
  const LayerConfig& config = layers_[layer];
  size_t recent = list.pages.size();
  int64_t tail = 0;
  for (; recent > 0 && list.pages[recent - 1].format == ids_[layer].recent; --recent) tail += list.pages[recent - 1].live;
  // The last page is not due before it is full.
  const size_t most = list.pages.size() - (list.pages.size() > recent && list.pages.back().live < kPageTokens ? 1 : 0);
  size_t end = recent;
  if (uses_ratio(config)) {
    end = std::min(most, recent + static_cast<size_t>(ratio_surplus_pages(config, tail)));
  } else {
    for (int64_t newer = tail; end < most; ++end) {
      newer -= list.pages[end].live;
      if (newer < config.window.tokens) break;
    }
  }
  return {recent, end};
}

// Recent pages that the window has passed become sealed ones.
void Ledger::seal(const PageChange::Owner& owner, PageList& list, const Due& pages) {
  const auto layer = static_cast<size_t>(owner.layer);
  for (size_t i = pages.first; i < pages.end; ++i) {
    const PageEntry open = list.pages[i];
    replace(list, i, ids_[layer].sealed_in(list), false, owner);
    Transcode& job = plan_.transcodes[layer].emplace_back();
    job.layer = owner.layer, job.kv_head = owner.kv_head, job.from = open, job.list = &list, job.index = i;
  }
}

void Ledger::open_list(const PageChange::Owner& owner, PageList& list, const StepEntry& entry) {
  const auto layer = static_cast<size_t>(owner.layer);
  const LayerConfig& config = layers_[layer];
  const int64_t end = entry.end();
  old_sizes_.push_back({&list, list.pages.size()});
  const size_t listed = list_room(config, list.positions.empty() ? end : list.tokens() + entry.n_tokens);
  const size_t room = std::max(listed, table_room(list.pages.size()));
  if (list.pages.capacity() < room) list.pages.reserve(room);
  int64_t next = entry.start;
  const auto add = [&](FormatId format, int slots) {
    if (list.pages.size() == list.pages.capacity()) list.pages.reserve(list.pages.capacity() + kTableStep);
    const auto live = static_cast<int32_t>(std::min<int64_t>(end - next, slots));
    begin_page(list, {kNoPage, format, static_cast<int32_t>(next), live}, owner);
    next += live;
  };
  if (list.pages.empty()) {
    if (config.sinks > 0) add(ids_[layer].sinks, config.sinks);
  } else {
    const size_t last = list.pages.size() - 1;
    const PageEntry page = list.pages[last];
    const PageFormat& format = formats_[static_cast<FormatId>(page.format)];
    // Unless its newest token was dropped, the last page goes on; one that a fork shares is copied before it is written to.
    const bool apart = page.first + page.live != entry.start;
    if (format.appendable() && page.live < format.slots && (!apart || full_pages_)) {
      if (shared(page.handle)) replace(list, last, static_cast<FormatId>(page.format), true, owner);
      if (apart) {  // its tokens name their positions, so that only the next one's counts
        undo_.push_back({&list, last, list.pages[last]});
        list.pages[last].first = static_cast<int32_t>(entry.start) - page.live;
      }
      set_live(list, last, end);
      next += list.pages[last].live - page.live;
    }
  }
  while (next < end) add(ids_[layer].recent, kPageTokens);
}

void Ledger::open_like(const Opened& first, const PageChange::Owner& owner, PageList& list) {
  const std::vector<PageEntry>& like = first.list->pages;
  old_sizes_.push_back({&list, first.pages});
  if (list.pages.capacity() < like.capacity()) list.pages.reserve(like.capacity());
  if (first.copies) replace(list, first.pages - 1, static_cast<FormatId>(like[first.pages - 1].format), true, owner);
  if (first.grows) {
    undo_.push_back({&list, first.pages - 1, list.pages[first.pages - 1]});
    list.pages[first.pages - 1].live = like[first.pages - 1].live;
  }
  for (size_t i = first.pages; i < like.size(); ++i) begin_page(list, like[i], owner);
}

// Head by head, so that a head's pages come out next to each other.
void Ledger::open_layer(size_t layer, size_t index) {
  const StepEntry& entry = plan_.entries[index];
  std::vector<PageList>& heads = growth_[index].sequence->layers[layer].heads;
  const bool alike = heads_alike(layer), seals = !(ids_[layer].waits() && entry.prompt);
  PageChange::Owner owner{static_cast<int32_t>(index), static_cast<int32_t>(layer), 0};
  Due pages{};
  Opened first{};
  for (size_t h = 0; h < heads.size(); ++h) {
    PageList& list = heads[h];
    owner.kv_head = static_cast<int32_t>(h);
    const bool like_first = alike && h > 0;
    if (seals && ids_[layer].seals_in(list)) {
      if (!like_first) pages = due(layer, list);
      seal(owner, list, pages);
    }
    if (like_first) {
      open_like(first, owner, list);
      continue;
    }
    const size_t had = list.pages.size(), changes = changes_.size(), undo = undo_.size();
    open_list(owner, list, entry);
    first = {&list, had, changes_.size() > changes, undo_.size() > undo};
  }
}

// Lists of many sequences lie all over memory and were last looked at steps ago: the layers after the present one are fetched
// while it is written.
void Ledger::fetch_lists(size_t layer) const {
  if (layer >= layers_.size()) return;
  for (const size_t e : loud_) {
    for (const PageList& list : growth_[e].sequence->layers[layer].heads) fetch_ahead(&list);
  }
}

void Ledger::fetch_last_pages(size_t layer) const {
  if (layer >= layers_.size()) return;
  for (const size_t e : loud_) {
    for (const PageList& list : growth_[e].sequence->layers[layer].heads) {
      const PageEntry* const end = list.pages.data() + list.pages.size();  // where a page begins; one before the last is sealed
      fetch_ahead(end - std::min<size_t>(list.pages.size(), 2)), fetch_ahead(end);
    }
  }
}

// Pages in place of others come first. New ones that are sealed together come next to each other, of all heads and layers: what
// stays is not scattered among what goes. They are of few ages, so that they are counted instead of compared.
void Ledger::order_changes() {
  ages_.clear();
  age_of_.clear();
  bool ordered = true;
  size_t last = 0;
  for (const PageChange& change : begun_) {
    const int32_t age = change.before.first;
    if (ages_.empty() || ages_[last].age != age) {
      ordered = ordered && (ages_.empty() || ages_[last].age < age);
      const auto known = std::find_if(ages_.begin(), ages_.end(), [&](const Age& a) { return a.age == age; });
      last = static_cast<size_t>(known - ages_.begin());
      if (known == ages_.end()) ages_.push_back({age, 0, last});
    }
    ++ages_[last].count;
    age_of_.push_back(static_cast<uint32_t>(last));
  }
  if (ordered) {
    changes_.insert(changes_.end(), begun_.begin(), begun_.end());
    return;
  }
  std::vector<Age> by_age = ages_;
  std::sort(by_age.begin(), by_age.end(), [](const Age& a, const Age& b) { return a.age < b.age; });
  size_t at = changes_.size();
  for (const Age& each : by_age) at += std::exchange(ages_[each.place].count, at);  // from now on where its next one goes
  changes_.resize(at);
  for (size_t i = 0; i < begun_.size(); ++i) changes_[ages_[age_of_[i]].count++] = begun_[i];
}

const StepPlan& Ledger::open(std::span<const StepItem> items) {
  if (open_) throw Error(Status::kInvalidArgument, "a step is already open; end or abort it first");
  if (items.empty()) throw Error(Status::kInvalidArgument, "a step needs at least one sequence");
  check_each_once(items);
  begin_change();
  found_.clear();
  size_t next = 0;  // most steps name sequences in the index' order
  for (const StepItem& item : items) {
    const bool here = next < index_.size() && index_[next].first == item.sequence;
    SequencePages& sequence = here ? *index_[next].second : look_up(item.sequence);
    next = here ? next + 1 : 0;
    fetch_ahead(&sequence), fetch_ahead(&sequence.layers);
    found_.push_back(&sequence);
  }
  int64_t row = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    const StepItem& item = items[i];
    SequencePages& sequence = *found_[i];
    if (item.n_tokens < 1) {
      throw Error(Status::kInvalidArgument, "a step of " + std::to_string(item.n_tokens) + " tokens; expected at least 1");
    }
    if (sequence.length + item.n_tokens > INT32_MAX) {
      throw Error(Status::kUnsupported, "sequence " + std::to_string(item.sequence) + " would exceed 2147483647 tokens");
    }
    check_prompt(item, sequence);
    const auto [prompt, ends] = prompt_part(item, sequence);
    const int64_t start = sequence.length, end = start + item.n_tokens;
    const int64_t prompt_start = sequence.in_prompt ? sequence.prompt_start : start;
    plan_.entries.push_back({.id = item.sequence,
                             .pages = &sequence,
                             .start = start,
                             .n_tokens = item.n_tokens,
                             .row = row,
                             .prompt = prompt,
                             .ends_prompt = ends,
                             .prompt_start = prompt_start,
                             .revision = sequence.revision});
    growth_.push_back({&sequence, end, ends ? end : sequence.prompt_length, prompt_start, sequence.counted_from,
                       prompt && item.more, sequence.revision, writes_late_ && end <= sequence.quiet_until});
    row += item.n_tokens;
  }
  open_ = true;
  loud_.clear();
  for (size_t e = 0; e < growth_.size(); ++e) {
    if (!growth_[e].quiet) loud_.push_back(e);
  }
  fetch_lists(0);
  fetch_lists(1);
  fetch_last_pages(0);
  for (size_t l = 0; l < layers_.size(); ++l) {
    fetch_lists(l + 2);
    fetch_last_pages(l + 1);
    for (const size_t e : loud_) {
      SequencePages& sequence = *growth_[e].sequence;
      if (sequence.late) settle(sequence, sequence.layers[l]);
      const size_t before = changes_.size() + begun_.size();
      open_layer(l, e);
      if (changes_.size() + begun_.size() > before) revise(sequence);
    }
  }
  for (const size_t e : loud_) growth_[e].sequence->late = false;
  order_changes();
  plan_.changes = changes_;
  return plan_;
}

size_t Ledger::bytes_needed(std::span<const StepItem> items) {
  open(items);
  size_t bytes = 0;
  for (const PageChange& change : changes_) bytes += formats_[static_cast<FormatId>(change.entry().format)].bytes;
  abort();
  return bytes;
}

void Ledger::open_unsharing(SequenceId id) {
  SequencePages& sequence = find(id);
  if (open_) throw Error(Status::kInvalidArgument, "a sequence cannot be copied inside a step; end it first");
  begin_change();
  open_ = true;
  revise(sequence);
  sequence.quiet_until = 0;
  for (LayerPages& layer : sequence.layers) {
    for (auto* lists : {&layer.heads, &layer.low}) {
      for (PageList& list : *lists) {
        for (size_t i = 0; i < list.pages.size(); ++i) {
          const PageEntry& page = list.pages[i];
          if (shared(page.handle)) replace(list, i, static_cast<FormatId>(page.format), true);
        }
      }
    }
  }
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
  freed.reserve(changes_.size());
  for (const PageChange& change : changes_) {
    if (change.before.handle != kNoPage) drop(change.before, freed);
  }
  for (const Cut& cut : cuts_) {
    std::vector<PageEntry>& pages = cut.list->pages;
    while (pages.size() > cut.entries) {
      drop(pages.back(), freed);
      pages.pop_back();
    }
    std::vector<int32_t>& positions = cut.list->positions;
    positions.resize(std::min(positions.size(), static_cast<size_t>(cut.tokens)));
    if (pages.empty()) cut.list->channels = {};
    if (cut.list->mass.empty() || growth_.front().length == growth_.front().sequence->length) continue;
    // What queries that are gone have paid cannot be told apart: a token keeps its mean.
    const SequencePages& sequence = *growth_.front().sequence;
    std::vector<float> mass;
    mass.reserve(mass_room(cut.tokens));
    const std::vector<float>& old = cut.list->mass;
    cut.list->for_each_token([&](const PageEntry&, int, int32_t position) {
      if (mass.size() == std::min(old.size(), static_cast<size_t>(cut.tokens))) return;
      const int64_t from = std::max<int64_t>(position, sequence.counted_from);
      const int64_t before = sequence.length - from, now = std::max<int64_t>(0, growth_.front().length - from);
      mass.push_back(before > 0 ? old[mass.size()] * static_cast<float>(now) / static_cast<float>(before) : 0.0f);
    });
    cut.list->mass = std::move(mass);
  }
  for (const Growth& growth : growth_) {
    SequencePages& sequence = *growth.sequence;
    // Pages that a cut takes from a list's end leave the others where they are.
    if (!cuts_.empty() && !changes_.empty()) revise(sequence);
    sequence.length = growth.length;
    sequence.counted_from = growth.counted_from;
    sequence.prompt_length = growth.prompt_length;
    sequence.prompt_start = growth.prompt_start;
    sequence.in_prompt = growth.in_prompt;
    for (size_t l = 0; l < layers_.size() && cuts_.empty() && !growth.quiet; ++l) {
      if (layers_[l].sliding_window > 0) leave_window(l, sequence, freed);
    }
    if (growth.quiet) {
      sequence.late = true;
    } else if (writes_late_) {
      sequence.quiet_until = quiet_length(sequence);
    }
  }
  for (Compaction& compaction : compactions_) {
    std::unordered_set<PageHandle> stay;
    for (const PageEntry& entry : compaction.next.pages) stay.insert(entry.handle);
    for (const PageEntry& entry : compaction.list->pages) {
      if (!stay.contains(entry.handle)) drop(entry, freed);
    }
    *compaction.list = std::move(compaction.next);
  }
  open_ = false;
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
  for (auto it = undo_.rbegin(); it != undo_.rend(); ++it) {
    PageEntry& entry = it->list->pages[it->index];
    entry.live = it->before.live;
    entry.first = it->before.first;
  }
  for (const Size& old : old_sizes_) old.list->pages.resize(old.entries);
  for (const Growth& growth : growth_) growth.sequence->revision = growth.revision;
  open_ = false;
  return fresh;
}

}  // namespace kvmix
