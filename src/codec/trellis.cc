// The trellis family: codes of 2 to 5 bits that are read with those before them (trellis_code.h), and a scale for every token.
// Rows are Gaussian enough for its levels where they are rotated (Hadamard); a token's scale is its root mean square, a little
// more so that codes do not shrink it (TrellisCode::gain).
//
//     x^ = scale_token (level(window) - 63.5) + offset_channel        an offset with a zero point alone, for keys: their mean
//     moves
//
// With error feedback channels are coded one after the other, as by the other families, all chains of a channel at a time.
#include "codec/trellis.h"

#include <algorithm>
#include <array>
#include <string>

#include "codec/spelling.h"
#include "codec/trellis_encode.h"
#include "codec/unpack_tile.h"
#include "kvmix/error.h"

namespace kvmix {

#if defined(KVMIX_SIMD)
extern const TileEncoder kAvx512TrellisEncoder, kAvx2TrellisEncoder;
#endif
const Codec& trellis_codec();

CodecSpec trellis_spec(int bits, Side side) {
  return parse_codec("trellis" + std::to_string(bits) + (side == Side::kKey ? ".zero" : ".sym"));
}
bool is_trellis(const CodecSpec& spec) { return &codec_of(spec) == &trellis_codec(); }

namespace {

const std::array kInfos = {
    CodecInfo{"trellis2", 2, "2 bits, read with the 6 before them: 256 levels"},
    CodecInfo{"trellis3", 3, "3 bits, read with the 5 before them"},
    CodecInfo{"trellis4", 4, "4 bits, read with the 4 before them"},
    CodecInfo{"trellis5", 5, "5 bits, read with the 3 before them"},
};
static_assert(kInfos.size() == kTrellisBits.size());

const TileEncoder kSerial = {"serial", [] { return true; }, encode_trellis, nullptr};
const std::array kEncoders = {
#if defined(KVMIX_SIMD)
    &kAvx512TrellisEncoder,
    &kAvx2TrellisEncoder,
#endif
    &kSerial,
};

CodecSpec spec_of(int bits, bool zero_point) { return {bits, Axis::kToken, kTrellisGroup, Fit::kMinMax, zero_point}; }

class Trellis final : public Codec {
 public:
  const char* name() const override { return "trellis"; }
  std::span<const CodecInfo> infos() const override { return kInfos; }
  std::vector<CodecSpec> specs() const override {
    std::vector<CodecSpec> specs;
    for (const int bits : kTrellisBits) {
      for (const bool zero : {true, false}) specs.push_back(spec_of(bits, zero));
    }
    return specs;
  }
  std::string spellings() const override { return "trellis{" + alternatives(kTrellisBits) + "}.{zero,sym}"; }
  std::string to_string(const CodecSpec& spec) const override {
    return "trellis" + std::to_string(spec.bits) + (spec.zero_point ? ".zero" : ".sym");
  }

  void check(const CodecSpec& spec, const TileShape& shape) const override {
    const auto fail = [](const std::string& what) { throw Error(Status::kInvalidArgument, what); };
    if (std::find(kTrellisBits.begin(), kTrellisBits.end(), spec.bits) == kTrellisBits.end())
      fail("trellis codes of " + std::to_string(spec.bits) + " bits are unknown; expected " + one_of(kTrellisBits));
    CodecSpec known = spec_of(spec.bits, spec.zero_point);
    known.family = spec.family;
    if (spec != known) fail("trellis codes have a scale a token; expected the codec that is spelt " + to_string(spec));
    check_page_slots(shape);
  }
  size_t bytes(const CodecSpec& spec, const TileShape& shape) const override { return trellis_bytes(spec, shape.width); }
  size_t scale_bytes(const CodecSpec& spec, const TileShape& shape) const override {
    return trellis_head_bytes(spec, shape.width);
  }
  std::span<const TileEncoder* const> encoders() const override { return kEncoders; }

  void decode(const CodecSpec& spec, const TileShape& shape, const std::byte* tile, float* x) const override {
    const TrellisCode& code = trellis_code(spec.bits);
    const auto* scales = reinterpret_cast<const uint8_t*>(tile);
    const auto* codes = scales + trellis_head_bytes(spec, shape.width);
    const auto* offsets = reinterpret_cast<const int8_t*>(scales + trellis_offsets_at(shape.width));
    const float unit = trellis_scale(*std::max_element(scales, scales + trellis_offsets_at(shape.width)));
    const int width = shape.width;
    float levels[kLevels], offset[kMostWidth] = {};
    for (int w = 0; w < kLevels; ++w) levels[w] = static_cast<float>(code.level(w)) - kLevelCentre;
    for (int c = 0; spec.zero_point && c < width; ++c) offset[c] = static_cast<float>(offsets[c]) * unit;
    uint8_t unpacked[kPageTokens * kMostWidth];
    unpack_tile(spec.bits, codes, shape.side, width, unpacked);
    for (int chain = 0; chain < kChains; ++chain) {
      uint8_t windows[kMostWidth] = {};  // the last codes of each channel's chain
      for (int i = 0; i < kChainTokens; ++i) {
        const int t = chain_token(shape.side, chain, i);
        const uint8_t* next = unpacked + t * width;
        for (int c = 0; c < width; ++c) windows[c] = static_cast<uint8_t>(windows[c] << spec.bits | next[c]);
        for (int first = 0; first < width; first += kTrellisGroup) {
          const float scale = trellis_scale(scales[first / kTrellisGroup * kPageTokens + t]);
          const int end = std::min(width, first + kTrellisGroup);
          for (int c = first; c < end; ++c) x[t * width + c] = scale * levels[windows[c]] + offset[c];
        }
      }
    }
  }
};

}  // namespace

const Codec& trellis_codec() {
  static const Trellis codec;
  return codec;
}

}  // namespace kvmix
