// What a sequence's lists become when it is cut short.
#include <algorithm>
#include <string>

#include "cache/ledger.h"
#include "kvmix/error.h"

namespace kvmix {
namespace {

// Tokens of a page, `before` of the list in front of it, at positions below n.
int live_below(const PageList& list, const PageEntry& page, int64_t before, int64_t n) {
  int live = page.live;
  while (live > 0 && list.position(page, before, live - 1) >= n) --live;
  return live;
}

}  // namespace

const StepPlan& Ledger::open_truncation(SequenceId id, int64_t n_tokens) {
  SequencePages& sequence = find(id);
  if (open_) throw Error(Status::kInvalidArgument, "a sequence cannot be truncated inside a step; end it first");
  if (n_tokens < 0 || n_tokens > sequence.length) {
    throw Error(Status::kInvalidArgument, "cannot truncate sequence " + std::to_string(id) + " of " +
                                              std::to_string(sequence.length) + " tokens to " + std::to_string(n_tokens));
  }
  for (size_t l = 0; l < layers_.size() && n_tokens > 0; ++l) {
    if (layers_[l].sliding_window == 0) continue;
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
  open_ = true;
  // Of lists that lost tokens, a backend keeps how many (fill_pages), which a cut may change where no page does.
  const auto governed = [](const LayerFormats& layer) { return layer.governed; };
  if (full_pages_ && std::any_of(ids_.begin(), ids_.end(), governed)) revise(sequence);
  growth_.push_back({&sequence, n_tokens, std::min(sequence.prompt_length, n_tokens), std::min(sequence.prompt_start, n_tokens),
                     std::min(sequence.counted_from, n_tokens), sequence.in_prompt, sequence.revision, false});
  for (size_t l = 0; l < layers_.size(); ++l) {
    LayerPages& layer = sequence.layers[l];
    for (size_t h = 0; h < layer.heads.size(); ++h) cut(l, static_cast<int>(h), layer.heads[h], false, n_tokens);
    for (size_t h = 0; h < layer.low.size(); ++h) cut(l, static_cast<int>(h), layer.low[h], true, n_tokens);
  }
  return plan_;
}

void Ledger::cut(size_t layer, int kv_head, PageList& list, bool low, int64_t n_tokens) {
  size_t keep = 0;
  int64_t before = 0;  // of the last page that stays
  int live = 0;
  for (int64_t tokens = 0; keep < list.pages.size(); ++keep) {
    const PageEntry& page = list.pages[keep];
    const int below = live_below(list, page, tokens, n_tokens);
    if (below == 0) break;
    before = tokens;
    live = below;
    tokens += page.live;
    if (below < page.live) {
      ++keep;
      break;
    }
  }
  cuts_.push_back({&list, keep, before + live});
  if (keep == 0) return;
  const PageEntry last = list.pages[keep - 1];
  const PageFormat& format = formats_[static_cast<FormatId>(last.format)];
  const int32_t newest = list.position(last, before, live - 1);
  // A cut page is appended to again, unless its newest token is gone, where pages need not be full.
  if (!low && !format.appendable() && live < format.slots && (newest + 1 == n_tokens || full_pages_)) {
    replace(list, keep - 1, ids_[layer].recent, false);
    plan_.transcodes[layer].push_back({static_cast<int>(layer), kv_head, last, &list, keep - 1});
  }
  if (live == last.live) return;
  undo_.push_back({&list, keep - 1, last});
  list.pages[keep - 1].live = live;
  list.pages[keep - 1].first = newest - live + 1;
}

}  // namespace kvmix
