#include "cache/governed.h"

#include <algorithm>

#include "cache/layout.h"
#include "kvmix/error.h"

namespace kvmix {
namespace {

// A side in the width that a policy asks for. Of one that was fp16, a group is a page of a key channel, or 64 value channels.
CodecSpec with_bits(const CodecSpec& codec, int bits, Side side) {
  if (bits == 0 || bits == codec.bits) return codec;
  CodecSpec spec = codec;
  if (codec.is_f16()) spec = side == Side::kKey ? CodecSpec{0, Axis::kChannel, 128} : CodecSpec{0, Axis::kToken, 64};
  spec.bits = bits;
  return spec;
}

}  // namespace

Governed::Governed(CacheConfig given) : config(std::move(given)) {
  if (!config.tokens) return;
  policy = make_policy(*config.tokens);
  const Needs needs = policy->needs();
  if (needs.every_step || needs.mass != MassReduce::kNone || policy->has_low_tier()) {
    throw Error(Status::kUnsupported, "token policy " + config.tokens->name +
                                          " acts on every decoded token or on the attention of all queries, which this cache "
                                          "does not measure; take one that decides at a prompt's end by its last queries "
                                          "(snapkv, pyramidkv, adakv, kvcrush, dbudgetkv), or streaming with decode append");
  }
  const TierBits bits = policy->tiers()[0];
  int ordinals = 0;
  for (size_t l = 0; l < config.layers.size(); ++l) {
    LayerConfig& layer = config.layers[l];
    LayerShape& shape = shapes.emplace_back();
    shape.layer = static_cast<int>(l);
    shape.layers = static_cast<int>(config.layers.size());
    shape.kv_heads = layer.kv_heads;
    shape.heads_per_kv = layer.q_heads / std::max(1, layer.kv_heads);
    shape.head_dim = layer.head_dim;
    shape.sliding_window = layer.sliding_window;
    if (!Policy::governs(shape)) continue;
    shape.ordinal = ordinals++;
    layer.key.codec = with_bits(layer.key.codec, bits.key, Side::kKey);
    layer.value.codec = with_bits(layer.value.codec, bits.value, Side::kValue);
    shape.token_bytes.fill(static_cast<double>(layer_layout(layer).sealed.bytes) / kPageTokens);
  }
  if (ordinals == 0) {
    throw Error(Status::kUnsupported,
                "token policy " + config.tokens->name +
                    ": every layer has a sliding window, which drops tokens by itself; leave the policy out");
  }
  for (LayerShape& shape : shapes) shape.ordinals = ordinals;
}

int64_t Governed::kept(size_t layer, int64_t prompt) const {
  if (!governs(layer)) return prompt;
  const int64_t heads = shapes[layer].kv_heads, most = policy->most_tokens(shapes[layer], prompt);
  return std::min(prompt, (most + heads - 1) / heads);
}

}  // namespace kvmix
