// Attention over latents: keys are rebuilt, normed and rotated a page at a time, values' latents are summed as they are.
#include <algorithm>
#include <cmath>

#include "attention/cpu/float_ops.h"
#include "backend/cpu/cpu_backend.h"

namespace kvmix {
namespace {

constexpr int kMostPairs = 128;  // of the widest heads

// Bias, norm and rotation of rebuilt keys at positions first, first + 1, ... Angles go on from token to token, in fp64: over a
// page that is as exact as sines and cosines of every position.
void finish_keys(const LatentFactors& f, int kv_head, int dim, int64_t first, int n, float* keys) {
  const auto pairs = static_cast<int>(f.angles.size());
  double cosine[kMostPairs], sine[kMostPairs], step_cosine[kMostPairs], step_sine[kMostPairs];
  for (int i = 0; i < pairs; ++i) {
    const double step = f.angles[static_cast<size_t>(i)], angle = static_cast<double>(first) * step;
    cosine[i] = std::cos(angle) * static_cast<double>(f.magnitude);
    sine[i] = std::sin(angle) * static_cast<double>(f.magnitude);
    step_cosine[i] = std::cos(step);
    step_sine[i] = std::sin(step);
  }
  const int stride = f.neighbours ? 2 : 1, other = f.neighbours ? 1 : pairs;
  for (int t = 0; t < n; ++t) {
    float* key = keys + static_cast<ptrdiff_t>(t) * dim;
    if (!f.key_bias.empty()) {
      for (int c = 0; c < dim; ++c) key[c] += f.key_bias[static_cast<size_t>(kv_head * dim + c)];
    }
    if (!f.key_norm.empty()) {
      float sum = 0;
      for (int c = 0; c < dim; ++c) sum += key[c] * key[c];
      const float scale = 1.0f / std::sqrt(sum / static_cast<float>(dim) + f.norm_epsilon);
      for (int c = 0; c < dim; ++c) key[c] *= scale * f.key_norm[static_cast<size_t>(c)];
    }
    for (int i = 0; i < pairs; ++i) {
      const auto turn = static_cast<float>(cosine[i]), lift = static_cast<float>(sine[i]);
      float &a = key[stride * i], &b = key[stride * i + other];
      const float x = a, y = b;
      a = x * turn - y * lift;
      b = x * lift + y * turn;
      const double next = cosine[i] * step_cosine[i] - sine[i] * step_sine[i];
      sine[i] = cosine[i] * step_sine[i] + sine[i] * step_cosine[i];
      cosine[i] = next;
    }
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
  const FloatOps& ops = float_ops(forced_kernel_ == "portable");
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
      ops.multiply(latents, n, key_head.count, key_head.up.data(), dim, keys);
      finish_keys(factors, unit.head, dim, first, n, keys);
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
        ops.dots(query, keys + static_cast<ptrdiff_t>(begin) * dim, end - begin, dim, scores + begin);
        for (int t = begin; t < end; ++t) {
          const float score = scores[t] * config.scale;
          scores[t] = config.softcap > 0 ? config.softcap * std::tanh(score / config.softcap) : score;
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
          scores[t] = std::exp(scores[t] - partial.m[r]);
          partial.l[r] += scores[t];
        }
        ops.add(scores + begin, latents + static_cast<ptrdiff_t>(begin) * value_head.count, end - begin, value_head.count, acc);
      }
    }
  }
}

void CpuBackend::latent_output(const Layer& layer, int kv_head, const float* acc, float norm, float* out) const {
  const LatentFactors& f = *layer.config.factors;
  const int dim = layer.config.head_dim;
  const LatentFactors::Head& head = f.value[static_cast<size_t>(kv_head)];
  float_ops(forced_kernel_ == "portable").multiply(acc, 1, head.count, head.up.data(), dim, out);
  for (int c = 0; c < dim; ++c) {
    out[c] *= norm;
    if (!f.value_bias.empty()) out[c] += f.value_bias[static_cast<size_t>(kv_head * dim + c)];
  }
}

}  // namespace kvmix
