// The formats of a layer's pages and, by formula, how many pages of each a sequence has.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "backend/page.h"
#include "kvmix/cache.h"

namespace kvmix {

// Page lists have room for a multiple of this many entries, so that their size is a formula.
inline constexpr size_t kTableStep = 16;
constexpr size_t table_room(size_t entries) { return (entries + kTableStep - 1) / kTableStep * kTableStep; }

struct LayerLayout {
  PageFormat sinks, recent, sealed;
  bool seals;  // false when both sides stay fp16
};
// On the device "cuda" pages have sizes of their own; tiles, `key` and `value`, then say what a file holds.
// `where`: what errors call the layer.
LayerLayout layer_layout(const LayerConfig& layer, bool on_cuda = false, const std::string& where = "a layer");
inline bool on_cuda(const CacheConfig& config) { return config.device == "cuda"; }
inline LayerLayout layer_layout(const CacheConfig& config, size_t l) {
  return layer_layout(config.layers[l], on_cuda(config), "layer " + std::to_string(l));
}
// Throws kInvalidArgument unless the layer's latents, if it stores any, are as many as pages can hold.
void check_ranks(const LayerConfig& layer, const std::string& where);
// A page that is sealed in these codecs, with so many channels of the keys; 0: all.
PageFormat sealed_format(const CodecSpec& key, const CodecSpec& value, int head_dim, int key_channels = 0);

// Pages of a KV head behind the sinks that a sequence of this length has begun.
inline int64_t page_count(const LayerConfig& layer, int64_t length) {
  return length <= layer.sinks ? 0 : (length - layer.sinks + kPageTokens - 1) / kPageTokens;
}
// Pages that a fixed window seals at this length.
int64_t fixed_seal_target(const LayerConfig& layer, int64_t length);
// Pages that the ratio rule (KVmix b.4) seals from a tail of this many unsealed tokens.
int64_t ratio_surplus_pages(const LayerConfig& layer, int64_t tail_tokens);
// Pages of a tail of this many unsealed tokens that are sealed once its window's rule has been applied until it settles.
int64_t settled_seals(const LayerConfig& layer, int64_t tail_tokens);
inline bool uses_ratio(const LayerConfig& layer) { return layer.window.ratio_key > 0 || layer.window.ratio_value > 0; }

// Pages of one KV head at this length: all that were begun, those sealed (or freed), those freed.
struct PagePrediction {
  int64_t pages, sealed, freed;
};
PagePrediction predict_pages(const LayerConfig& layer, int64_t n_tokens);
// Entries that the page list of a KV head has room for at this length.
size_t list_room(const LayerConfig& layer, int64_t length);

}  // namespace kvmix
