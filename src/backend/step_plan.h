// What a step does to pages, as the ledger writes it down and a backend carries it out.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "backend/page.h"
#include "base/fetch_ahead.h"
#include "kvmix/cache.h"

namespace kvmix {

// One sequence of a step. `pages` already count the step's tokens.
struct StepEntry {
  SequenceId id;
  const SequencePages* pages;
  int64_t start;  // length before the step
  int n_tokens;
  int64_t row;  // first row in q, k, v, out
  // Whether the tokens belong to a prompt, where that began, and whether it ends here.
  bool prompt, ends_prompt;
  int64_t prompt_start;
  uint64_t revision = 0;  // of the pages before the step

  int64_t end() const { return start + n_tokens; }
};

// A page whose rows are encoded anew in another format: sealed, or opened again.
struct Transcode {
  int layer, kv_head;
  PageEntry from;
  const PageList* list;  // where the new page stands
  size_t index;

  const PageEntry& to() const { return list->pages[index]; }
};

// A page made of tokens of other pages of its head.
struct Gather {
  struct Source {
    PageEntry page;
    int slot;
  };
  int layer, kv_head;
  const PageList* list;  // where the new page stands
  size_t index;
  std::vector<Source> sources;  // by slot

  const PageEntry& to() const { return list->pages[index]; }
};

// A place in a page list that a change gives a new page. `before` is what stood there; its page, if any, goes on commit. Where
// none did, it says what the new page's first position is.
struct PageChange {
  // Whose the list is: an entry of the step, or -1 of other changes.
  struct Owner {
    int32_t entry = -1, layer = 0, kv_head = 0;
  };
  PageList* list;
  size_t index;
  PageEntry before;
  bool copies;  // the new page starts as a copy of that one
  Owner owner;

  PageEntry& entry() const { return list->pages[index]; }
};

// What stands where changes or transcodes say lies all over memory: to be called on the way to each, it asks for what comes
// soon.
template <class Job>
void fetch_ahead(std::span<const Job> jobs, size_t at) {
  constexpr size_t kLists = 32, kEntries = 16;
  if (at + kLists < jobs.size()) fetch_ahead(jobs[at + kLists].list);
  if (at + kEntries < jobs.size()) fetch_ahead(jobs[at + kEntries].list->pages.data() + jobs[at + kEntries].index);
}

struct StepPlan {
  std::vector<StepEntry> entries;
  std::span<const PageChange> changes;
  std::vector<std::vector<Transcode>> transcodes;  // by layer; done before the step's rows are appended ...
  bool seals_after_append = false;                 // ... or, on a device, between them and what is attended to

  bool decoding() const {
    for (const StepEntry& entry : entries) {
      if (entry.n_tokens >= kPageTokens) return false;
    }
    return true;
  }
};

}  // namespace kvmix
