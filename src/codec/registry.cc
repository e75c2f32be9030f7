// The families of codecs, and the public functions over all of them.
#include <algorithm>
#include <array>

#include "codec/codec_family.h"
#include "codec/row.h"
#include "codec/spelling.h"
#include "kvmix/error.h"

namespace kvmix {

#define KVMIX_CODEC(name) const Codec& name();
#include "codec/registry.inc"
#undef KVMIX_CODEC

namespace {

std::string joined(std::span<const int> values, const char* between, const char* last) {
  std::string text;
  for (size_t i = 0; i < values.size(); ++i) {
    if (i > 0) text += i + 1 == values.size() ? last : between;
    text += std::to_string(values[i]);
  }
  return text;
}

TileShape page_shape(Side side, int width) { return {kPageTokens, width, side}; }

const TileEncoder& reference_encoder(const CodecSpec& spec) { return *codec_of(spec).encoders().back(); }

const RowCodec& rows_of(const CodecSpec& spec) {
  const RowCodec* rows = codec_of(spec).rows(spec);
  if (rows == nullptr) throw Error(Status::kInternal, to_string(spec) + " does not take single rows; please report this");
  return *rows;
}

}  // namespace

std::string one_of(std::span<const int> values) { return joined(values, ", ", " or "); }
std::string alternatives(std::span<const int> values) { return joined(values, ",", ","); }

std::span<const Codec* const> codec_registry() {
#define KVMIX_CODEC(name) &name(),
  static const std::array families = {
#include "codec/registry.inc"
  };
#undef KVMIX_CODEC
  return families;
}

const Codec& codec_of(const CodecSpec& spec) {
  const std::span<const Codec* const> families = codec_registry();
  if (spec.family >= families.size()) {
    throw Error(Status::kInvalidArgument,
                "codec family " + std::to_string(spec.family) + " is unknown; there are " + std::to_string(families.size()));
  }
  return *families[spec.family];
}

const TileEncoder& Codec::best_encoder() const {
  const std::span<const TileEncoder* const> all = encoders();
  const auto best = std::find_if(all.begin(), all.end(), [](const TileEncoder* e) { return e->available(); });
  return best == all.end() ? *all.back() : **best;
}

std::optional<CodecSpec> Codec::parse(std::string_view text) const {
  for (const CodecSpec& spec : specs()) {
    if (to_string(spec) == text) return spec;
  }
  return std::nullopt;
}

void check_page_slots(const TileShape& shape) {
  if (shape.slots == kPageTokens) return;
  throw Error(Status::kInvalidArgument,
              "tiles of " + std::to_string(shape.slots) + " slots are not supported; expected " + std::to_string(kPageTokens));
}

void check_width(int width) {
  if (width < kLeastWidth || width > kMostWidth || width % kWidthStep != 0) {
    throw Error(Status::kInvalidArgument, "head_dim " + std::to_string(width) + " is not supported; it must be a multiple of " +
                                              std::to_string(kWidthStep) + " from " + std::to_string(kLeastWidth) + " to " +
                                              std::to_string(kMostWidth));
  }
}

TileFormat tile_format(const CodecSpec& spec, const TileShape& shape) {
  const Codec& codec = codec_of(spec);
  check_width(shape.width);
  codec.check(spec, shape);
  return {spec, shape.side, shape.width, codec.bytes(spec, shape), codec.scale_bytes(spec, shape), shape.slots};
}

std::string to_string(const CodecSpec& spec) { return codec_of(spec).to_string(spec); }

CodecSpec parse_codec(const std::string& text) {
  std::string accepted;
  uint8_t family = 0;
  for (const Codec* codec : codec_registry()) {
    if (std::optional<CodecSpec> spec = codec->parse(text)) {
      spec->family = family;
      return *spec;
    }
    if (family++ > 0) accepted += " or ";
    accepted += codec->spellings();
  }
  throw Error(Status::kInvalidArgument, "codec \"" + text.substr(0, 80) + "\" is unknown; expected " + accepted);
}

void check_codec(const CodecSpec& spec, int width) {
  check_width(width);
  for (const Side side : {Side::kKey, Side::kValue}) codec_of(spec).check(spec, page_shape(side, width));
}

size_t tile_bytes(const CodecSpec& spec, int width) { return codec_of(spec).bytes(spec, page_shape(Side::kKey, width)); }
size_t tile_scale_bytes(const CodecSpec& spec, int width) {
  return codec_of(spec).scale_bytes(spec, page_shape(Side::kKey, width));
}

void encode_tile(const CodecSpec& spec, Side side, int width, const uint16_t* x, std::byte* out) {
  reference_encoder(spec).encode(spec, page_shape(side, width), x, nullptr, out);
}
void feedback_tile(const CodecSpec& spec, Side side, int width, const uint16_t* x, const float* feedback, std::byte* out) {
  reference_encoder(spec).encode(spec, page_shape(side, width), x, feedback, out);
}
void decode_tile(const CodecSpec& spec, Side side, int width, const std::byte* in, float* x) {
  codec_of(spec).decode(spec, page_shape(side, width), in, x);
}

std::span<const CodecInfo> codecs() {
  static const std::vector<CodecInfo> infos = [] {
    std::vector<CodecInfo> all;
    for (const Codec* codec : codec_registry()) all.insert(all.end(), codec->infos().begin(), codec->infos().end());
    return all;
  }();
  return infos;
}

std::vector<CodecSpec> all_codec_specs() {
  std::vector<CodecSpec> all;
  for (size_t family = 0; family < codec_registry().size(); ++family) {
    for (CodecSpec spec : codec_registry()[family]->specs()) {
      spec.family = static_cast<uint8_t>(family);
      all.push_back(spec);
    }
  }
  return all;
}

bool takes_rows(const CodecSpec& spec) { return codec_of(spec).rows(spec) != nullptr; }

std::string recent_codecs() {
  std::string text = "f16";
  for (const Codec* codec : codec_registry()) {
    if (const std::string rows = codec->row_spellings(); !rows.empty()) text += " or " + rows;
  }
  return text;
}

size_t row_bytes(const CodecSpec& spec, int width) { return rows_of(spec).record_bytes(spec, width); }
void encode_rows(const CodecSpec& spec, int width, int n, const float* x, const float* columns, std::byte* records) {
  codec_of(spec).best_encoder().encode_rows(spec, width, n, x, columns, records);
}
void store_row(const CodecSpec& spec, Side side, int width, const std::byte* record, int slot, std::byte* tile) {
  rows_of(spec).store(spec, page_shape(side, width), record, slot, tile);
}
void load_row(const CodecSpec& spec, Side side, int width, const std::byte* tile, int slot, std::byte* record) {
  rows_of(spec).load(spec, page_shape(side, width), tile, slot, record);
}
void decode_row(const CodecSpec& spec, int width, const std::byte* record, float* x) {
  rows_of(spec).decode(spec, width, record, x);
}

}  // namespace kvmix
