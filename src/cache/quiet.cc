// Steps that change a sequence's lists by nothing but live slots: how far they go, and what they are written down by.
#include <algorithm>

#include "cache/ledger.h"

namespace kvmix {

// Writes down what late steps have added.
void Ledger::settle(SequencePages& sequence) {
  if (!sequence.late) return;
  sequence.late = false;
  for (LayerPages& layer : sequence.layers) settle(sequence, layer);
}

void Ledger::settle(const SequencePages& sequence, LayerPages& layer) {
  for (PageList& list : layer.heads) {
    PageEntry& last = list.pages.back();
    last.live = static_cast<int32_t>(sequence.length) - last.first;
  }
}

// The length up to which steps neither begin a page nor seal one, copy one that is shared or leave one behind a sliding window;
// the present one if the next does.
int64_t Ledger::quiet_length(const SequencePages& sequence) const {
  int64_t until = next_seal(sequence);
  for (size_t l = 0; l < layers_.size(); ++l) {
    for (const PageList& list : unlike(l, sequence.layers[l])) {
      if (list.pages.empty()) return sequence.length;
      const PageEntry& last = list.pages.back();
      const PageFormat& format = formats_[static_cast<FormatId>(last.format)];
      const Due pages = ids_[l].seals_in(list) ? due(l, list) : Due{0, 0};
      if (!format.appendable() || shared(last.handle) || pages.end > pages.first) return sequence.length;
      if (last.first + last.live != sequence.length) return sequence.length;
      until = std::min<int64_t>(until, last.first + format.slots);
      const size_t oldest = body(l, list);
      if (layers_[l].sliding_window > 0 && oldest < list.pages.size())
        until = std::min<int64_t>(until, list.pages[oldest].first + kPageTokens + layers_[l].sliding_window - 1);
    }
  }
  return until;
}

int64_t Ledger::next_seal(const SequencePages& sequence) const {
  int64_t next = INT64_MAX;
  for (size_t l = 0; l < layers_.size(); ++l) {
    for (const PageList& list : unlike(l, sequence.layers[l])) {
      if (!ids_[l].seals_in(list)) continue;
      // Tokens behind what a step would seal now.
      const size_t oldest = due(l, list).end;
      int64_t tail = 0;
      for (size_t i = oldest; i < list.pages.size(); ++i) tail += list.pages[i].live;
      const int sinks = list.pages.size() > 1 ? 0 : layers_[l].sinks;
      const int64_t to_come = sinks > 0 && !list.pages.empty() ? sinks - list.pages[0].live : sinks;
      int64_t more = 1;
      if (uses_ratio(layers_[l])) {
        while (ratio_surplus_pages(layers_[l], tail + more) == 0) ++more;
      } else {
        const bool whole = oldest + 1 < list.pages.size();  // a page that is not the last gets no more tokens
        const int64_t page = whole ? list.pages[oldest].live : kPageTokens;
        more = std::max<int64_t>(1, page + layers_[l].window.tokens - tail);
      }
      next = std::min(next, sequence.length + to_come + more);
    }
  }
  return next;
}

}  // namespace kvmix
