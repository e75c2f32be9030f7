// The kvarn family: tiles whose tokens and channels are brought to one variance before they are coded, the tile recipe of KVarN
// (arXiv 2606.03458). A sweep divides every channel by its standard deviation over the tile and then every token by its own, as
// Sinkhorn's iteration does with sums. The product of a token's divisors is its scale, that of a channel's divisors the
// channel's. What is left is coded in groups along one axis; the numbers of a group hold the scale along that axis too, so only
// the other one is stored besides:
//
//     channel:  x^ = s_token (mid_channel + scale_channel (code - (2^b - 1) / 2))          one group, the tile's 128 tokens
//     token:    x^ = s_channel (mid + scale (code - (2^b - 1) / 2))                        a group each 128 channels of a token
//
// Before the codes stand, fp16: scales, midpoints (both as the uniform family's with groups of 128), the other axis's scales,
// padded together to 64 bytes. Codes are in the uniform family's order (tile_layout.h).
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <string>

#include "base/fp16.h"
#include "codec/codec_family.h"
#include "codec/quantize.h"
#include "codec/spelling.h"
#include "codec/tile_layout.h"
#include "kvmix/error.h"

namespace kvmix {
namespace {

constexpr std::array kBits = {2, 3, 4, 5, 6, 8};
constexpr int kSweeps = 16;
// Beyond these a stored scale would leave what fp16 holds exactly enough; a token 65,536 times another's size is coded as one
// of that many times.
constexpr float kMostScale = 256.0f;

const std::array kInfos = {
    CodecInfo{"kvarn2", 2, "int2 after tokens and channels were brought to one variance"},
    CodecInfo{"kvarn3", 3, "int3 likewise"},
    CodecInfo{"kvarn4", 4, "int4 likewise"},
    CodecInfo{"kvarn5", 5, "int5 likewise"},
    CodecInfo{"kvarn6", 6, "int6 likewise"},
    CodecInfo{"kvarn8", 8, "int8 likewise"},
};
static_assert(kInfos.size() == kBits.size());

CodecSpec groups_of(const CodecSpec& spec) { return {spec.bits, spec.axis, 128, spec.fit, true}; }
bool by_channel(const CodecSpec& spec) { return spec.axis == Axis::kChannel; }
// Of the axis along which no groups stand.
int other_scales(const CodecSpec& spec, int width) { return by_channel(spec) ? kPageTokens : width; }

size_t head_bytes(const CodecSpec& spec, int width) {
  const int halves = 2 * scale_count(groups_of(spec), width) + other_scales(spec, width);
  return (static_cast<size_t>(halves) * 2 + kVectorBytes - 1) / kVectorBytes * kVectorBytes;
}
size_t all_bytes(const CodecSpec& spec, int width) {
  return head_bytes(spec, width) + static_cast<size_t>(kPageTokens * width * spec.bits) / 8;
}

float stored_half(const std::byte* tile, int index) {
  uint16_t h;
  std::memcpy(&h, tile + static_cast<size_t>(index) * 2, 2);
  return f16_to_f32(h);
}
void store_half(uint16_t h, int index, std::byte* tile) { std::memcpy(tile + static_cast<size_t>(index) * 2, &h, 2); }

float finite(uint16_t h) {
  const float v = f16_to_f32(h);
  return std::isfinite(v) ? v : 0.0f;
}

// A tile while it is brought to one variance; y(t, c) = x / (token[t] channel[c]).
struct Balanced {
  float y[kPageTokens * kMostWidth];
  float token[kPageTokens], channel[kMostWidth];
};

// Divides n numbers, `step` apart, by their standard deviation, and multiplies `scale` by it. A row that does not vary stays.
void normalise(float* y, int n, int step, float& scale) {
  float sum = 0, squares = 0;
  for (int i = 0; i < n; ++i) sum += y[i * step];
  const float mean = sum / static_cast<float>(n);
  for (int i = 0; i < n; ++i) squares += (y[i * step] - mean) * (y[i * step] - mean);
  const float deviation = std::sqrt(squares / static_cast<float>(n));
  if (!(deviation > 1e-12f) || !std::isfinite(deviation)) return;
  for (int i = 0; i < n; ++i) y[i * step] = y[i * step] / deviation;
  scale = scale * deviation;
}

void balance(const uint16_t* x, int width, Balanced& tile) {
  for (int i = 0; i < kPageTokens * width; ++i) tile.y[i] = finite(x[i]);
  std::fill_n(tile.token, kPageTokens, 1.0f);
  std::fill_n(tile.channel, width, 1.0f);
  for (int sweep = 0; sweep < kSweeps; ++sweep) {
    for (int c = 0; c < width; ++c) normalise(tile.y + c, kPageTokens, width, tile.channel[c]);
    for (int t = 0; t < kPageTokens; ++t) normalise(tile.y + t * width, width, 1, tile.token[t]);
  }
}

// The n scales of an axis around 1 as they are stored: what they have in common is the other axis's, whose numbers follow from
// x.
void store_around_one(const float* scales, int n, int at, std::byte* tile) {
  float logs = 0;
  for (int i = 0; i < n; ++i) logs += std::log(scales[i]);
  const float common = std::exp(logs / static_cast<float>(n));
  for (int i = 0; i < n; ++i)
    store_half(f32_to_f16(std::clamp(scales[i] / common, 1.0f / kMostScale, kMostScale)), at + i, tile);
}

struct Layout {
  Layout(const CodecSpec& spec, const TileShape& shape)
      : groups(groups_of(spec)),
        width(shape.width),
        side(shape.side),
        mids_at(scale_count(groups, width)),
        other_at(2 * mids_at),
        geometry(tile_geometry(side, width)),
        head(head_bytes(spec, width)) {}

