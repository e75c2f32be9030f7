// The contract of a codec family: what turns tiles of fp16 rows into bytes and back. One file per family + one line in
// registry.inc; tests/contract runs through all of them.
//
// A family is chosen by CodecSpec::family, which the registry sets; a family neither knows nor reads its own number. It gives
// the other fields of a CodecSpec (bits, axis, group, fit, zero_point) what meaning it likes, as long as different settings
// have different spellings.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kvmix/codec.h"

namespace kvmix {

// What is encoded together: `slots` rows of `width` stored channels, which are the head's unless a row map changes them.
struct TileShape {
  int slots = kPageTokens;
  int width = 0;
  Side side = Side::kKey;
  friend bool operator==(const TileShape&, const TileShape&) = default;
};

// One implementation of a family's arithmetic. All of a family's write the same bytes. No allocation; thread safe.
struct TileEncoder {
  const char* name;
  bool (*available)();  // this machine can run it
  // x: fp16 bits [slots][width]; out: Codec::bytes, 64-byte aligned, every byte is written. Numbers that are not finite count
  // as 0. `feedback` is null or [width (width - 1) / 2] weights of error feedback (feedback_tile, kvmix/codec.h), which change
  // codes, not scales; a spec that does not round by codes takes no notice of them.
  void (*encode)(const CodecSpec& spec, const TileShape& shape, const uint16_t* x, const float* feedback, std::byte* out);
  // Null unless the family has specs that take rows (RowCodec): n records, one after the other, of rows x [n][width], equal to
  // what `encode` would store of these tokens. `columns` is null or the weights as feedback_columns (row.h) lays them out.
  void (*encode_rows)(const CodecSpec& spec, int width, int n, const float* x, const float* columns, std::byte* records);
};

// For specs whose tiles can be filled token by token. A *record* is a token by itself, as it is saved.
class RowCodec {
 public:
  virtual ~RowCodec() = default;
  virtual size_t record_bytes(const CodecSpec& spec, int width) const = 0;  // at most kMostRowBytes (row.h)
  // Moves a record into the tile's slot, 0 to slots - 1, and back. Other slots stay as they are.
  virtual void store(const CodecSpec& spec, const TileShape& shape, const std::byte* record, int slot,
                     std::byte* tile) const = 0;
  virtual void load(const CodecSpec& spec, const TileShape& shape, const std::byte* tile, int slot,
                    std::byte* record) const = 0;
  // The numbers of a record, as `decode` gives them.
  virtual void decode(const CodecSpec& spec, int width, const std::byte* record, float* x) const = 0;
};

class Codec {
 public:
  virtual ~Codec() = default;

  virtual const char* name() const = 0;                     // of the family
  virtual std::span<const CodecInfo> infos() const = 0;     // its rows of `kvmix list`
  virtual std::vector<CodecSpec> specs() const = 0;         // every valid spec but f16; `family` is set by the registry
  virtual std::string spellings() const = 0;                // what parse takes, for messages
  virtual std::string row_spellings() const { return {}; }  // those that take rows

  virtual std::string to_string(const CodecSpec& spec) const = 0;
  // The inverse; nothing for a text that is not this family's. Sets of specs are small: comparing with every name accepts
  // exactly what to_string writes.
  virtual std::optional<CodecSpec> parse(std::string_view text) const;

  // Throws kInvalidArgument naming the value and what is accepted; the width has passed check_width. Everything below may be
  // called only with what passes.
  virtual void check(const CodecSpec& spec, const TileShape& shape) const = 0;
  // Of one encoded tile, and of the scales and the like at its head that are read before the codes. Multiples of 64, and the
  // same for both sides.
  virtual size_t bytes(const CodecSpec& spec, const TileShape& shape) const = 0;
  virtual size_t scale_bytes(const CodecSpec& spec, const TileShape& shape) const = 0;

  // Fastest first; the last one is the serial reference, which runs everywhere.
  virtual std::span<const TileEncoder* const> encoders() const = 0;
  // To floats [slots][width].
  virtual void decode(const CodecSpec& spec, const TileShape& shape, const std::byte* tile, float* x) const = 0;
  // How rows of this spec are stored one by one; null if it takes whole tiles only.
  virtual const RowCodec* rows(const CodecSpec& spec) const {
    (void)spec;
    return nullptr;
  }

  // The fastest encoder that this machine can run.
  const TileEncoder& best_encoder() const;
  void encode(const CodecSpec& spec, const TileShape& shape, const uint16_t* x, const float* feedback, std::byte* out) const {
    best_encoder().encode(spec, shape, x, feedback, out);
  }
};

// The families in the order of registry.inc.
std::span<const Codec* const> codec_registry();
// The family of a spec. Throws kInvalidArgument for a number that no family has.
const Codec& codec_of(const CodecSpec& spec);

// Throws kInvalidArgument unless it is kLeastWidth..kMostWidth and a multiple of kWidthStep.
void check_width(int width);
// Throws kInvalidArgument unless a tile is a whole page.
void check_page_slots(const TileShape& shape);

// One side of packed pages, sizes precomputed.
struct TileFormat {
  CodecSpec spec;
  Side side = Side::kKey;
  int width = 0;  // stored channels of a row
  size_t bytes = 0, scale_bytes = 0;
  int slots = kPageTokens;

  TileShape shape() const { return {slots, width, side}; }
  friend bool operator==(const TileFormat&, const TileFormat&) = default;
};
// Throws kInvalidArgument unless the codec takes the shape.
TileFormat tile_format(const CodecSpec& spec, const TileShape& shape);

}  // namespace kvmix
