// Which pages every sequence has, and what a step changes about them: bookkeeping without memory, threads or a device.
//
// A change (a step, a truncation) is opened, which rewrites the page lists and says what it takes: pages to allocate, pages to
// copy, rows to encode anew. The caller finds memory for the new pages and hands their handles in; then commit() makes the
// change final and says which pages nobody has any more, or abort() undoes it.
#pragma once

#include <deque>
#include <map>
#include <memory_resource>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "backend/backend.h"
#include "backend/page.h"
#include "backend/step_plan.h"
#include "cache/layout.h"
#include "kvmix/cache.h"

namespace kvmix {

// A page that nobody refers to any more.
struct FreedPage {
  PageHandle page;
  FormatId format;
};

class Ledger {
 public:
  // `layers` and `formats` outlive the ledger.
  Ledger(const std::vector<LayerConfig>& layers, const std::vector<LayerFormats>& ids, const FormatTable& formats)
      : layers_(layers), ids_(ids), formats_(formats) {}

  // For a backend that does not read PageEntry::live in a step: steps that change nothing else are written into the lists when
  // `find` is next asked for the sequence, so that they cost no visit to every list. Not for layers with a low tier or mass.
  void write_late() { writes_late_ = true; }
  // For a backend that wants it: what a compaction leaves has no page before the last that is not full.
  void fill_pages() { full_pages_ = true; }

  SequenceId create();
  // Both refuse with kNotFound an unknown sequence.
  SequencePages& find(SequenceId id);
  const SequencePages& find(SequenceId id) const { return const_cast<Ledger*>(this)->find(id); }
  int64_t length(SequenceId id) const { return const_cast<Ledger*>(this)->look_up(id).length; }
  // Of lists that are written late, `live` of the last page is not up to date.
  using Sequences = std::pmr::map<SequenceId, SequencePages>;
  const Sequences& sequences() const { return sequences_; }

  // A sequence that shares all pages.
  SequenceId fork(SequenceId id);
  std::vector<FreedPage> remove(SequenceId id);
  bool shared(PageHandle page) const { return extra_references_.contains(page); }

  // Opens a step. Throws kInvalidArgument and kNotFound for items that cannot be, before anything changed.
  const StepPlan& open(std::span<const StepItem> items);
  // Whether such an item brings tokens of a prompt, and the last of it.
  struct PromptPart {
    bool prompt, ends;
  };
  static PromptPart prompt_part(const StepItem& item, const SequencePages& sequence);
  // Bytes of the pages that such a step allocates.
  size_t bytes_needed(std::span<const StepItem> items);
  // Opens a truncation: cuts the sequence to its first n_tokens. A cut through a sealed page makes it a recent one again.
  // Throws kUnsupported where a sliding window has freed what would be needed.
  const StepPlan& open_truncation(SequenceId id, int64_t n_tokens);
  // Gives a sequence pages of its own in place of those that it shares.
  void open_unsharing(SequenceId id);
  // What a KV head's tokens become: ascending indices into its list and into that of its low tier.
  struct Regroup {
    std::vector<int32_t> drop, drop_low;
    std::vector<int32_t> demote;  // to the low tier
    bool empty() const { return drop.empty() && drop_low.empty() && demote.empty(); }
  };
  // A list of a layer and what it becomes; `gathers` make the pages of `next` that are new.
  struct Compaction {
    PageList* list;
    PageList next;
    std::vector<Gather> gathers;
  };
  using Compactions = std::deque<Compaction>;  // whose elements stay where they are
  // A compaction of a layer, outside steps, a Regroup per KV head. Sealed pages that neither lose nor gain a token stay,
  // as long as no more than a page's slots, or with fill_pages none, are left empty in front of those that stay. What is left
  // of the others moves together, in order: the first tokens into the sinks' page, the newest into recent pages, and what is
  // behind the window into sealed ones, as if the tokens that are left had come one after the other. (src/cache/compaction.cc)
  // Of several layers by several threads at once, as long as the sequence stays as it is.
  Compactions compacted(SequencePages& sequence, size_t layer, std::span<const Regroup> heads) const;
  std::span<const Gather> open_compaction(SequenceId id, Compactions compactions);
  // The length of Cache::next_seal.
  int64_t next_seal(const SequencePages& sequence) const;

  bool is_open() const { return open_; }
  const StepPlan& plan() const { return plan_; }
  // New pages of the open change, in the order in which they are best allocated; their entries take the handles.
  const std::vector<PageChange>& changes() const { return changes_; }
  std::vector<FreedPage> commit();
  // Undoes the open change. The new pages that have a handle are returned, newest first.
  std::vector<FreedPage> abort();

