// What queries pay to each stored token, for token policies that count all of them.
//
// Of decoded tokens the attention kernels hand out their softmax weights, each page's against the largest score so far; once a
// head's softmax is complete they are scaled and added; with mass_every only of every so many, which stand for the others. Of
// prompts every query scores all keys once more, in the arithmetic and the order of attention/scores.h, so that the mass is
// equal to the bit however the prompt was cut into chunks.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention/cpu/float_ops.h"
#include "attention/scores.h"
#include "backend/cpu/cpu_backend.h"

namespace kvmix {
namespace {

constexpr int kRowsTogether = 32;  // query rows of a prompt that share a page's decoding

using Lanes [[gnu::vector_size(16)]] = float;

Lanes load(const float* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

// to[i] = from[i] + the sum, or the largest, of weights[row][i] * factor[row] over the rows.
template <bool kLargest>
void pay(const float* weights, const float* factor, int rows, const float* from, float* to) {
  constexpr int kLanes = sizeof(Lanes) / sizeof(float), kTogether = 4;
  for (int i = 0; i < kPageTokens; i += kTogether * kLanes) {
    Lanes sum[kTogether] = {};
    for (int r = 0; r < rows; ++r) {
      const float* w = weights + static_cast<ptrdiff_t>(r) * kPageTokens + i;
      const Lanes f = {factor[r], factor[r], factor[r], factor[r]};
#pragma GCC unroll 4
      for (int k = 0; k < kTogether; ++k) {
        const Lanes paid = load(w + k * kLanes) * f;
        if constexpr (kLargest) {
          sum[k] = paid > sum[k] ? paid : sum[k];
        } else {
          sum[k] += paid;
        }
      }
    }
#pragma GCC unroll 4
    for (int k = 0; k < kTogether; ++k) {
      const Lanes after = load(from + i + k * kLanes) + sum[k];
      std::memcpy(to + i + k * kLanes, &after, sizeof after);
    }
  }
}

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
  if (!entry.prompt) {
    const auto rows = static_cast<size_t>(entry.n_tokens) * static_cast<size_t>(layer.heads_per_kv);
    for (Scratch& t : threads_) {
      t.references.resize(std::max(t.references.size(), rows));
      t.factors.resize(std::max(t.factors.size(), rows));
    }
    return;
  }
  cuts_[l].masses.push_back(static_cast<int>(e));
  const auto dim = static_cast<size_t>(layer.config.head_dim);
  const auto rows = static_cast<size_t>(std::max(kRowsTogether, layer.heads_per_kv));
  for (Scratch& t : threads_) {
    const auto grow = [](std::vector<float>& v, size_t n) { v.resize(std::max(v.size(), n)); };
    grow(t.queries, rows * dim);
    grow(t.scores, rows * most);
    grow(t.rows, kPageTokens * dim);
    grow(t.dots, rows * kPageTokens);
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

  const FloatOps& ops = float_ops(forced_kernel_ == "portable");
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
        ops.weigh(rows.data() + h * tokens, seen, layer.config.scale, layer.config.softcap);
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

void CpuBackend::add_mass(const Layer& layer, const Unit& unit, const Partial& softmax, Scratch& scratch) {
  const StepEntry& entry = plan_->entries[static_cast<size_t>(unit.entry)];
  const auto l = static_cast<size_t>(&layer - layers_.data());
  const HeadPages pages(entry.pages->layers[l], unit.head, layer.ids.sinks);
  HeadMass& mass = mass_[static_cast<size_t>(unit.entry)][l][static_cast<size_t>(unit.head)];
  const int heads = layer.heads_per_kv, rows = unit.tokens * heads;
  const auto pay_rows = layer.ids.mass_of_largest ? pay<true> : pay<false>;
  const auto every = static_cast<float>(layer.ids.mass_every);
  const float part = layer.ids.mass_of_largest ? every : every / static_cast<float>(heads);
  float* weights = weights_.data() + unit.mass_slot * kPageTokens;
  const float* references = references_.data() + unit.mass_slot;
  // A row's factor stays as it is while its reference does, from page to page nearly always.
  std::fill_n(scratch.references.begin(), rows, NAN);
  const auto update_factors = [&] {
    for (int r = 0; r < rows; ++r) {
      float &known = scratch.references[static_cast<size_t>(r)], &factor = scratch.factors[static_cast<size_t>(r)];
      const bool pays = (entry.start + unit.first_token + r / heads) % layer.ids.mass_every == 0;
      // What saw nothing of the page has weights that may be anything.
      if (!pays || references[r] == -INFINITY || !(softmax.l[r] > 0)) {
        std::fill_n(weights + static_cast<ptrdiff_t>(r) * kPageTokens, kPageTokens, 0.0f);
        factor = 0, known = NAN;
      } else if (known != references[r]) {
        known = references[r];
        factor = part * std::exp(known - softmax.m[r]) / softmax.l[r];
      }
    }
  };
  const auto add_page = [&](const PageEntry& page, const std::vector<float>& old, std::vector<float>& to, size_t& at) {
    for (int slot = 0; slot < page.live; slot += kPageTokens) {
      update_factors();
      const auto n = static_cast<size_t>(std::min(page.live - slot, kPageTokens));
      const size_t known = std::clamp(old.size(), at, at + n) - at;  // new tokens start from their own query
      if (unit.tokens == 1 && known == kPageTokens) {
        pay_rows(weights, scratch.factors.data(), heads, old.data() + at, to.data() + at);
      } else {
        alignas(64) float paid[kPageTokens] = {};
        for (int t = 0; t < unit.tokens; ++t) {
          pay_rows(weights + static_cast<ptrdiff_t>(t) * heads * kPageTokens, scratch.factors.data() + t * heads, heads, paid,
                   paid);
        }
        for (size_t i = 0; i < known; ++i) to[at + i] = old[at + i] + paid[i];
        for (size_t i = known; i < n; ++i) to[at + i] = paid[i];
      }
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
