// When a token policy is asked, what it is shown, and what becomes of the pages of tokens that it drops or moves.
#include <algorithm>
#include <cmath>
#include <string>

#include "attention/scores.h"
#include "base/first_failure.h"
#include "base/parallel.h"
#include "cache/state.h"
#include "kvmix/error.h"

namespace kvmix {
namespace {

// Decoded tokens of a step whose attention is counted token by token.
constexpr int kMostDecoded = 8;

// One KV head as the policy sees it: both tiers by position. `stored[i]` is a token's place, first those of the low tier.
struct HeadTokens {
  std::vector<int64_t> positions;
  std::vector<Tier> tiers;
  std::vector<int32_t> stored;
  std::vector<float> mass, window;
  std::vector<int32_t> queries;
  int64_t low = 0;  // tokens of the low tier

  HeadTokens(const PageList& list, const PageList* low_list) {
    if (low_list != nullptr) low = low_list->tokens();
    const auto n = static_cast<size_t>(list.tokens() + low);
    positions.reserve(n);
    tiers.reserve(n);
    stored.reserve(n);
    int64_t next = 0;
    const auto add = [&](int64_t position, Tier tier, int64_t place) {
      positions.push_back(position);
      tiers.push_back(tier);
      stored.push_back(static_cast<int32_t>(place));
    };
    const auto add_low = [&](int64_t end) {
      for (; next < low && low_list->positions[static_cast<size_t>(next)] < end; ++next) {
        add(low_list->positions[static_cast<size_t>(next)], Tier::kLow, next);
      }
    };
    int64_t place = low;
    list.for_each_token([&](const PageEntry&, int, int32_t position) {
      add_low(position);
      add(position, Tier::kHigh, place++);
    });
    add_low(INT64_MAX);
  }

