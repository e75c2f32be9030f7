#include "backend/cuda/layer_format.h"

#include "codec/row.h"
#include "codec/trellis.h"
#include "kvmix/error.h"
#include "rows/scale.h"

namespace kvmix::cuda {
namespace {

// A side's numbers of kvmix_cuda_format.
struct SideFormat {
  int32_t bits, group;
  bool per_token;
};

SideFormat side_format(const SideConfig& side, Side which, const std::string& where) {
  const auto refuse = [&](const std::string& what, const std::string& remedy) {
    throw Error(Status::kUnsupported, where + (which == Side::kKey ? " keys: " : " values: ") + what +
                                          " cannot be on the device \"cuda\"; " + remedy);
  };
  const CodecSpec& codec = side.codec;
  const bool trellis = is_trellis(codec);
  if (!codec.is_uniform() && !trellis)
    refuse(to_string(codec), "take a codec that is spelt int<bits> or trellis<bits>, or the device \"cpu\"");
  for (const TransformSpec::Field& field : side.transform.more) {
    if (field.name != kScaleField) refuse("the row map of \"" + field.name + "\"", "leave it out, or take the device \"cpu\"");
  }
  if (trellis) {
    const CodecSpec known = trellis_spec(codec.bits, which);
    if (codec != known) refuse(to_string(codec), "take " + to_string(known) + ", or the device \"cpu\"");
    return {kTrellis + codec.bits, kTrellisGroup, which == Side::kValue};
  }
  if (codec.is_f16()) return {kF16Bits, 128, which == Side::kValue};
  if (!codec.zero_point) refuse(to_string(codec) + ", which has no zero point,", "take \"zero\", or the device \"cpu\"");
  if (which == Side::kValue && codec.axis != Axis::kToken)
    refuse(to_string(codec), "take scales per token, or the device \"cpu\"");
  if (!Widths::has(codec.bits) || !Groups::has(codec.group)) {
    refuse(to_string(codec), "widths are " + Widths::text() + " and groups " + Groups::text() + " there");
  }
  return {codec.bits, codec.group, codec.axis == Axis::kToken};
}

}  // namespace

kvmix_cuda_format layer_format(const LayerConfig& layer, const std::string& where) {
  const SideFormat key = side_format(layer.key, Side::kKey, where), value = side_format(layer.value, Side::kValue, where);
  if (!HeadDims::has(layer.head_dim)) {
    throw Error(Status::kUnsupported, where + ": head_dim " + std::to_string(layer.head_dim) +
                                          " has no kernels on the device \"cuda\"; there are " + HeadDims::text() +
                                          ", others need the device \"cpu\"");
  }
  if (layer.sinks > kPageTokens) {
    throw Error(Status::kUnsupported, where + ": " + std::to_string(layer.sinks) +
                                          " sinks do not fit the device \"cuda\"; take at most " + std::to_string(kPageTokens));
  }
  kvmix_cuda_format format{};
  format.head_dim = layer.head_dim;
  format.key_bits = key.bits, format.key_group = key.group, format.key_per_token = key.per_token && key.bits != kF16Bits;
  format.value_bits = value.bits, format.value_group = value.group;
  check_format(format);
  open_format(layer, where);
  return format;
}

kvmix_cuda_format open_format(const LayerConfig& layer, const std::string& where) {
  const CodecSpec& recent = layer.recent;
  if (!recent.is_f16() && (!takes_rows(recent) || !recent.is_uniform() || !recent.zero_point || !Groups::has(recent.group))) {
    throw Error(Status::kUnsupported, where + ": recent rows of " + to_string(recent) +
                                          " cannot be on the device \"cuda\"; take f16, or int8 per token with a zero point "
                                          "and groups of " +
                                          Groups::text());
  }
  const auto bits = [&](const SideConfig& side) { return open_codec(recent, side.codec).is_f16() ? kF16Bits : recent.bits; };
  const int group = recent.is_f16() ? kPageTokens : recent.group;
  return {layer.head_dim, bits(layer.key), bits(layer.value), group, group, 1};
}

ThinShape thin_shape(const LayerConfig& layer, int key_width, const std::string& where) {
  const RecordShape shape = record_shape(layer_format(layer, where));
  if (shape.key_per_token || is_trellis_width(shape.key_bits)) {
    throw Error(Status::kUnsupported, where + " keys: channels of " + to_string(layer.key.codec) +
                                          " share scales, so that on the device \"cuda\" none can be left out; take scales per "
                                          "channel, leave \"channels\" out, or take the device \"cpu\"");
  }
  return {shape, key_width};
}

size_t record_bytes(const ThinShape& shape) { return whole_units(static_cast<size_t>(shape.bytes())); }
size_t record_bytes(const kvmix_cuda_format& format) { return record_bytes(ThinShape{record_shape(format)}); }

size_t open_bytes(int slots, int head_dim) {
  return whole_units(2 * static_cast<size_t>(slots) * static_cast<size_t>(head_dim) * sizeof(uint16_t));
}

}  // namespace kvmix::cuda
