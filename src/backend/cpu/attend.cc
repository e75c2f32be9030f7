// Attention of a step, unit by unit as threads come free.
#include <algorithm>
#include <chrono>
#include <cmath>

#include "backend/cpu/cpu_backend.h"

namespace kvmix {
namespace {

using Clock = std::chrono::steady_clock;

// Queries as they meet keys of chosen channels. Without any there are no pages of such, and the launch is of none.
void pick_channels(std::span<const uint8_t> channels, int dim, int rows, const float* q, float* to) {
  for (int r = 0; r < rows; ++r, q += dim) {
    for (const uint8_t channel : channels) *to++ = q[channel];
  }
}

}  // namespace

// Leaves the partial softmax of a unit's queries over its pages.
void CpuBackend::attend_unit(const Layer& layer, const Unit& unit, const float* q, int64_t q_stride, const Partial& partial,
                             Scratch& scratch) {
  const LayerConfig& config = layer.config;
  if (config.latent()) {
    attend_latents(layer, unit, q, q_stride, partial, scratch);
    return;
  }
  const StepEntry& entry = plan_->entries[static_cast<size_t>(unit.entry)];
  const auto l = static_cast<size_t>(&layer - layers_.data());
  const HeadPages pages(entry.pages->layers[l], unit.head, layer.ids.sinks);
  const int dim = config.head_dim, rows = unit.tokens * layer.heads_per_kv;
  for (int r = 0; r < rows; ++r) {
    const int token = unit.first_token + r / layer.heads_per_kv;
    const int q_head = unit.head * layer.heads_per_kv + r % layer.heads_per_kv;
    float* to = scratch.q.data() + static_cast<ptrdiff_t>(r) * dim;
    std::copy_n(q + (entry.row + token) * q_stride + q_head * dim, dim, to);
    layer.key_maps.query(unit.head, to);
    scratch.positions[static_cast<size_t>(r)] = entry.start + token;
  }
  AttendJob job = layer_job(config);
  job.rows = rows;
  job.position = scratch.positions.data();
  const int64_t oldest = config.sliding_window > 0 ? entry.start + unit.first_token - config.sliding_window + 1 : 0;

  const int begin = unit.part == 0 && pages.body > 0 ? -1 : unit.page_begin;  // -1: the sinks
  const bool counted = counts_mass(layer, entry) && !entry.prompt;
  bool any = false;
  for (const FormatId tiles : layer.tiles) {
    // Tiles of a format have a launch of their own; fp16 rows go with the first.
    scratch.pages.clear();
    for (int i = begin; i < unit.page_end; ++i) {
      const PageEntry& page = i < 0 ? pages.list.pages[0] : pages[static_cast<size_t>(i)];
      const PageFormat& f = format(page);
      if (f.rows ? tiles != layer.ids.sealed : page.format != tiles) continue;
      if (page.first + f.slots <= oldest) continue;
      // Kernels take kPageTokens at once; a page of rows may be longer.
      const std::byte *key = memory(page.handle), *value = key + f.value_offset;
      for (int slot = 0; slot < page.live; slot += kPageTokens) {
        const auto offset = [slot](const TileFormat& side) {
          return static_cast<size_t>(slot * side.width) * sizeof(uint16_t);
        };
        PageRef& ref = scratch.pages.emplace_back(PageRef{key + offset(f.key), value + offset(f.value), page.first + slot,
                                                          std::min(page.live - slot, kPageTokens), !f.rows});
        if (!counted) continue;
        const ptrdiff_t row =
            unit.mass_slot + static_cast<ptrdiff_t>(i < 0 ? slot / kPageTokens : pages.sink_pieces() + i) * rows;
        ref.weights = weights_.data() + row * kPageTokens;
        ref.reference = references_.data() + row;
        std::fill_n(ref.reference, rows, -INFINITY);
      }
    }
    // The last format's launch also stands for none: it leaves what attention over nothing is.
    if (scratch.pages.empty() && (any || tiles != layer.tiles.back())) continue;
    const Partial to = any ? scratch.apart.at_front() : partial;
    const bool thin = layer.ids.thins && tiles == layer.ids.thin;
    if (thin) pick_channels(pages.list.channels, dim, rows, scratch.q.data(), scratch.thin_q.data());
    job.q = thin ? scratch.thin_q.data() : scratch.q.data();
    job.key = formats_[tiles].key;
    job.value = formats_[tiles].value;
    job.pages = scratch.pages;
    job.m = to.m;
    job.l = to.l;
    job.acc = to.acc;
    pick_kernel(job).attend(job, aligned(scratch.kernel.data()));
    if (any) {
      for (int r = 0; r < rows; ++r) {
        if (to.m[r] == -INFINITY) continue;
        const float top = std::max(partial.m[r], to.m[r]);
        const float mine = partial.m[r] == -INFINITY ? 0.0f : std::exp(partial.m[r] - top), theirs = std::exp(to.m[r] - top);
        partial.m[r] = top;
        partial.l[r] = mine * partial.l[r] + theirs * to.l[r];
        float* acc = partial.acc + static_cast<ptrdiff_t>(r) * dim;
        const float* from = to.acc + static_cast<ptrdiff_t>(r) * dim;
        for (int i = 0; i < dim; ++i) acc[i] = mine * acc[i] + theirs * from[i];
      }
    }
    any = true;
  }
}

// A row's sum over all parts of a unit's queries, in their order.
void CpuBackend::merge_parts(const Layer& layer, const Unit& unit, int row, float* acc, float& top, float& sum) const {
  const int rows = unit.tokens * layer.heads_per_kv, dim = layer.sum_width();
  const auto at = [&](int part) { return static_cast<ptrdiff_t>(unit.part_slot) + static_cast<ptrdiff_t>(part) * rows + row; };
  top = -INFINITY;
  for (int part = 0; part < unit.parts; ++part) top = std::max(top, parts_.m[static_cast<size_t>(at(part))]);
  std::fill_n(acc, dim, 0.0f);
  sum = 0;
  for (int part = 0; part < unit.parts; ++part) {
    const float m = parts_.m[static_cast<size_t>(at(part))];
    if (m == -INFINITY) continue;
    const float weight = std::exp(m - top);
    sum += weight * parts_.l[static_cast<size_t>(at(part))];
    const float* from = parts_.acc.data() + at(part) * dim;
    for (int i = 0; i < dim; ++i) acc[i] += weight * from[i];
  }
}

void CpuBackend::attend(int layer_index, const float* q, int64_t q_stride, float* out, int64_t out_stride, Worker worker) {
  const auto l = static_cast<size_t>(layer_index);
  const Layer& layer = layers_[l];
  const LayerCut& cut = cuts_[l];
  Scratch& scratch = threads_[static_cast<size_t>(worker.ith)];
  const int dim = layer.config.head_dim, width = layer.sum_width();
  const auto start = Clock::now();
  const auto write_out = [&](const Unit& unit, int row, const float* acc, float sum) {
    const StepEntry& entry = plan_->entries[static_cast<size_t>(unit.entry)];
    const int q_head = unit.head * layer.heads_per_kv + row % layer.heads_per_kv;
    float* to = out + (entry.row + unit.first_token + row / layer.heads_per_kv) * out_stride + q_head * dim;
    const float norm = sum > 0 ? 1.0f / sum : 0.0f;
    if (layer.config.latent()) {
      latent_output(layer, unit.head, acc, norm, to);
      return;
    }
    for (int i = 0; i < dim; ++i) to[i] = acc[i] * norm;
    layer.value_maps.output(unit.head, to);
  };
  const auto counted = [&](const Unit& unit) {
    const StepEntry& entry = plan_->entries[static_cast<size_t>(unit.entry)];
    return !entry.prompt && counts_mass(layer, entry);
  };
  const int windows = static_cast<int>(cut.windows.size()) * layer.config.q_heads;
  for (;;) {
    const int index = next_unit_[l].fetch_add(1, std::memory_order_relaxed);
    if (const int window = index - static_cast<int>(cut.units.size()); window >= 0) {
      const int q_heads = layer.config.q_heads;
      if (const int mass = window - windows; mass >= 0) {
        const int kv_heads = layer.config.kv_heads;
        if (mass >= static_cast<int>(cut.masses.size()) * kv_heads) break;
        attend_mass(l, static_cast<size_t>(cut.masses[static_cast<size_t>(mass / kv_heads)]), mass % kv_heads, q, q_stride,
                    scratch);
        continue;
      }
      attend_window(l, static_cast<size_t>(cut.windows[static_cast<size_t>(window / q_heads)]), window % q_heads, q, q_stride,
                    scratch);
      continue;
    }
    const Unit& unit = cut.units[static_cast<size_t>(index)];
    const int rows = unit.tokens * layer.heads_per_kv;
    if (unit.parts == 1) {
      const Partial whole = scratch.whole.at_front();
      attend_unit(layer, unit, q, q_stride, whole, scratch);
      if (counted(unit)) add_mass(layer, unit, whole, scratch);
      for (int r = 0; r < rows; ++r) write_out(unit, r, whole.acc + static_cast<ptrdiff_t>(r) * width, whole.l[r]);
      continue;
    }
    const int slot = unit.part_slot + unit.part * rows;
    attend_unit(layer, unit, q, q_stride,
                {parts_.m.data() + slot, parts_.l.data() + slot, parts_.acc.data() + static_cast<ptrdiff_t>(slot) * width},
                scratch);
    // The last part to finish merges all of them; it also readies the counter for the next layer.
    std::atomic<int>& remaining = remaining_[static_cast<size_t>(unit.merge)];
    if (remaining.fetch_add(1, std::memory_order_acq_rel) != unit.parts - 1) continue;
    remaining.store(0, std::memory_order_relaxed);
    for (int r = 0; r < rows; ++r) {
      float& sum = scratch.whole.l[static_cast<size_t>(r)];
      merge_parts(layer, unit, r, scratch.whole.acc.data(), scratch.whole.m[static_cast<size_t>(r)], sum);
      write_out(unit, r, scratch.whole.acc.data(), sum);
    }
    if (counted(unit)) add_mass(layer, unit, scratch.whole.at_front(), scratch);
  }
  scratch.attend_seconds += std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace kvmix
