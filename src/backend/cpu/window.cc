// The window pass: how much the last queries of a prompt look at each stored key, for token policies, and how large they are in
// each channel, for channel policies.
//
// A layer's queries are kept across the chunks of a prompt. Where it ends, each query head scores all keys of its KV head as
// the pages hold them: a page's rows are decoded once for all queries. The arithmetic is that of attention/scores.h, and a
// score's does not depend on what stands beside it, so the sums are equal to the bit however the prompt was cut.
#include <algorithm>

#include "attention/cpu/float_ops.h"
#include "attention/scores.h"
#include "backend/cpu/cpu_backend.h"

namespace kvmix {

void CpuBackend::begin_window(size_t l, size_t e) {
  const StepEntry& entry = plan_->entries[e];
  const Layer& layer = layers_[l];
  PromptStep& step = prompts_[entry.id];
  const auto wanted = static_cast<size_t>(layer.ids.kept_queries());
  const auto dim = static_cast<size_t>(layer.config.head_dim), heads = static_cast<size_t>(layer.config.q_heads);
  const auto kept = queries_.find(entry.id);
  // Tokens of the prompt whose queries are not here any more were cut off by a truncation.
  const int64_t known = kept != queries_.end() ? kept->second.begin : entry.start;
  step.ends = entry.ends_prompt;
  step.next.end = entry.end();
  step.next.begin = std::max({entry.end() - static_cast<int64_t>(wanted), entry.prompt_start, known});
  cuts_[l].windows.push_back(static_cast<int>(e));
  if (!entry.ends_prompt) {
    step.next.layers.resize(layers_.size());
    step.next.layers[l].resize(wanted * heads * dim);
    return;
  }
  if (layer.ids.channel_queries > 0) {
    step.squares.resize(layers_.size());
    step.squares[l].assign(heads * dim, 0.0f);
  }
  step.sums.resize(layers_.size());
  step.tokens.resize(layers_.size());
  size_t most = 0, all = 0;
  for (int h = 0; h < layer.config.kv_heads; ++h) {
    step.tokens[l].push_back(HeadPages(entry.pages->layers[l], h, layer.ids.sinks).tokens());
    most = std::max(most, static_cast<size_t>(step.tokens[l].back()));
    all += static_cast<size_t>(step.tokens[l].back()) * static_cast<size_t>(layer.heads_per_kv);
  }
  if (layer.ids.window_queries > 0) step.sums[l].assign(all, 0.0f);
  for (Scratch& t : threads_) {
    const auto grow = [](std::vector<float>& v, size_t n) { v.resize(std::max(v.size(), n)); };
    grow(t.queries, wanted * dim);
    grow(t.scores, wanted * most);
    grow(t.rows, kPageTokens * dim);
    grow(t.lanes, kPageTokens * dim);
    grow(t.dots, wanted * kPageTokens);
  }
}

void CpuBackend::attend_window(size_t l, size_t e, int q_head, const float* q, int64_t q_stride, Scratch& scratch) {
  const StepEntry& entry = plan_->entries[e];
  const Layer& layer = layers_[l];
  const int dim = layer.config.head_dim, kv_head = q_head / layer.heads_per_kv;
  PromptStep& step = prompts_.at(entry.id);
  const auto kept = queries_.find(entry.id);
  const auto place = [&](int64_t position) {
    return (position % layer.ids.kept_queries() * layer.config.q_heads + q_head) * dim;
  };
  for (int64_t p = step.next.begin; p < step.next.end; ++p) {
    float* to = step.ends ? scratch.queries.data() + (p - step.next.begin) * dim : step.next.layers[l].data() + place(p);
    if (p < entry.start) {
      std::copy_n(kept->second.layers[l].data() + place(p), dim, to);
    } else {
      std::copy_n(q + (entry.row + p - entry.start) * q_stride + static_cast<ptrdiff_t>(q_head) * dim, dim, to);
      layer.key_maps.query(kv_head, to);
    }
  }
  if (!step.ends) return;
  const auto kept_rows = static_cast<int>(step.next.end - step.next.begin);
  if (const int n = std::min(layer.ids.channel_queries, kept_rows); n > 0) {
    float* squares = step.squares[l].data() + static_cast<ptrdiff_t>(q_head) * dim;
    for (int r = kept_rows - n; r < kept_rows; ++r) {
      const float* row = scratch.queries.data() + static_cast<ptrdiff_t>(r) * dim;
      for (int c = 0; c < dim; ++c) squares[c] += row[c] * row[c];
    }
    for (int c = 0; c < dim; ++c) squares[c] /= static_cast<float>(n);
  }
  const int n = std::min(layer.ids.window_queries, kept_rows);
  if (n == 0) return;
  ptrdiff_t before = 0;
  for (int h = 0; h < kv_head; ++h) before += step.tokens[l][static_cast<size_t>(h)] * layer.heads_per_kv;
  const auto tokens = static_cast<size_t>(step.tokens[l][static_cast<size_t>(kv_head)]);
  float* sums = step.sums[l].data() + before + static_cast<ptrdiff_t>(tokens) * (q_head % layer.heads_per_kv);
  const float* queries = scratch.queries.data() + static_cast<ptrdiff_t>(kept_rows - n) * dim;
  score(layer, HeadPages(entry.pages->layers[l], kv_head, layer.ids.sinks), {queries, static_cast<size_t>(n * dim)},
        {sums, tokens}, scratch);
}

// Keys of a page's slots [first, first + n), n <= kPageTokens, as [head_dim][kPageTokens]: what a dot reduces over is then
// apart, tokens are next to each other.
void CpuBackend::key_lanes(const PageEntry& page, const PageList& list, int dim, int first, int n, Scratch& scratch) const {
  slot_rows(page, Side::kKey, first, n, scratch.rows.data(), scratch.rows.data());
  const int width = format(page).key.width;
  if (width < dim) {  // channels that were not chosen add nothing
    std::fill_n(scratch.lanes.begin(), dim * kPageTokens, 0.0f);
    for (int t = 0; t < n; ++t) {
      const float* row = scratch.rows.data() + static_cast<ptrdiff_t>(t) * width;
      for (int c = 0; c < width; ++c) {
        scratch.lanes[static_cast<size_t>(list.channels[static_cast<size_t>(c)] * kPageTokens + t)] = row[c];
      }
    }
    return;
  }
  for (int t = 0; t < n; ++t) {
    const float* row = scratch.rows.data() + static_cast<ptrdiff_t>(t) * dim;
    for (int c = 0; c < dim; ++c) scratch.lanes[static_cast<size_t>(c * kPageTokens + t)] = row[c];
  }
}

void CpuBackend::dots(const HeadPages& pages, std::span<const float> queries, size_t dim, size_t tokens, Scratch& scratch) {
  const size_t rows = queries.size() / dim;
  const FloatOps& ops = float_ops(forced_kernel_ == "portable");
  size_t at = 0;
  const auto score_slots = [&](const PageEntry& page, const PageList& list, int slot, size_t n) {
    key_lanes(page, list, static_cast<int>(dim), slot, static_cast<int>(n), scratch);
    ops.multiply(queries.data(), static_cast<int>(rows), static_cast<int>(dim), scratch.lanes.data(), kPageTokens,
                 scratch.dots.data());
    for (size_t r = 0; r < rows; ++r) {
      std::copy_n(scratch.dots.data() + r * kPageTokens, n, scratch.scores.data() + r * tokens + at);
    }
    at += n;
  };
  const auto score_list = [&](const PageList& list) {
    for (const PageEntry& page : list.pages) {
      for (int slot = 0; slot < page.live && at < tokens; slot += kPageTokens) {
        score_slots(page, list, slot, std::min(static_cast<size_t>(std::min(page.live - slot, kPageTokens)), tokens - at));
      }
    }
  };
  if (pages.low != nullptr) score_list(*pages.low);
  score_list(pages.list);
}

void CpuBackend::score(const Layer& layer, const HeadPages& pages, std::span<const float> queries, std::span<float> sums,
                       Scratch& scratch) {
  const auto dim = static_cast<size_t>(layer.config.head_dim), rows = queries.size() / dim, tokens = sums.size();
  const FloatOps& ops = float_ops(forced_kernel_ == "portable");
  dots(pages, queries, dim, tokens, scratch);
  // The prompt's tokens are the list's newest: the last query sees all.
  for (size_t r = 0; r < rows; ++r) {
    const std::span<float> seen(scratch.scores.data() + r * tokens, tokens - (rows - 1 - r));
    ops.weigh(seen.data(), seen.size(), layer.config.scale, layer.config.softcap);
    add_to_window(seen, sums);
  }
}

Backend::Window CpuBackend::window(SequenceId id, int layer, int kv_head) const {
  const auto l = static_cast<size_t>(layer);
  const PromptStep& step = prompts_.at(id);
  const int per_kv = layers_[l].heads_per_kv;
  size_t before = 0;
  for (int h = 0; h < kv_head; ++h) before += static_cast<size_t>(step.tokens[l][static_cast<size_t>(h)] * per_kv);
  const auto n = static_cast<size_t>(step.tokens[l][static_cast<size_t>(kv_head)] * per_kv);
  const int queries = std::min(layers_[l].ids.window_queries, static_cast<int>(step.next.end - step.next.begin));
  return {std::span(step.sums[l]).subspan(before, n), queries};
}

std::span<const float> CpuBackend::query_squares(SequenceId id, int layer, int kv_head) const {
  const auto l = static_cast<size_t>(layer);
  const auto n = static_cast<size_t>(layers_[l].heads_per_kv) * static_cast<size_t>(layers_[l].config.head_dim);
  return std::span(prompts_.at(id).squares[l]).subspan(static_cast<size_t>(kv_head) * n, n);
}

std::vector<float> CpuBackend::key_squares(int layer, std::span<const KeySquares> lists) {
  const auto width = static_cast<size_t>(layers_[static_cast<size_t>(layer)].config.head_dim);
  std::vector<float> means(lists.size() * width, 0.0f);
  parallel_for(std::clamp(static_cast<int>(lists.size()), 1, static_cast<int>(threads_.size())), lists.size(), [&](size_t i) {
    float* const sums = means.data() + i * width;
    std::span<const int32_t> dropped = lists[i].dropped;
    std::vector<float> rows, of_page(width);  // page by page, as the device adds
    int32_t token = 0;
    size_t stay = 0;
    for (const PageEntry& page : lists[i].list->pages) {
      std::fill(of_page.begin(), of_page.end(), 0.0f);
      rows.resize(static_cast<size_t>(page.live) * width);
      read(page, Side::kKey, rows.data());
      for (size_t slot = 0; slot < static_cast<size_t>(page.live); ++slot, ++token) {
        if (!dropped.empty() && dropped.front() == token) {
          dropped = dropped.subspan(1);
          continue;
        }
        ++stay;
        for (size_t c = 0; c < width; ++c) of_page[c] += rows[slot * width + c] * rows[slot * width + c];
      }
      for (size_t c = 0; c < width; ++c) sums[c] += of_page[c];
    }
    for (size_t c = 0; c < width; ++c) sums[c] /= static_cast<float>(std::max<size_t>(stay, 1));
  });
  return means;
}

void CpuBackend::end() {
  for (auto& [id, step] : prompts_) {
    if (step.ends) {
      queries_.erase(id);
    } else {
      queries_[id] = std::move(step.next);
    }
  }
  prompts_.clear();
}

void CpuBackend::fork(SequenceId from, SequenceId to) {
  if (const auto kept = queries_.find(from); kept != queries_.end()) queries_[to] = kept->second;
}

void CpuBackend::cut_queries(SequenceId id, int64_t n) {
  const auto kept = queries_.find(id);
  if (kept == queries_.end()) return;
  kept->second.end = std::min(kept->second.end, n);
  kept->second.begin = std::min(kept->second.begin, n);
}

}  // namespace kvmix
