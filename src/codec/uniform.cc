// The uniform family: fp16, and integers of 1 to 8 bits by axis, group, fit and zero point.
#include "codec/uniform.h"

#include <algorithm>
#include <array>
#include <string>

#include "codec/encoders.h"
#include "codec/spelling.h"
#include "codec/tile_layout.h"
#include "kvmix/error.h"

namespace kvmix {

void unknown_code_bits(int bits) {
  throw Error(Status::kInternal, "no layout of codes is written for " + std::to_string(bits) + " bits; please report this");
}

namespace {

const std::array<CodecInfo, kCodecBits.size()> kInfos = {{
    {"int1", 1, "two levels per group"},
    {"int2", 2, "four levels, four codes a byte"},
    {"int3", 3, "eight levels at 3.0 bits of codes"},
    {"int4", 4, "sixteen levels, two codes a byte"},
    {"int5", 5, "int4 codes and a bit plane"},
    {"int6", 6, "int4 codes and a plane of two bits"},
    {"int8", 8, "256 levels, a byte a code"},
    {"f16", kF16Bits, "half precision, as it came"},
}};

std::string spelled(const CodecSpec& spec) {
  if (spec.is_f16()) return "f16";
  return "int" + std::to_string(spec.bits) + (spec.axis == Axis::kChannel ? ".channel" : ".token") + ".g" +
         std::to_string(spec.group) + "." + fit_name(spec.fit) + (spec.zero_point ? ".zero" : ".sym");
}

template <class List>
bool contains(const List& list, int value) {
  return std::find(list.begin(), list.end(), value) != list.end();
}

class Uniform final : public Codec {
 public:
  const char* name() const override { return "uniform"; }
  std::span<const CodecInfo> infos() const override { return kInfos; }

  std::vector<CodecSpec> specs() const override {
    std::vector<CodecSpec> specs;
    for (const int bits : kCodecBits) {
      if (bits == kF16Bits) continue;
      for (const Axis axis : {Axis::kChannel, Axis::kToken}) {
        for (const int group : kCodecGroups) {
          for (const Fit fit : {Fit::kMinMax, Fit::kLeastSquares, Fit::kUnbiased}) {
            for (const bool zero : {true, false}) specs.push_back({bits, axis, group, fit, zero});
          }
        }
      }
    }
    return specs;
  }

  std::string spellings() const override {
    std::vector<int> bits(kCodecBits.begin(), kCodecBits.end());
    std::erase(bits, kF16Bits);
    return "f16 or int{" + alternatives(bits) + "}.{channel,token}.g{" + alternatives(kCodecGroups) +
           "}.{minmax,fitted,unbiased}.{zero,sym}";
  }
  std::string row_spellings() const override {
    return "int" + std::to_string(kRowBits) + ".token.g{" + alternatives(kCodecGroups) + "}.minmax.{zero,sym}";
  }

  std::string to_string(const CodecSpec& spec) const override { return spelled(spec); }
  std::optional<CodecSpec> parse(std::string_view text) const override {
    if (text == "f16") return CodecSpec{};
    return Codec::parse(text);
  }

  void check(const CodecSpec& spec, const TileShape& shape) const override {
    const auto fail = [](const std::string& what) { throw Error(Status::kInvalidArgument, what); };
    if (!contains(kCodecBits, spec.bits)) {
      fail("codec width " + std::to_string(spec.bits) + " is unknown; expected " + one_of(kCodecBits));
    }
    if (!spec.is_f16() && !contains(kCodecGroups, spec.group)) {
      fail("codec group " + std::to_string(spec.group) + " is unknown; expected " + one_of(kCodecGroups));
    }
    check_page_slots(shape);
  }

  size_t bytes(const CodecSpec& spec, const TileShape& shape) const override { return uniform_bytes(spec, shape.width); }
  size_t scale_bytes(const CodecSpec& spec, const TileShape& shape) const override {
    return uniform_scale_bytes(spec, shape.width);
  }
  std::span<const TileEncoder* const> encoders() const override { return tile_encoders(); }
  void decode(const CodecSpec& spec, const TileShape& shape, const std::byte* tile, float* x) const override {
    decode_uniform(spec, shape, tile, x);
  }
  const RowCodec* rows(const CodecSpec& spec) const override { return uniform_takes_rows(spec) ? &uniform_rows() : nullptr; }
};

}  // namespace

const Codec& uniform_codec();
const Codec& uniform_codec() {
  static const Uniform codec;
  return codec;
}

}  // namespace kvmix