  int group_of(int t, int c) const { return scale_index(groups, width, t, c); }
  float other(const std::byte* tile, int t, int c) const { return stored_half(tile, other_at + (by_channel(groups) ? t : c)); }
  void put(std::byte* tile, int t, int c, int code) const {
    const int lane = side == Side::kKey ? t : c, reduce = side == Side::kKey ? c : t;
    put_code(groups.bits, reinterpret_cast<uint8_t*>(tile + head), unit_index(geometry, lane, reduce),
             byte_in_unit(lane, reduce), code);
  }
  int get(const std::byte* tile, int t, int c) const {
    const int lane = side == Side::kKey ? t : c, reduce = side == Side::kKey ? c : t;
    return get_code(groups.bits, reinterpret_cast<const uint8_t*>(tile + head), unit_index(geometry, lane, reduce),
                    byte_in_unit(lane, reduce));
  }

  CodecSpec groups;
  int width;
  Side side;
  int mids_at, other_at;
  TileGeometry geometry;
  size_t head;
};

// Codes anew, channel after channel, with the errors before it added by `feedback` (feedback_tile).
void feed_back(const Layout& layout, const uint16_t* x, const float* feedback, size_t bytes, std::byte* tile) {
  const int bits = layout.groups.bits;
  const float centre = code_centre(bits), top = static_cast<float>((1 << bits) - 1);
  std::memset(tile + layout.head, 0, bytes - layout.head);
  for (int t = 0; t < kPageTokens; ++t) {
    float errors[kMostWidth];
    const float* weights = feedback;
    for (int c = 0; c < layout.width; ++c) {
      const float exact = finite(x[t * layout.width + c]), other = layout.other(tile, t, c);
      float wanted = exact;
      for (int i = 0; i < c; ++i) wanted = wanted + weights[i] * errors[i];
      weights += c;
      const int group = layout.group_of(t, c);
      const float scale = stored_half(tile, group), mid = stored_half(tile, layout.mids_at + group);
      const float y = wanted / other;
      const float code = quantize_code(std::isfinite(y) ? y : 0.0f, code_map(scale, mid, top), top);
      errors[c] = exact - other * (mid + scale * (code - centre));
      layout.put(tile, t, c, static_cast<int>(code));
    }
  }
}

void encode_kvarn(const CodecSpec& spec, const TileShape& shape, const uint16_t* x, const float* feedback, std::byte* out) {
  const Layout layout(spec, shape);
  const int width = shape.width;
  std::memset(out, 0, all_bytes(spec, width));
  Balanced tile;
  balance(x, width, tile);
  const bool channels = by_channel(spec);
  store_around_one(channels ? tile.token : tile.channel, other_scales(spec, width), layout.other_at, out);
  // Whole groups from x by the scale that is stored; the one along the group's own axis is in the group's numbers.
  const int rows = channels ? width : kPageTokens, length = channels ? kPageTokens : width;
  for (int row = 0; row < rows; ++row) {
    for (int first = 0; first < length; first += kMaxGroup) {
      const int n = std::min(kMaxGroup, length - first);
      float y[kMaxGroup];
      uint8_t codes[kMaxGroup];
      const auto token = [&](int i) { return channels ? first + i : row; };
      const auto channel = [&](int i) { return channels ? row : first + i; };
      for (int i = 0; i < n; ++i) y[i] = finite(x[token(i) * width + channel(i)]) / layout.other(out, token(i), channel(i));
      const GroupScale g = quantize_group(y, n, spec.bits, spec.fit, true, codes);
      const int group = layout.group_of(token(0), channel(0));
      store_half(g.scale, group, out);
      store_half(g.mid, layout.mids_at + group, out);
      for (int i = 0; i < n; ++i) layout.put(out, token(i), channel(i), codes[i]);
    }
  }
  if (feedback != nullptr) feed_back(layout, x, feedback, all_bytes(spec, width), out);
}

const TileEncoder kSerial = {"serial", [] { return true; }, encode_kvarn, nullptr};
const std::array kEncoders = {&kSerial};

std::string spelled(const CodecSpec& spec) {
  return "kvarn" + std::to_string(spec.bits) + (by_channel(spec) ? ".channel." : ".token.") + fit_name(spec.fit);
}

class Kvarn final : public Codec {
 public:
  const char* name() const override { return "kvarn"; }
  std::span<const CodecInfo> infos() const override { return kInfos; }