  // A span by place, `rows` of them, as the policy sees it.
  std::vector<float> by_position(std::span<const float> values, size_t rows) const {
    std::vector<float> out;
    out.reserve(values.size());
    const size_t n = stored.size();
    for (size_t r = 0; r < rows; ++r) {
      for (const int32_t place : stored) out.push_back(values[r * n + static_cast<size_t>(place)]);
    }
    return out;
  }
};

// The mass of a prompt is that of its window's queries: the mean or the largest of the query heads' sums.
std::vector<float> mass_of_window(std::span<const float> window, size_t tokens, bool largest) {
  std::vector<float> mass(tokens);
  if (largest) {
    max_of_window(window, mass);
  } else {
    mean_of_window(window, mass);
  }
  return mass;
}

void add_unpaid(PageList& list) {
  const auto tokens = static_cast<size_t>(list.tokens());
  if (list.mass.capacity() != mass_room(list.tokens())) {
    std::vector<float> next;
    next.reserve(mass_room(list.tokens()));
    next.assign(list.mass.begin(), list.mass.end());
    list.mass = std::move(next);
  }
  list.mass.resize(tokens);
}

void set_mass(PageList& list, std::span<const float> mass) {
  std::vector<float> next;
  next.reserve(mass_room(static_cast<int64_t>(mass.size())));
  next.assign(mass.begin(), mass.end());
  list.mass = std::move(next);
}

}  // namespace

void Cache::Impl::check_decoded(std::span<const StepItem> items) const {
  if (!governed.counts()) return;
  for (const StepItem& item : items) {
    if (!item.decoded || item.n_tokens <= kMostDecoded) continue;
    throw Error(Status::kInvalidArgument, "a step of " + std::to_string(item.n_tokens) + " decoded tokens: token policy " +
                                              config.tokens->name + " counts what each pays to others; feed at most " +
                                              std::to_string(kMostDecoded) + " in a step");
  }
}

std::optional<Moment> Cache::Impl::moment(const SequencePages& sequence, Ledger::PromptPart part, int n_tokens) const {
  if (governed.policy == nullptr && governed.channels == nullptr) return std::nullopt;
  if (part.prompt) return part.ends ? std::optional(Moment::kPromptEnd) : std::nullopt;
  const int64_t prompt = sequence.prompt_length, start = sequence.length;
  const bool due = Governed::decisions(prompt, start + n_tokens) > Governed::decisions(prompt, start);
  return governed.decodes() && due ? std::optional(Moment::kBeforeToken) : std::nullopt;
}

// Upper bounds: what a layer's heads may hold together, each with a part of a page of its own. While decoding layers follow
// one another, each with the pages that the one before gave back; a head may take one sealed page more than it had.
std::vector<FormatId> Cache::Impl::pages_to_reserve(const SequencePages& sequence, Moment when, int64_t end) const {
  std::vector<FormatId> pages;
  std::vector<size_t> most(formats.size(), 0), more(formats.size(), 0);
  for (size_t l = 0; l < config.layers.size(); ++l) {
    if (!governed.governs(l)) continue;
    const LayerConfig& layer = config.layers[l];
    const LayerFormats& f = ids[l];
    const auto heads = static_cast<size_t>(layer.kv_heads);
    if (when == Moment::kBeforeToken) {
      std::vector<size_t> here(formats.size(), 0);
      sequence.layers[l].for_each_list([&](const PageList& list) {
        for (const PageEntry& page : list.pages) ++here[page.format];
      });
      for (size_t i = 0; i < here.size(); ++i) most[i] = std::max(most[i], here[i]);
      for (const PageList& list : sequence.layers[l].heads) {
        if (f.seals_in(list)) ++more[f.sealed_in(list)];
      }
      if (f.low_tier) more[f.low] += 2 * heads;
      continue;
    }
    int64_t sealed_before = 0;
    sequence.layers[l].for_each_list([&](const PageList& list) {
      for (const PageEntry& page : list.pages) sealed_before += format(page).role == PageRole::kSealed ? 1 : 0;
    });
    const auto n = static_cast<int64_t>(heads);
    const int64_t packed = governed.kept(l, end) * n / kPageTokens + n + sealed_before;
    const double ratio = static_cast<double>(std::max(layer.window.ratio_key, layer.window.ratio_value));
    const double tail = uses_ratio(layer) ? kPageTokens / (1 - ratio) : layer.window.tokens + kPageTokens;
    const auto recent = static_cast<int64_t>(std::ceil(tail / kPageTokens)) + 1;
    const auto add = [&](FormatId id, int64_t count) { pages.insert(pages.end(), static_cast<size_t>(count), id); };
    if (layer.sinks > 0) add(f.sinks, n);
    const bool thin = governed.chooses(l, end) || !sequence.layers[l].heads[0].channels.empty(), seals = f.seals || thin;
    if (seals) add(thin ? f.thin : f.sealed, packed);
    if (f.low_tier) add(f.low, packed);
    add(f.recent, seals ? std::min(packed, n * recent) : packed);
  }
  for (size_t i = 0; i < most.size(); ++i) pages.insert(pages.end(), most[i] + more[i], static_cast<FormatId>(i));
  return pages;
}

void Cache::Impl::fill_reserve(std::span<const StepItem> items) {
  if (governed.policy == nullptr || config.max_bytes == 0) return;
  const StepPlan& plan = ledger.plan();
  for (size_t i = 0; i < items.size(); ++i) {
    const StepEntry& entry = plan.entries[i];
    const auto when = moment(*entry.pages, {entry.prompt, entry.ends_prompt}, entry.n_tokens);
    if (!when) continue;
    for (const FormatId id : pages_to_reserve(*entry.pages, *when, entry.end())) {
      reserve.push_back({backend->allocate(formats[id]), id});
    }
  }
}

void Cache::Impl::release_reserve() {
  release(reserve);
  reserve.clear();
}

// The open step's queries are counted from here on.
void Cache::Impl::take_mass(const StepEntry& entry) {
  SequencePages& sequence = ledger.find(entry.id);
  for (size_t l = 0; l < config.layers.size(); ++l) {
    if (!ids[l].mass) continue;
    LayerPages& layer = sequence.layers[l];
    for (size_t h = 0; h < layer.heads.size(); ++h) {
      const Backend::Mass fresh = backend->mass(entry.id, static_cast<int>(l), static_cast<int>(h));
      if (fresh.tokens == nullptr && !entry.prompt) {
        // Its queries are not counted: its tokens are there all the same.
        add_unpaid(layer.heads[h]);
        continue;
      }
      if (fresh.tokens != nullptr) std::swap(layer.heads[h].mass, *fresh.tokens);
      if (fresh.low != nullptr && !layer.low.empty()) std::swap(layer.low[h].mass, *fresh.low);
    }
  }
}

// What the policy decides for a layer, by KV head; nothing where all stays as it is.
std::vector<Ledger::Regroup> Cache::Impl::decide_layer(SequenceId id, SequencePages& sequence, size_t l, Moment when,
                                                       PolicyScratch& scratch) {
  const bool prompt_end = when == Moment::kPromptEnd;
  const LayerFormats& f = ids[l];
  LayerPages& layer = sequence.layers[l];
  std::vector<HeadTokens> tokens;
  std::vector<HeadView> heads;
  PolicyView view;
  for (size_t h = 0; h < layer.heads.size(); ++h) {
    HeadTokens& head = tokens.emplace_back(layer.heads[h], f.low_tier ? &layer.low[h] : nullptr);
    const size_t n = head.stored.size();
    if (prompt_end && f.window_queries > 0) {
      const Backend::Window window = backend->window(id, static_cast<int>(l), static_cast<int>(h));
      view.window_rows = window.queries;
      if (f.mass && !f.mass_of_prompts) {
        const std::vector<float> mass = mass_of_window(window.sums, n, f.mass_of_largest);
        set_mass(layer.heads[h], std::span(mass).subspan(static_cast<size_t>(head.low)));
        if (f.low_tier) set_mass(layer.low[h], std::span(mass).first(static_cast<size_t>(head.low)));
      }
      head.window = head.by_position(window.sums, window.sums.size() / std::max<size_t>(n, 1));
    }
    if (!f.mass) continue;
    std::vector<float> mass;
    if (f.low_tier) mass = layer.low[h].mass;
    mass.insert(mass.end(), layer.heads[h].mass.begin(), layer.heads[h].mass.end());
    head.mass = head.by_position(mass, 1);
    for (const int64_t position : head.positions) {
      head.queries.push_back(static_cast<int32_t>(sequence.length - std::max(position, sequence.counted_from)));
    }
  }
  heads.reserve(tokens.size());
  for (const HeadTokens& head : tokens) {
    heads.push_back(
        {.positions = head.positions, .tiers = head.tiers, .mass = head.mass, .queries = head.queries, .window = head.window});
  }
  view.shape = governed.shapes[l];
  view.moment = when;
  view.length = sequence.length;
  view.prompt_length = sequence.prompt_length;
  view.incoming = prompt_end ? 0 : 1;
  view.since = kPageTokens;
  view.heads = heads;
  Decision decision;
  governed.policy->decide(view, scratch, decision);
  std::vector<Ledger::Regroup> groups(tokens.size());
  for (size_t h = 0; h < tokens.size(); ++h) {
    const HeadTokens& head = tokens[h];
    const auto place = [&](int32_t token) { return head.stored[static_cast<size_t>(token)]; };
    const auto low = static_cast<int32_t>(head.low);
    for (const int32_t token : decision.heads[h].drop) {
      (place(token) < low ? groups[h].drop_low : groups[h].drop)
          .push_back(place(token) < low ? place(token) : place(token) - low);
    }
    for (const Move& move : decision.heads[h].move) {
      if (move.to != Tier::kLow || place(move.token) < low) {
        throw Error(Status::kInternal, "token policy " + config.tokens->name + " moves a token up");
      }
      groups[h].demote.push_back(place(move.token) - low);
    }
  }
  return groups;
}

// Layers are decided on side by side: a prompt has millions of tokens of heads.
void Cache::Impl::decide(SequenceId id, Moment when) {
  SequencePages& sequence = ledger.find(id);
  const bool prompt_end = when == Moment::kPromptEnd;
  std::vector<size_t> layers;
  for (size_t l = 0; l < config.layers.size(); ++l) {
    if (governed.governs(l)) layers.push_back(l);
  }
  std::vector<std::vector<Ledger::Regroup>> groups(config.layers.size());
  std::vector<Ledger::Compactions> compactions(config.layers.size());
  const size_t threads = std::min(layers.size(), static_cast<size_t>(on_cuda(config) ? default_threads() : config.threads));
  policy_scratch.resize(std::max(policy_scratch.size(), threads));
  const auto each_layer = [&](const auto& work) {
    FirstFailure failure;
    parallel_for(static_cast<int>(threads), threads, [&](size_t t) {
      for (size_t i = t; i < layers.size(); i += threads) failure.guard([&] { work(layers[i], policy_scratch[t]); });
    });
    failure.rethrow();
  };
  if (prompt_end && governed.counts() && governed.policy->needs().mass_from_window)
    sequence.counted_from = sequence.length - backend->window(id, static_cast<int>(layers.front()), 0).queries;
  each_layer([&](size_t l, PolicyScratch& scratch) { groups[l] = decide_layer(id, sequence, l, when, scratch); });
  for (size_t l = 0; l < config.layers.size(); ++l) {
    if (prompt_end && governed.chooses(l, sequence.length)) choose_channels(id, l, groups[l]);
  }
  each_layer([&](size_t l, PolicyScratch&) { compactions[l] = ledger.compacted(sequence, l, groups[l]); });
  for (Ledger::Compactions& of_layer : compactions) {
    if (!of_layer.empty()) compact(id, std::move(of_layer));
  }
}

void Cache::Impl::compact(SequenceId id, Ledger::Compactions compactions) {
  const std::span<const Gather> gathers = ledger.open_compaction(id, std::move(compactions));
  allocate_changes();
  backend->gather(gathers);
  for (const Gather& gather : gathers) sealed_pages += format(gather.to()).role == PageRole::kSealed ? 1 : 0;
  std::vector<FreedPage> freed = ledger.commit();
  // Under a limit the next layer's pages are these.
  if (config.max_bytes > 0) {
    reserve.insert(reserve.end(), freed.begin(), freed.end());
  } else {
    release(freed);
  }
}

}  // namespace kvmix
