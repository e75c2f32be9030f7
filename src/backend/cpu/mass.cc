// What queries pay to each stored token, for token policies that count all of them.
//
// Of decoded tokens the attention kernels hand out their softmax weights, each page's against the largest score so far; once a
// head's softmax is complete they are scaled and added. Of prompts every query scores all keys once more, in the arithmetic and
// the order of attention/scores.h, so that the mass is equal to the bit however the prompt was cut into chunks.
#include <algorithm>
#include <cmath>

#include "attention/scores.h"
#include "backend/cpu/cpu_backend.h"

namespace kvmix {
namespace {

constexpr int kRowsTogether = 32;  // query rows of a prompt that share a page's decoding

void make_room(std::vector<float>& mass, int64_t tokens) {
  if (mass.capacity() != mass_room(tokens)) {
    std::vector<float> fitting;
    fitting.reserve(mass_room(tokens));
    mass = std::move(fitting);
  }
  mass.resize(static_cast<size_t>(tokens));
}

}  // namespace

void CpuBackend::begin_mass(size_t l, size_t e) {
  const StepEntry& entry = plan_->entries[e];
  const Layer& layer = layers_[l];
  mass_.resize(std::max(mass_.size(), e + 1));
  mass_[e].resize(layers_.size());
  const auto heads = static_cast<size_t>(layer.config.kv_heads);
  mass_[e][l].resize(heads);
  size_t most = 0;
  for (size_t h = 0; h < heads; ++h) {
    const HeadPages pages(entry.pages->layers[l], static_cast<int>(h), layer.ids.sinks);
    make_room(mass_[e][l][h].low, pages.low_tokens());
    make_room(mass_[e][l][h].tokens, pages.list.tokens());
    most = std::max(most, static_cast<size_t>(pages.tokens()));
  }
  if (!entry.prompt) return;
  cuts_[l].masses.push_back(static_cast<int>(e));
  const auto dim = static_cast<size_t>(layer.config.head_dim);
  const auto rows = static_cast<size_t>(std::max(kRowsTogether, layer.heads_per_kv));
  for (Scratch& t : threads_) {
    const auto grow = [](std::vector<float>& v, size_t n) { v.resize(std::max(v.size(), n)); };
    grow(t.queries, rows * dim);
    grow(t.scores, rows * most);
    grow(t.rows, kPageTokens * dim);
    grow(t.lanes, kPageTokens * dim);
    grow(t.paid, most);
  }
}

void CpuBackend::attend_mass(size_t l, size_t e, int kv_head, const float* q, int64_t q_stride, Scratch& scratch) {
  const StepEntry& entry = plan_->entries[e];
  const Layer& layer = layers_[l];
  const HeadPages pages(entry.pages->layers[l], kv_head, layer.ids.sinks);
  const int dim = layer.config.head_dim, heads = layer.heads_per_kv;
  HeadMass& mass = mass_[e][l][static_cast<size_t>(kv_head)];
  // Tokens in the order of their places: the low tier first.
  const auto all = static_cast<size_t>(pages.tokens()), low = static_cast<size_t>(pages.low_tokens());
  const std::span<float> paid(scratch.paid.data(), all);
  std::fill(paid.begin(), paid.end(), 0.0f);
  if (pages.low != nullptr) std::copy(pages.low->mass.begin(), pages.low->mass.end(), paid.begin());
  std::copy(pages.list.mass.begin(), pages.list.mass.end(), paid.begin() + static_cast<ptrdiff_t>(low));

  const int step = std::max(1, kRowsTogether / heads);
  for (int first = 0; first < entry.n_tokens; first += step) {
    const int queries = std::min(step, entry.n_tokens - first);
    for (int r = 0; r < queries * heads; ++r) {
      const int64_t row = entry.row + first + r / heads;
      float* to = scratch.queries.data() + static_cast<ptrdiff_t>(r) * dim;
      std::copy_n(q + row * q_stride + static_cast<ptrdiff_t>(kv_head * heads + r % heads) * dim, dim, to);
      layer.key_maps.query(kv_head, to);
    }
    // The step's tokens are the newest: each query sees all but those behind its own.
    const size_t tokens = all - static_cast<size_t>(entry.n_tokens - first - queries);
    dots(pages, {scratch.queries.data(), static_cast<size_t>(queries * heads * dim)}, static_cast<size_t>(dim), tokens,
         scratch);
    for (int t = 0; t < queries; ++t) {
      const size_t seen = tokens - static_cast<size_t>(queries - 1 - t), n = tokens * static_cast<size_t>(heads);
      const std::span<float> rows(scratch.scores.data() + static_cast<size_t>(t) * n, n);
      for (size_t h = 0; h < static_cast<size_t>(heads); ++h) {
        weigh(rows.subspan(h * tokens, seen), layer.config.scale, layer.config.softcap);
        std::fill_n(rows.begin() + static_cast<ptrdiff_t>(h * tokens + seen), tokens - seen, 0.0f);
      }
      if (layer.ids.mass_of_largest) {
        add_max_mass(rows, paid.first(tokens));
      } else {
        add_mean_mass(rows, paid.first(tokens));
      }
    }
  }
  std::copy_n(paid.begin(), low, mass.low.begin());
  std::copy(paid.begin() + static_cast<ptrdiff_t>(low), paid.end(), mass.tokens.begin());
}

void CpuBackend::add_mass(const Layer& layer, const Unit& unit, const Partial& softmax) {
  const StepEntry& entry = plan_->entries[static_cast<size_t>(unit.entry)];
  const auto l = static_cast<size_t>(&layer - layers_.data());
  const HeadPages pages(entry.pages->layers[l], unit.head, layer.ids.sinks);
  HeadMass& mass = mass_[static_cast<size_t>(unit.entry)][l][static_cast<size_t>(unit.head)];
  const int heads = layer.heads_per_kv, rows = unit.tokens * heads;
  const bool largest = layer.ids.mass_of_largest;
  const float part = largest ? 1.0f : 1.0f / static_cast<float>(heads);
  const float* weights = weights_.data() + unit.mass_slot * kPageTokens;
  const float* references = references_.data() + unit.mass_slot;
  const auto add_page = [&](const PageEntry& page, const std::vector<float>& old, std::vector<float>& to, size_t& at) {
    for (int slot = 0; slot < page.live; slot += kPageTokens) {
      alignas(64) float paid[kPageTokens] = {};
      for (int t = 0; t < unit.tokens; ++t) {
        alignas(64) float query[kPageTokens] = {};
        for (int r = t * heads; r < (t + 1) * heads; ++r) {
          const float* w = weights + static_cast<ptrdiff_t>(r) * kPageTokens;
          if (references[r] == -INFINITY || !(softmax.l[r] > 0)) continue;
          const float scale = part * std::exp(references[r] - softmax.m[r]) / softmax.l[r];
          if (largest) {
            for (int i = 0; i < kPageTokens; ++i) query[i] = std::max(query[i], w[i] * scale);
          } else {
            for (int i = 0; i < kPageTokens; ++i) query[i] += w[i] * scale;
          }
        }
        for (int i = 0; i < kPageTokens; ++i) paid[i] += query[i];
      }
      const auto n = static_cast<size_t>(std::min(page.live - slot, kPageTokens));
      const size_t known = std::clamp(old.size(), at, at + n) - at;  // new tokens start from their own query
      for (size_t i = 0; i < known; ++i) to[at + i] = old[at + i] + paid[i];
      for (size_t i = known; i < n; ++i) to[at + i] = paid[i];
      at += n;
      weights += static_cast<ptrdiff_t>(rows) * kPageTokens;
      references += rows;
    }
  };
  size_t at = 0, low_at = 0;
  if (pages.body > 0) add_page(pages.list.pages[0], pages.list.mass, mass.tokens, at);
  for (size_t i = 0; i < pages.low_size(); ++i) add_page(pages[i], pages.low->mass, mass.low, low_at);
  for (size_t i = pages.low_size(); i < static_cast<size_t>(pages.size()); ++i) {
    add_page(pages[i], pages.list.mass, mass.tokens, at);
  }
}

Backend::Mass CpuBackend::mass(SequenceId id, int layer, int kv_head) {
  const auto l = static_cast<size_t>(layer);
  for (size_t e = 0; e < plan_->entries.size(); ++e) {
    if (plan_->entries[e].id != id || !counts_mass(layers_[l], plan_->entries[e])) continue;
    HeadMass& head = mass_[e][l][static_cast<size_t>(kv_head)];
    return {&head.low, &head.tokens};
  }
  return {nullptr, nullptr};
}

}  // namespace kvmix
