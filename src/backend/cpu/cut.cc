// How a step's attention is split over threads, and the room that it takes.
#include <algorithm>

#include "backend/cpu/cpu_backend.h"

namespace kvmix {
namespace {

// Up to this many new tokens a sequence's queries are split over page ranges; beyond, over blocks of queries.
constexpr int kDecodeTokens = 8;
constexpr int kQueryBlockTokens = 32;
constexpr int64_t kLeastPagesPerUnit = 4;
constexpr size_t kRoomStep = 64;  // of lists of pages

template <typename T>
void grow(std::vector<T>& v, size_t n) {
  if (v.size() < n) v.resize(n);
}

}  // namespace

void CpuBackend::begin(const StepPlan& plan) {
  plan_ = &plan;
  prompts_.clear();
  for (size_t l = 0; l < layers_.size(); ++l) cut(l);
  next_unit_.reset(layers_.size(), 0);
  int merges = 0;
  for (const LayerCut& cut : cuts_) merges = std::max(merges, cut.merges);
  remaining_.reset(static_cast<size_t>(merges), 0);
}

void CpuBackend::cut(size_t l) {
  const Layer& layer = layers_[l];
  LayerCut& cut = cuts_[l];
  cut.units.clear();
  cut.windows.clear();
  cut.masses.clear();
  cut.mass_rows = 0;
  cut.merges = 0;
  cut.part_rows = 0;
  const int heads = layer.config.kv_heads;
  const auto pages_of = [&](const StepEntry& entry, int head) {
    return HeadPages(entry.pages->layers[l], layer.config.latent() ? 0 : head, layer.ids.sinks);
  };

  int64_t decode_pages = 0;
  for (const StepEntry& entry : plan_->entries) {
    if (entry.n_tokens > kDecodeTokens) continue;
    for (int head = 0; head < heads; ++head) decode_pages += pages_of(entry, head).size();
  }
  const auto thread_count = static_cast<int64_t>(threads_.size());
  const int64_t share = std::max(kLeastPagesPerUnit, (decode_pages + thread_count * 3 - 1) / (thread_count * 3));
  int most_pages = 0, most_rows = 0;
  for (size_t e = 0; e < plan_->entries.size(); ++e) {
    const StepEntry& entry = plan_->entries[e];
    if (entry.prompt && layer.ids.kept_queries() > 0) begin_window(l, e);
    const bool counted = counts_mass(layer, entry);
    if (counted) begin_mass(l, e);
    for (int head = 0; head < heads; ++head) {
      const HeadPages pages = pages_of(entry, head);
      const int count = pages.size();
      most_pages = std::max(most_pages, count);
      if (entry.n_tokens <= kDecodeTokens) {
        const int rows = entry.n_tokens * layer.heads_per_kv;
        most_rows = std::max(most_rows, rows);
        const auto parts = static_cast<int>(thread_count == 1 ? 1 : std::max<int64_t>(1, (count + share - 1) / share));
        for (int part = 0; part < parts; ++part) {
          cut.units.push_back({.entry = static_cast<int>(e),
                               .head = head,
                               .first_token = 0,
                               .tokens = entry.n_tokens,
                               .part = part,
                               .parts = parts,
                               .page_begin = count * part / parts,
                               .page_end = count * (part + 1) / parts,
                               .merge = cut.merges,
                               .part_slot = cut.part_rows,
                               .mass_slot = cut.mass_rows});
        }
        if (counted && !entry.prompt) cut.mass_rows += static_cast<ptrdiff_t>(pages.pieces()) * rows;
        if (parts > 1) cut.part_rows += parts * rows;
        ++cut.merges;
        continue;
      }
      int visible = 0;  // pages that the block's last query can see
      for (int t = 0; t < entry.n_tokens; t += kQueryBlockTokens) {
        const int tokens = std::min(kQueryBlockTokens, entry.n_tokens - t);
        most_rows = std::max(most_rows, tokens * layer.heads_per_kv);
        while (visible < count && pages[static_cast<size_t>(visible)].first < entry.start + t + tokens) ++visible;
        cut.units.push_back({.entry = static_cast<int>(e),
                             .head = head,
                             .first_token = t,
                             .tokens = tokens,
                             .part = 0,
                             .parts = 1,
                             .page_begin = 0,
                             .page_end = visible,
                             .merge = cut.merges,
                             .part_slot = 0});
        ++cut.merges;
      }
    }
  }

  // Everything that append and attend write to is there before they run.
  const auto rows = static_cast<size_t>(most_rows), dim = static_cast<size_t>(layer.config.head_dim),
             width = static_cast<size_t>(layer.sum_width()),
             stored =
                 static_cast<size_t>(std::max(layer.config.stored_width(Side::kKey), layer.config.stored_width(Side::kValue)));
  grow(parts_.m, static_cast<size_t>(cut.part_rows));
  grow(parts_.l, static_cast<size_t>(cut.part_rows));
  grow(parts_.acc, static_cast<size_t>(cut.part_rows) * width);
  grow(references_, static_cast<size_t>(cut.mass_rows));
  grow(weights_, static_cast<size_t>(cut.mass_rows) * kPageTokens);
  size_t kernel_bytes = 0;
  for (const AttentionKernel* kernel : kernels_) {
    kernel_bytes = std::max(kernel_bytes, kernel->scratch_bytes(layer.config.head_dim, most_rows));
  }
  if (layer.config.latent()) kernel_bytes = latent_scratch_floats(layer, most_rows) * sizeof(float);
  for (Scratch& t : threads_) {
    grow(t.kernel, kernel_bytes + 64);
    grow(t.q, rows * dim);
    if (layer.ids.thins) grow(t.thin_q, rows * dim);
    for (PartialRoom* room : {&t.whole, &t.apart}) {
      if (room == &t.apart && layer.tiles.size() == 1) continue;
      grow(room->m, rows);
      grow(room->l, rows);
      grow(room->acc, std::max(rows, size_t{1}) * width);
    }
    if (layer.tiles.size() > 1 && !plan_->transcodes[l].empty()) grow(t.half, kPageTokens * stored);
    if (layer.ids.thins && !plan_->transcodes[l].empty()) grow(t.thin_half, kPageTokens * dim);
    grow(t.positions, rows);
    const auto most = static_cast<size_t>(most_pages + (layer.config.sinks + kPageTokens - 1) / kPageTokens);
    if (t.pages.capacity() < most) t.pages.reserve(most + kRoomStep);
  }
}

}  // namespace kvmix