  std::vector<CodecSpec> specs() const override {
    std::vector<CodecSpec> specs;
    for (const int bits : kBits) {
      for (const Axis axis : {Axis::kChannel, Axis::kToken}) {
        for (const Fit fit : {Fit::kMinMax, Fit::kLeastSquares}) specs.push_back({bits, axis, 128, fit, true});
      }
    }
    return specs;
  }
  std::string spellings() const override { return "kvarn{" + alternatives(kBits) + "}.{channel,token}.{minmax,fitted}"; }

  std::string to_string(const CodecSpec& spec) const override { return spelled(spec); }

  void check(const CodecSpec& spec, const TileShape& shape) const override {
    const auto fail = [](const std::string& what) { throw Error(Status::kInvalidArgument, what); };
    if (std::find(kBits.begin(), kBits.end(), spec.bits) == kBits.end())
      fail("kvarn codes of " + std::to_string(spec.bits) + " bits are unknown; expected " + one_of(kBits));
    if (spec.group != 128) fail("kvarn groups of " + std::to_string(spec.group) + " are unknown; expected 128");
    if (spec.fit != Fit::kMinMax && spec.fit != Fit::kLeastSquares)
      fail(std::string("kvarn codes are not fitted \"") + fit_name(spec.fit) + "\"; expected minmax or fitted");
    if (!spec.zero_point) fail("kvarn codes have a zero point; expected \"zero_point\" to be set");
    check_page_slots(shape);
  }
  size_t bytes(const CodecSpec& spec, const TileShape& shape) const override { return all_bytes(spec, shape.width); }
  size_t scale_bytes(const CodecSpec& spec, const TileShape& shape) const override { return head_bytes(spec, shape.width); }
  std::span<const TileEncoder* const> encoders() const override { return kEncoders; }

  void decode(const CodecSpec& spec, const TileShape& shape, const std::byte* tile, float* x) const override {
    const Layout layout(spec, shape);
    const float centre = code_centre(spec.bits);
    for (int t = 0; t < kPageTokens; ++t) {
      for (int c = 0; c < shape.width; ++c) {
        const int group = layout.group_of(t, c);
        const float mid = stored_half(tile, layout.mids_at + group), scale = stored_half(tile, group);
        x[t * shape.width + c] =
            layout.other(tile, t, c) * (mid + scale * (static_cast<float>(layout.get(tile, t, c)) - centre));
      }
    }
  }
};

}  // namespace

const Codec& kvarn_codec();
const Codec& kvarn_codec() {
  static const Kvarn codec;
  return codec;
}

}  // namespace kvmix
