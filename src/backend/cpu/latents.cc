// Attention over latents: keys are rebuilt, normed and rotated a page at a time, values' latents are summed as they are.
#include <algorithm>
#include <cmath>

#include "backend/cpu/cpu_backend.h"

namespace kvmix {
namespace {

// rows [n][count] times up [count][dim].
void rebuild(const float* rows, int n, const LatentFactors::Head& head, int dim, float* out) {
  for (int t = 0; t < n; ++t, rows += head.count, out += dim) {
    std::fill_n(out, dim, 0.0f);
    const float* up = head.up.data();
    for (int i = 0; i < head.count; ++i, up += dim) {
      for (int c = 0; c < dim; ++c) out[c] += rows[i] * up[c];
    }
  }
}

void finish_key(const LatentFactors& f, int kv_head, int dim, int64_t position, float* key) {
  if (!f.key_bias.empty()) {
    for (int c = 0; c < dim; ++c) key[c] += f.key_bias[static_cast<size_t>(kv_head * dim + c)];
  }
  if (!f.key_norm.empty()) {
    float sum = 0;
    for (int c = 0; c < dim; ++c) sum += key[c] * key[c];
    const float scale = 1.0f / std::sqrt(sum / static_cast<float>(dim) + f.norm_epsilon);
    for (int c = 0; c < dim; ++c) key[c] *= scale * f.key_norm[static_cast<size_t>(c)];
  }
  const auto pairs = static_cast<int>(f.angles.size());
  for (int i = 0; i < pairs; ++i) {
    const double angle = static_cast<double>(position) * f.angles[static_cast<size_t>(i)];
    const float cosine = static_cast<float>(std::cos(angle)) * f.magnitude,
                sine = static_cast<float>(std::sin(angle)) * f.magnitude;
    float &a = key[f.neighbours ? 2 * i : i], &b = key[f.neighbours ? 2 * i + 1 : i + pairs];
    const float x = a, y = b;
    a = x * cosine - y * sine;
    b = x * sine + y * cosine;
  }
}

}  // namespace

size_t CpuBackend::latent_scratch_floats(const Layer& layer, int rows) {
  const LayerConfig& c = layer.config;
  const auto most = static_cast<size_t>(std::max(c.key_rank, c.value_rank)), slots = static_cast<size_t>(kPageTokens);
  return slots *
         (most + static_cast<size_t>(LayerConfig::kMostLatents) + static_cast<size_t>(c.head_dim) + static_cast<size_t>(rows));
}

void CpuBackend::latent_rows(const LayerPages& lists, size_t page, Side side, const LatentFactors::Head& head, int first, int n,
                             float* tile, float* out) const {
  for (int at = head.first; at < head.first + head.count;) {
    const int width = [&] {
      const PageFormat& f = format(lists.heads[0].pages[page]);
      return (side == Side::kKey ? f.key : f.value).width;
    }();
    const int list = at / width, from = at % width, some = std::min(width - from, head.first + head.count - at);
    const PageEntry& entry = lists.heads[static_cast<size_t>(list)].pages[page];
    const bool rows = (side == Side::kKey ? format(entry).key : format(entry).value).spec.is_f16();
    slot_rows(entry, side, first, n, tile, tile);
    const float* source = tile + (rows ? 0 : static_cast<ptrdiff_t>(first) * width) + from;
    for (int t = 0; t < n; ++t)
      std::copy_n(source + static_cast<ptrdiff_t>(t) * width, some,
                  out + static_cast<ptrdiff_t>(t) * head.count + at - head.first);
    at += some;
  }
}

void CpuBackend::attend_latents(const Layer& layer, const Unit& unit, const float* q, int64_t q_stride, const Partial& partial,
                                Scratch& scratch) const {
  const LayerConfig& config = layer.config;
  const LatentFactors& factors = *config.factors;
  const LatentFactors::Head &key_head = factors.key[static_cast<size_t>(unit.head)],
                            &value_head = factors.value[static_cast<size_t>(unit.head)];
  const StepEntry& entry = plan_->entries[static_cast<size_t>(unit.entry)];
  const LayerPages& lists = entry.pages->layers[static_cast<size_t>(&layer - layers_.data())];
  const HeadPages pages(lists, 0, layer.ids.sinks);
  const int dim = config.head_dim, rows = unit.tokens * layer.heads_per_kv, width = layer.sum_width(),
            most = std::max(config.key_rank, config.value_rank);
  auto* latents = reinterpret_cast<float*>(aligned(scratch.kernel.data()));
  float *tile = latents + static_cast<ptrdiff_t>(kPageTokens) * most,
        *keys = tile + static_cast<ptrdiff_t>(kPageTokens) * LayerConfig::kMostLatents,
        *scores = keys + static_cast<ptrdiff_t>(kPageTokens) * dim;
  std::fill_n(partial.m, rows, -INFINITY);
  std::fill_n(partial.l, rows, 0.0f);
  std::fill_n(partial.acc, static_cast<ptrdiff_t>(rows) * width, 0.0f);
  const int64_t newest = entry.start + unit.first_token + unit.tokens - 1;
  const int64_t oldest = config.sliding_window > 0 ? entry.start + unit.first_token - config.sliding_window + 1 : 0;
  for (int i = unit.part == 0 && pages.body > 0 ? -1 : unit.page_begin; i < unit.page_end; ++i) {
    const size_t at = i < 0 ? 0 : pages.body + static_cast<size_t>(i);
    const PageEntry& page = lists.heads[0].pages[at];
    for (int slot = 0; slot < page.live; slot += kPageTokens) {
      const int n = std::min(page.live - slot, kPageTokens);
      const int64_t first = page.first + slot;
      if (first + n <= oldest || first > newest) continue;
      latent_rows(lists, at, Side::kKey, key_head, slot, n, tile, latents);
      rebuild(latents, n, key_head, dim, keys);
      for (int t = 0; t < n; ++t) finish_key(factors, unit.head, dim, first + t, keys + static_cast<ptrdiff_t>(t) * dim);
      latent_rows(lists, at, Side::kValue, value_head, slot, n, tile, latents);
      for (int r = 0; r < rows; ++r) {
        const int token = unit.first_token + r / layer.heads_per_kv;
        const float* query =
            q + (entry.row + token) * q_stride + (unit.head * layer.heads_per_kv + r % layer.heads_per_kv) * dim;
        const int64_t last = entry.start + token, from = config.sliding_window > 0 ? last - config.sliding_window + 1 : 0;
        const auto begin = static_cast<int>(std::clamp<int64_t>(from - first, 0, n)),
                   end = static_cast<int>(std::clamp<int64_t>(last + 1 - first, 0, n));
        if (begin >= end) continue;
        float top = -INFINITY;
        for (int t = begin; t < end; ++t) {
          const float* key = keys + static_cast<ptrdiff_t>(t) * dim;
          constexpr int kSums = 16;  // of a dot product side by side; head_dim is a multiple
          float sums[kSums] = {}, sum = 0;
          for (int c = 0; c < dim; c += kSums) {
            for (int j = 0; j < kSums; ++j) sums[j] += query[c + j] * key[c + j];
          }
          for (const float s : sums) sum += s;
          sum *= config.scale;
          scores[t] = config.softcap > 0 ? config.softcap * std::tanh(sum / config.softcap) : sum;
          top = std::max(top, scores[t]);
        }
        float* acc = partial.acc + static_cast<ptrdiff_t>(r) * width;
        if (top > partial.m[r]) {
          const float shrink = partial.m[r] == -INFINITY ? 0.0f : std::exp(partial.m[r] - top);
          partial.l[r] *= shrink;
          for (int c = 0; c < value_head.count; ++c) acc[c] *= shrink;
          partial.m[r] = top;
        }
        for (int t = begin; t < end; ++t) {
          const float p = std::exp(scores[t] - partial.m[r]);
          partial.l[r] += p;
          const float* z = latents + static_cast<ptrdiff_t>(t) * value_head.count;
          for (int c = 0; c < value_head.count; ++c) acc[c] += p * z[c];
        }
      }
    }
  }
}

void CpuBackend::latent_output(const Layer& layer, int kv_head, const float* acc, float norm, float* out) {
  const LatentFactors& f = *layer.config.factors;
  const int dim = layer.config.head_dim;
  rebuild(acc, 1, f.value[static_cast<size_t>(kv_head)], dim, out);
  for (int c = 0; c < dim; ++c) {
    out[c] *= norm;
    if (!f.value_bias.empty()) out[c] += f.value_bias[static_cast<size_t>(kv_head * dim + c)];
  }
}

}  // namespace kvmix
