#include "cache/governed.h"

#include <algorithm>

#include "backend/cuda/layer_format.h"
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
  if (config.tokens) govern_tokens();
  if (config.channels) govern_channels();
}

void Governed::govern_channels() {
  channels = make_channel_policy(*config.channels);
  const auto refuse = [&](const std::string& what) {
    throw Error(Status::kUnsupported, "channel policy " + config.channels->name + ": " + what);
  };
  if (policy != nullptr && policy->has_low_tier()) {
    refuse("token policy " + config.tokens->name +
           " has a tier of its own, whose keys keep all channels; leave one of both out");
  }
  bool all_slide = true;
  for (size_t l = 0; l < config.layers.size(); ++l) {
    const LayerConfig& layer = config.layers[l];
    PageFormat& format = thin.emplace_back();
    if (layer.sliding_window > 0) continue;
    all_slide = false;
    const int width = channels->stored(layer.head_dim);
    if (width == layer.head_dim) continue;
    if (!layer.key.transform.feedback.empty()) {
      refuse("keys of layer " + std::to_string(l) +
             " are rounded with \"feedback\", whose weights are for all channels together; make the plan without feedback");
    }
    format = sealed_format(layer.key.codec, layer.value.codec, layer.head_dim, width);
    if (on_cuda(config)) {
      const std::string where = "channel policy " + config.channels->name + ": layer " + std::to_string(l);
      format.bytes = cuda::record_bytes(cuda::thin_shape(layer, width, where));
    }
    if (policy != nullptr) shapes[l].token_bytes.fill(static_cast<double>(format.bytes) / kPageTokens);
  }
  if (all_slide) refuse("every layer has a sliding window, whose keys keep all channels; leave the policy out");
}

void Governed::govern_tokens() {
  policy = make_policy(*config.tokens);
  const auto [bits, low_bits] = policy->tiers();
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
    if (policy->has_low_tier()) low.emplace_back();
    if (!Policy::governs(shape)) continue;
    shape.ordinal = ordinals++;
    if (policy->has_low_tier()) {
      low.back() = sealed_format(with_bits(layer.key.codec, low_bits.key, Side::kKey),
                                 with_bits(layer.value.codec, low_bits.value, Side::kValue), layer.head_dim);
    }
    layer.key.codec = with_bits(layer.key.codec, bits.key, Side::kKey);
    layer.value.codec = with_bits(layer.value.codec, bits.value, Side::kValue);
    shape.token_bytes.fill(static_cast<double>(layer_layout(layer).sealed.bytes) / kPageTokens);
    if (policy->has_low_tier()) shape.token_bytes[1] = static_cast<double>(low.back().bytes) / kPageTokens;
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

Governed::Held Governed::held(size_t layer, int64_t prompt, int64_t n) const {
  const int64_t behind = kept(layer, prompt), asked = decisions(prompt, n);
  const Held undecided{behind + n - prompt, behind < prompt ? behind : 0};
  if (!governs(layer) || !decodes() || asked == 0) return undecided;
  const int64_t heads = shapes[layer].kv_heads, all = policy->most_decoding(shapes[layer], prompt);
  if (all == Policy::kUnbounded) return undecided;
  const int64_t most = (all + heads - 1) / heads, last = prompt + asked * kPageTokens - 1;
  if (behind + last - prompt <= most) return undecided;
  return {most + n - last, most};
}

}  // namespace kvmix
