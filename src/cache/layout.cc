// What a sequence costs, by formula.
#include "cache/layout.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "backend/cpu/pool.h"
#include "backend/cuda/layer_format.h"
#include "backend/cuda/pool_size.h"
#include "cache/governed.h"
#include "kvmix/error.h"

namespace kvmix {

namespace {

PageFormat page_format(const CodecSpec& key, const CodecSpec& value, int key_width, int value_width, PageRole role) {
  PageFormat format;
  format.key = tile_format(key, {kPageTokens, key_width, Side::kKey});
  format.value = tile_format(value, {kPageTokens, value_width, Side::kValue});
  format.role = role;
  format.rows = role != PageRole::kSealed && key.is_f16() && value.is_f16();
  format.value_offset = format.key.bytes;
  format.bytes = format.key.bytes + format.value.bytes;
  return format;
}

}  // namespace

void check_ranks(const LayerConfig& layer, const std::string& where) {
  if (!layer.latent()) return;
  const int step = LayerConfig::kLatentStep * layer.lists(), most = layer.kv_heads * layer.head_dim;
  for (const Side side : {Side::kKey, Side::kValue}) {
    const bool key = side == Side::kKey;
    const int rank = key ? layer.key_rank : layer.value_rank;
    if (rank >= 2 * step && rank <= most && rank % step == 0) continue;
    throw Error(Status::kInvalidArgument, where + ": rank " + std::to_string(rank) + " of " + (key ? "keys" : "values") +
                                              " does not fit; expected a multiple of " + std::to_string(step) + " from " +
                                              std::to_string(2 * step) + " to " + std::to_string(most));
  }
}

PageFormat sealed_format(const CodecSpec& key, const CodecSpec& value, int head_dim, int key_channels) {
  return page_format(key, value, key_channels > 0 ? key_channels : head_dim, head_dim, PageRole::kSealed);
}

LayerLayout layer_layout(const LayerConfig& layer, bool on_cuda, const std::string& where) {
  const auto page = [&](const CodecSpec& key, const CodecSpec& value, PageRole role) {
    return page_format(key, value, layer.stored_width(Side::kKey), layer.stored_width(Side::kValue), role);
  };
  LayerLayout layout{};
  layout.sinks = page({}, {}, PageRole::kSinks);
  layout.sinks.slots = layer.sinks;
  const auto sinks_of = [&](Side side) {
    return static_cast<size_t>(layer.sinks) * static_cast<size_t>(layer.stored_width(side)) * sizeof(uint16_t);
  };
  layout.sinks.value_offset = sinks_of(Side::kKey);
  layout.sinks.bytes = (sinks_of(Side::kKey) + sinks_of(Side::kValue) + 63) / 64 * 64;
  layout.recent =
      page(open_codec(layer.recent, layer.key.codec), open_codec(layer.recent, layer.value.codec), PageRole::kRecent);
  layout.sealed = page(layer.key.codec, layer.value.codec, PageRole::kSealed);
  layout.seals = !layer.key.codec.is_f16() || !layer.value.codec.is_f16();
  if (!on_cuda) return layout;
  const kvmix_cuda_format record = cuda::layer_format(layer, where);
  layout.sinks.bytes = cuda::open_bytes(layout.sinks.slots, layer.head_dim);
  layout.recent.bytes =
      layout.recent.rows ? cuda::open_bytes(kPageTokens, layer.head_dim) : cuda::record_bytes(cuda::open_format(layer, where));
  layout.sealed.bytes = cuda::record_bytes(record);
  return layout;
}

int64_t fixed_seal_target(const LayerConfig& layer, int64_t length) {
  const int64_t behind = length - layer.sinks - layer.window.tokens;
  return behind <= 0 ? 0 : behind / kPageTokens;
}

int64_t ratio_surplus_pages(const LayerConfig& layer, int64_t tail_tokens) {
  if (tail_tokens <= 0) return 0;
  const double ratio = std::max(layer.window.ratio_key, layer.window.ratio_value);
  const auto kept = static_cast<int64_t>(std::ceil(ratio * static_cast<double>(tail_tokens)));
  return (tail_tokens - kept) / kPageTokens;
}

size_t list_room(const LayerConfig& layer, int64_t length) {
  int64_t pages = page_count(layer, length);
  // Pages that left the window are taken out of the list, so it has those that the window touches, and one being filled.
  if (layer.sliding_window > 0) pages = std::min<int64_t>(pages, layer.sliding_window / kPageTokens + 3);
  return table_room(static_cast<size_t>(pages) + (length > 0 && layer.sinks > 0 ? 1 : 0));
}

int64_t settled_seals(const LayerConfig& layer, int64_t tail_tokens) {
  if (!uses_ratio(layer)) return fixed_seal_target(layer, layer.sinks + tail_tokens);
  int64_t sealed = 0;
  while (const int64_t surplus = ratio_surplus_pages(layer, tail_tokens - sealed * kPageTokens)) sealed += surplus;
  return sealed;
}

PagePrediction predict_pages(const LayerConfig& layer, int64_t n_tokens) {
  // The state before the last token came: sealing and freeing happen in front of an append.
  const int64_t before = n_tokens > 0 ? n_tokens - 1 : 0;
  PagePrediction p{page_count(layer, n_tokens), settled_seals(layer, before - layer.sinks), 0};
  if (layer.sliding_window > 0) {
    const int64_t first_visible = n_tokens - layer.sliding_window;
    p.freed = first_visible <= layer.sinks ? 0 : std::min(p.pages, (first_visible - layer.sinks) / kPageTokens);
  }
  p.sealed = std::max(p.sealed, p.freed);
  return p;
}

namespace {

// The same of a layer in its own codecs: one that stays fp16 seals nothing.
PagePrediction stored_pages(const LayerConfig& layer, bool seals, int64_t n_tokens) {
  PagePrediction p = predict_pages(layer, n_tokens);
  if (!seals) p.sealed = p.freed;
  return p;
}

}  // namespace

size_t predict_bytes(const CacheConfig& given, int64_t n_tokens, int64_t prompt_tokens) {
  if (n_tokens < 0) throw Error(Status::kInvalidArgument, "a sequence cannot have " + std::to_string(n_tokens) + " tokens");
  const Governed governed(given);
  const CacheConfig& config = governed.config;
  const int64_t prompt = prompt_tokens < 0 ? n_tokens : std::min(prompt_tokens, n_tokens);
  size_t bytes = sizeof(SequencePages) + config.layers.size() * sizeof(LayerPages);
  for (size_t l = 0; l < config.layers.size(); ++l) {
    const LayerConfig& layer = config.layers[l];
    const LayerLayout layout = layer_layout(config, l);
    const auto [length, named] = governed.held(l, prompt, n_tokens);
    const bool thin = governed.chooses(l, prompt);
    const PagePrediction p = stored_pages(layer, layout.seals || thin, length);
    size_t head = sizeof(PageList) + list_room(layer, length) * sizeof(PageEntry);
    head += static_cast<size_t>(named) * sizeof(int32_t);
    if (governed.governs(l) && governed.counts()) head += mass_room(length) * sizeof(float);
    if (governed.governs(l) && governed.policy->has_low_tier()) head += sizeof(PageList);
    head += length > 0 && layer.sinks > 0 ? layout.sinks.bytes : 0;
    if (thin) head += static_cast<size_t>(governed.thin[l].key.width);
    head += static_cast<size_t>(p.sealed - p.freed) * (thin ? governed.thin[l] : layout.sealed).bytes;
    head += static_cast<size_t>(p.pages - p.sealed) * layout.recent.bytes;
    bytes += static_cast<size_t>(layer.lists()) * head;
  }
  return bytes;
}

size_t predict_slack_bytes(const CacheConfig& given, int64_t n_tokens, int sequences) {
  const Governed governed(given);
  std::map<size_t, size_t> bytes;  // by size of record
  for (size_t l = 0; l < given.layers.size(); ++l) {
    const LayerConfig& layer = governed.config.layers[l];
    const LayerLayout layout = layer_layout(governed.config, l);
    const int64_t held = governed.kept(l, n_tokens) + (governed.decodes() ? kPageTokens : 0);
    const bool thin = governed.chooses(l, n_tokens);
    const PagePrediction p = stored_pages(layer, layout.seals || thin, governed.governs(l) ? held : n_tokens);
    const size_t sealed = (thin ? governed.thin[l] : layout.sealed).bytes;
    const auto heads = static_cast<size_t>(layer.lists()) * static_cast<size_t>(sequences);
    if (n_tokens > 0 && layer.sinks > 0) bytes[layout.sinks.bytes] += heads * layout.sinks.bytes;
    bytes[sealed] += heads * static_cast<size_t>(p.sealed - p.freed) * sealed;
    // The page that is being sealed is still there when its successor is allocated.
    bytes[layout.recent.bytes] += heads * static_cast<size_t>(p.pages - p.sealed + 1) * layout.recent.bytes;
  }
  size_t slack = 0;
  if (on_cuda(given)) {
    const size_t chunk = cuda::chunk_bytes(given.max_bytes);
    for (const auto& [page, total] : bytes) slack += cuda::most_chunk_slack(page, total, chunk);
    return slack;
  }
  // Recent pages that a prompt leaves behind stand together, between ones that were sealed: both ends are rounded.
  for (const auto& [record, total] : bytes) slack += PagePool::most_slack(record, total) + 2 * kSystemPage;
  return slack;
}

double live_elements(const CacheConfig& config, int64_t n_tokens) {
  double elements = 0;
  for (const LayerConfig& layer : config.layers) {
    const int64_t live = layer.sliding_window > 0 ? std::min<int64_t>(n_tokens, layer.sliding_window) : n_tokens;
    elements += 2.0 * layer.kv_heads * layer.head_dim * static_cast<double>(live);
  }
  return elements;
}

double predict_bits_per_element(const CacheConfig& config, int64_t n_tokens) {
  const double elements = live_elements(config, n_tokens);
  return elements > 0 ? static_cast<double>(predict_bytes(config, n_tokens)) * 8 / elements : 0;
}

double predict_body_bits(const CacheConfig& given, int64_t n_tokens) {
  const Governed governed(given);
  double bits = 0;
  for (size_t l = 0; l < given.layers.size(); ++l) {
    const LayerConfig& layer = governed.config.layers[l];
    const bool thin = governed.chooses(l, n_tokens);
    const size_t page = (thin ? governed.thin[l] : layer_layout(governed.config, l).sealed).bytes;
    const int64_t live = layer.sliding_window > 0 ? std::min<int64_t>(n_tokens, layer.sliding_window) : n_tokens;
    bits += static_cast<double>(layer.lists()) * static_cast<double>(page) * 8 * static_cast<double>(live) / kPageTokens;
  }
  const double elements = live_elements(governed.config, n_tokens);
  return elements > 0 ? bits / elements : 0;
}

}  // namespace kvmix
