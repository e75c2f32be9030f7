// Codecs: how the numbers of a tile become bytes.
//
// A tile is kPageTokens tokens x `width` channels of one KV head, one side (key or value); the width is the head_dim unless a
// row map changes it. Codecs come in families (src/codec/codec_family.h), one file and one line of a registry each. The first
// family, *uniform*, is fp16 and integers: b-bit codes and, per group, an fp16 scale and (unless `zero_point` is off) an fp16
// midpoint:
//
//     x^ = mid + scale * (code - (2^b - 1) / 2)           mid = 0 without a zero point
//
// Axis::kChannel groups `group` consecutive tokens of one channel (KVmix b.3 for keys), Axis::kToken groups `group`
// consecutive channels of one token (values). The last group of a row may be shorter when the width is not a multiple.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "kvmix/export.h"

namespace KVMIX_API kvmix {

inline constexpr int kPageTokens = 128;
// Widths of a row that the library stores.
inline constexpr int kLeastWidth = 32, kMostWidth = 256, kWidthStep = 16;
// Bits of a code and elements of a group in the uniform family; 16 bits are plain fp16. Every check, message and dispatch is
// made from these lists.
inline constexpr int kF16Bits = 16;
inline constexpr std::array kCodecBits = {1, 2, 3, 4, 5, 6, 8, kF16Bits};
inline constexpr std::array kCodecGroups = {32, 64, 128};

enum class Side : uint8_t { kKey, kValue };
enum class Axis : uint8_t { kChannel, kToken };
enum class Fit : uint8_t {
  kMinMax,        // scale = (max - min) / (2^b - 1)
  kLeastSquares,  // scale and midpoint refitted to the codes (quality recipe: three refits from each of 2-3 clips)
  kUnbiased,      // that fit with its scale divided by its R^2: the regression of codes on values, which shrinks nothing
};

// The numbers of one tile's encoding. Value type; equality means equal bytes for equal input.
struct CodecSpec {
  int bits = kF16Bits;  // one of kCodecBits; with kF16Bits the following fields are ignored
  Axis axis = Axis::kChannel;
  int group = 128;  // one of kCodecGroups
  Fit fit = Fit::kMinMax;
  bool zero_point = true;
  // Row of the registry of families; 0 is the uniform one. Other families give the fields above a meaning of their own. The
  // number may differ between builds: files hold to_string.
  uint8_t family = 0;

  constexpr bool is_uniform() const { return family == 0; }
  constexpr bool is_f16() const { return is_uniform() && bits == kF16Bits; }
  friend bool operator==(const CodecSpec&, const CodecSpec&) = default;
};

// "f16" or e.g. "int3.channel.g128.fitted.zero" / "int4.token.g64.minmax.sym", or what another family spells. parse_codec is
// the inverse and throws kInvalidArgument naming the text and the accepted spellings.
std::string to_string(const CodecSpec& spec);
CodecSpec parse_codec(const std::string& text);

// Throws kInvalidArgument if no registered codec takes this spec for rows of `width` (kLeastWidth..kMostWidth, a multiple of
// kWidthStep) of both sides.
void check_codec(const CodecSpec& spec, int width);

// Bytes of one encoded tile, metadata included: scales (and midpoints) first, then codes. Multiple of 64.
size_t tile_bytes(const CodecSpec& spec, int width);
// Bytes of the scales and midpoints at the head of the tile. Multiple of 64.
size_t tile_scale_bytes(const CodecSpec& spec, int width);

// Encodes a full tile. `x` is fp16 bits, token-major [kPageTokens][width], contiguous; `out` has tile_bytes() bytes,
// 64-byte aligned. Non-finite inputs are treated as 0; finite inputs whose group range exceeds fp16 saturate.
// No allocation; thread safe. This is the serial reference: every other implementation writes the same bytes.
void encode_tile(const CodecSpec& spec, Side side, int width, const uint16_t* x, std::byte* out);
// The same with error feedback: the scales of encode_tile, and codes rounded one channel after the other: `feedback` holds,
// channel k after channel k - 1, the k weights with which the errors (exact - stored) of channels 0..k-1 are added to channel k
// before it is rounded (successive rounding as in LDLQ, QuIP, arXiv 2307.13304, section 3, and GPTQ, arXiv 2210.17323).
void feedback_tile(const CodecSpec& spec, Side side, int width, const uint16_t* x, const float* feedback, std::byte* out);
// Decodes a tile to float, token-major [kPageTokens][width].
void decode_tile(const CodecSpec& spec, Side side, int width, const std::byte* in, float* x);

// Registry for `kvmix list`: the rows of every family, e.g. one per width.
struct CodecInfo {
  std::string name;         // "int3"
  int bits;                 // code bits per element
  std::string description;  // one line
};
std::span<const CodecInfo> codecs();
// Every valid spec but f16 of every family, for contract tests and search. Of the uniform one: widths x axes x groups x fits x
// zero point.
std::vector<CodecSpec> all_codec_specs();

}  // namespace kvmix
