// Where a prompt has ended: the token policy is asked, layer by layer, and what it drops leaves the pages.
#include <algorithm>
#include <cmath>

#include "base/parallel.h"
#include "cache/state.h"

namespace kvmix {
namespace {

// One KV head as the policy sees it.
struct HeadTokens {
  std::vector<int64_t> positions;
  std::vector<Tier> tiers;

  explicit HeadTokens(const PageList& list) {
    positions.reserve(static_cast<size_t>(list.tokens()));
    list.for_each_token([&](const PageEntry&, int, int32_t position) { positions.push_back(position); });
    tiers.assign(positions.size(), Tier::kHigh);
  }
};

}  // namespace

// Upper bounds: what a layer's heads may hold together, each with a part of a page of its own.
std::vector<FormatId> Cache::Impl::pages_to_reserve(const SequencePages& sequence, int64_t end) const {
  std::vector<FormatId> pages;
  for (size_t l = 0; l < config.layers.size(); ++l) {
    if (!governed.governs(l)) continue;
    const LayerConfig& layer = config.layers[l];
    const LayerFormats& f = ids[l];
    int64_t sealed_before = 0;
    for (const PageList& list : sequence.layers[l].heads) {
      for (const PageEntry& page : list.pages) sealed_before += format(page).role == PageRole::kSealed ? 1 : 0;
    }
    const int64_t heads = layer.kv_heads;
    const int64_t packed = governed.kept(l, end) * heads / kPageTokens + heads + sealed_before;
    const double ratio = static_cast<double>(std::max(layer.window.ratio_key, layer.window.ratio_value));
    const double tail = uses_ratio(layer) ? kPageTokens / (1 - ratio) : layer.window.tokens + kPageTokens;
    const auto recent = static_cast<int64_t>(std::ceil(tail / kPageTokens)) + 1;
    const auto add = [&](FormatId id, int64_t n) { pages.insert(pages.end(), static_cast<size_t>(n), id); };
    if (layer.sinks > 0) add(f.sinks, heads);
    if (f.seals) add(f.sealed, packed);
    add(f.recent, f.seals ? std::min(packed, heads * recent) : packed);
  }
  return pages;
}

void Cache::Impl::fill_reserve(std::span<const StepItem> items) {
  if (governed.policy == nullptr || config.max_bytes == 0) return;
  const StepPlan& plan = ledger.plan();
  for (size_t i = 0; i < items.size(); ++i) {
    const StepEntry& entry = plan.entries[i];
    if (!entry.ends_prompt) continue;
    for (const FormatId id : pages_to_reserve(*entry.pages, entry.end())) {
      reserve.push_back({backend->allocate(formats[id]), id});
    }
  }
}

void Cache::Impl::release_reserve() {
  release(reserve);
  reserve.clear();
}

void Cache::Impl::decide(SequenceId id) {
  const SequencePages& sequence = ledger.find(id);
  for (size_t l = 0; l < config.layers.size(); ++l) {
    if (!governed.governs(l)) continue;
    const std::vector<PageList>& lists = sequence.layers[l].heads;
    const std::vector<HeadTokens> tokens(lists.begin(), lists.end());
    std::vector<HeadView> heads;
    PolicyView view;
    for (size_t h = 0; h < lists.size(); ++h) {
      HeadView& head = heads.emplace_back();
      head.positions = tokens[h].positions;
      head.tiers = tokens[h].tiers;
      if (ids[l].window_queries == 0) continue;
      const Backend::Window window = backend->window(id, static_cast<int>(l), static_cast<int>(h));
      head.window = window.sums;
      view.window_rows = window.queries;
    }
    view.shape = governed.shapes[l];
    view.length = view.prompt_length = sequence.length;
    view.heads = heads;
    governed.policy->decide(view, policy_scratch, decision);
    if (!decision.empty()) compact(id, l);
  }
}

void Cache::Impl::compact(SequenceId id, size_t layer) {
  std::vector<std::vector<int32_t>> drops;
  for (HeadDecision& head : decision.heads) drops.push_back(head.drop);
  const std::span<const Gather> gathers = ledger.open_compaction(id, layer, drops);
  allocate_changes();
  const int threads = std::min(config.threads, static_cast<int>(gathers.size()));
  parallel_for(threads, static_cast<size_t>(threads), [&](size_t t) {
    for (size_t i = t; i < gathers.size(); i += static_cast<size_t>(threads)) {
      backend->gather(gathers[i], static_cast<int>(t));
    }
  });
  for (const Gather& gather : gathers) sealed_pages += format(gather.to()).role == PageRole::kSealed ? 1 : 0;
  release(ledger.commit());
}

}  // namespace kvmix
