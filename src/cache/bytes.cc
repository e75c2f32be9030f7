// What a sequence costs, by formula.
#include <algorithm>
#include <cmath>

#include "cache/state.h"
#include "kvmix/error.h"

namespace kvmix {

LayerSizes layer_sizes(const LayerConfig& layer) {
  LayerSizes sizes{};
  const auto format = [&](const SideConfig& side, Side which) {
    return tile_format(side.codec, {kPageTokens, layer.head_dim, which});
  };
  sizes.key = format(layer.key, Side::kKey);
  sizes.value = format(layer.value, Side::kValue);
  sizes.open_key = format({open_codec(layer.recent, layer.key.codec), {}}, Side::kKey);
  sizes.open_value = format({open_codec(layer.recent, layer.value.codec), {}}, Side::kValue);
  sizes.recent_codes = !sizes.open_key.spec.is_f16() || !sizes.open_value.spec.is_f16();
  const size_t row_bytes = static_cast<size_t>(layer.head_dim) * sizeof(uint16_t);
  sizes.sink_bytes = (2 * row_bytes * static_cast<size_t>(layer.sinks) + 63) / 64 * 64;
  sizes.open_bytes = sizes.open_key.bytes + sizes.open_value.bytes;
  sizes.packed_bytes = sizes.key.bytes + sizes.value.bytes;
  sizes.seals = !layer.key.codec.is_f16() || !layer.value.codec.is_f16();
  sizes.group = layer.q_heads / layer.kv_heads;
  return sizes;
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

size_t table_bytes(const CacheConfig& config, int64_t length) {
  size_t bytes = sizeof(SequenceState) + config.layers.size() * sizeof(LayerState);
  for (const LayerConfig& layer : config.layers) {
    const auto pages = static_cast<size_t>(page_count(layer, length));
    const size_t entries = (pages + kTableStep - 1) / kTableStep * kTableStep;
    bytes += static_cast<size_t>(layer.kv_heads) * (sizeof(HeadState) + entries * sizeof(std::byte*));
  }
  return bytes;
}

PagePrediction predict_pages(const LayerConfig& layer, int64_t n_tokens) {
  // The state before the last token came: sealing and freeing happen in front of an append.
  const int64_t before = n_tokens > 0 ? n_tokens - 1 : 0;
  PagePrediction p{page_count(layer, n_tokens), fixed_seal_target(layer, before), 0};
  if (layer.window.ratio_key > 0 || layer.window.ratio_value > 0) {
    // Where the rule settles once it has been applied to its own tail.
    p.sealed = 0;
    const auto tail = [&] { return before - layer.sinks - p.sealed * kPageTokens; };
    while (const int64_t surplus = ratio_surplus_pages(layer, tail())) p.sealed += surplus;
  }
  if (layer.sliding_window > 0) {
    const int64_t first_visible = n_tokens - layer.sliding_window;
    p.freed = first_visible <= layer.sinks ? 0 : std::min(p.pages, (first_visible - layer.sinks) / kPageTokens);
  }
  p.sealed = std::max(p.sealed, p.freed);
  return p;
}

size_t predict_bytes(const CacheConfig& config, int64_t n_tokens) {
  if (n_tokens < 0) throw Error(Status::kInvalidArgument, "a sequence cannot have " + std::to_string(n_tokens) + " tokens");
  size_t bytes = table_bytes(config, n_tokens);
  for (const LayerConfig& layer : config.layers) {
    const LayerSizes sizes = layer_sizes(layer);
    PagePrediction p = predict_pages(layer, n_tokens);
    if (!sizes.seals) p.sealed = p.freed;
    const auto heads = static_cast<size_t>(layer.kv_heads);
    bytes += heads * (n_tokens > 0 && layer.sinks > 0 ? sizes.sink_bytes : 0);
    bytes += heads * static_cast<size_t>(p.sealed - p.freed) * sizes.packed_bytes;
    bytes += heads * static_cast<size_t>(p.pages - p.sealed) * sizes.open_bytes;
  }
  return bytes;
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

}  // namespace kvmix