 private:
  struct Undo {  // an entry that was rewritten in place
    PageList* list;
    size_t index;
    PageEntry before;
  };
  struct Size {
    PageList* list;
    size_t entries;
  };
  struct Cut {
    PageList* list;
    size_t entries;
    int64_t tokens;
  };
  struct Growth {  // what a sequence is after the change
    SequencePages* sequence;
    int64_t length, prompt_length, prompt_start, counted_from;
    bool in_prompt;
    uint64_t revision;  // before it
    bool quiet;         // the lists are written late
  };
  struct Kept {  // a token that a compaction moves
    PageEntry page;
    int slot;
    int32_t position;
    float mass;
  };

  void open_layer(size_t layer, size_t entry);
  void open_list(const PageChange::Owner& owner, PageList& list, const StepEntry& entry);
  // The same of a list that is like one that was opened, of so many pages before, the last of which was copied or goes on.
  struct Opened {
    const PageList* list;
    size_t pages;
    bool copies, grows;
  };
  void open_like(const Opened& first, const PageChange::Owner& owner, PageList& list);
  void order_changes();
  void cut(size_t layer, int kv_head, PageList& list, bool low, int64_t n_tokens);
  // `added` come from another list.
  struct Compacting {
    size_t layer;
    int kv_head;
    bool low;
    const PageList& list;
    std::span<const int32_t> drop;
    std::span<const Kept> added;
  };
  void compact(Compacting job, Compaction& to) const;
  void move_together(const Compacting& job, std::span<const Kept> tokens, bool newest, Compaction& to) const;
  int64_t left_empty(const Compacting& job, size_t tokens, const PageList& next, const PageEntry& page) const;
  void replace(PageList& list, size_t index, FormatId format, bool copies, const PageChange::Owner& owner = {});
  void begin_page(PageList& list, PageEntry page, const PageChange::Owner& owner);
  void set_live(PageList& list, size_t index, int64_t end);
  // Recent pages of a list that are due to be sealed: [first, end).
  struct Due {
    size_t first, end;
  };
  Due due(size_t layer, const PageList& list) const;
  void seal(const PageChange::Owner& owner, PageList& list, const Due& pages);
  // Lists that may differ in more than which pages they hold: where none is governed a layer's heads are alike.
  bool heads_alike(size_t layer) const { return writes_late_ && !ids_[layer].governed; }
  std::span<const PageList> unlike(size_t l, const LayerPages& layer) const {
    return std::span(layer.heads).first(heads_alike(l) ? 1 : layer.heads.size());
  }
  void drop(const PageEntry& entry, std::vector<FreedPage>& freed);
  void leave_window(size_t layer, SequencePages& sequence, std::vector<FreedPage>& freed);
  // Index of the first page behind the sinks.
  size_t body(size_t layer, const PageList& list) const;
  void begin_change();
  SequenceId add(SequencePages sequence);
  void fetch_lists(size_t layer) const;
  void fetch_last_pages(size_t layer) const;
  SequencePages& look_up(SequenceId id);
  void settle(SequencePages& sequence);
  static void settle(const SequencePages& sequence, LayerPages& layer);
  int64_t quiet_length(const SequencePages& sequence) const;
  void revise(SequencePages& sequence) { sequence.revision = next_revision_++; }

  const std::vector<LayerConfig>& layers_;
  const std::vector<LayerFormats>& ids_;
  const FormatTable& formats_;
  std::pmr::unsynchronized_pool_resource beside_;  // a step visits them all, so that they lie next to each other
  Sequences sequences_{&beside_};
  std::vector<std::pair<SequenceId, SequencePages*>> index_;  // the same by id: a step asks for hundreds
  SequenceId next_id_ = 0;
  uint64_t next_revision_ = 1;
  std::unordered_map<PageHandle, int> extra_references_;  // only pages with more than one

  bool writes_late_ = false, full_pages_ = false;
  bool open_ = false;
  StepPlan plan_;
  std::vector<PageChange> changes_;
  std::vector<PageChange> begun_;  // those of new pages, which order_changes adds
  struct Age {  // of these: how many, then where the next one goes; and which it is among those that there are
    int32_t age;
    size_t count, place;
  };
  std::vector<Age> ages_;
  std::vector<uint32_t> age_of_;  // by each of them
  std::vector<Undo> undo_;
  std::vector<Size> old_sizes_;  // of lists that may have grown
  std::vector<Cut> cuts_;        // of lists that a truncation shortens on commit
  std::vector<Growth> growth_;
  std::vector<SequencePages*> found_;  // of the step's items
  std::vector<size_t> loud_;           // entries of the step whose lists are written now
  Compactions compactions_;
  std::vector<Gather> gathers_;
};

}  // namespace kvmix
