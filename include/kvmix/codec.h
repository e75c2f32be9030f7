// Codecs: how the numbers of a tile become bytes.
//
// A tile is kPageTokens tokens x head_dim channels of one KV head, one side (key or value). An integer codec keeps
// b-bit codes and, per group, an fp16 scale and (unless `zero_point` is off) an fp16 midpoint:
//
//     x^ = mid + scale * (code - (2^b - 1) / 2)           mid = 0 without a zero point
//
// Axis::kChannel groups `group` consecutive tokens of one channel (KVmix b.3 for keys), Axis::kToken groups `group`
// consecutive channels of one token (values). The last group of a row may be shorter when head_dim is not a multiple.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "kvmix/export.h"

namespace KVMIX_API kvmix {

inline constexpr int kPageTokens = 128;

enum class Side : uint8_t { kKey, kValue };
enum class Axis : uint8_t { kChannel, kToken };
enum class Fit : uint8_t {
  kMinMax,        // scale = (max - min) / (2^b - 1)
  kLeastSquares,  // scale and midpoint refitted to the codes (quality recipe: three refits from each of 2-3 clips)
};

// The numbers of one tile's encoding. Value type; equality means equal bytes for equal input.
struct CodecSpec {
  int bits = 16;  // 1, 2, 3, 4, 5, 6, 8, or 16 for plain fp16 (then the other fields are ignored)
  Axis axis = Axis::kChannel;
  int group = 128;  // 32, 64 or 128
  Fit fit = Fit::kMinMax;
  bool zero_point = true;

  bool is_f16() const { return bits == 16; }
  friend bool operator==(const CodecSpec&, const CodecSpec&) = default;
};

// "f16" or e.g. "int3.channel.g128.fitted.zero" / "int4.token.g64.minmax.sym". parse_codec is the inverse and throws
// kInvalidArgument naming the offending part and the accepted values.
std::string to_string(const CodecSpec& spec);
CodecSpec parse_codec(const std::string& text);

// Throws kInvalidArgument if no registered codec takes this spec at this head_dim (32..256, multiple of 16).
void check_codec(const CodecSpec& spec, int head_dim);

// Bytes of one encoded tile, metadata included: scales (and midpoints) first, then codes. Multiple of 64.
size_t tile_bytes(const CodecSpec& spec, int head_dim);
// Bytes of the scales and midpoints at the head of the tile. Multiple of 64.
size_t tile_scale_bytes(const CodecSpec& spec, int head_dim);

// Encodes a full tile. `x` is fp16 bits, token-major [kPageTokens][head_dim], contiguous; `out` has tile_bytes() bytes,
// 64-byte aligned. Non-finite inputs are treated as 0; finite inputs whose group range exceeds fp16 saturate.
// No allocation; thread safe. This is the serial reference: every other implementation writes the same bytes.
void encode_tile(const CodecSpec& spec, Side side, int head_dim, const uint16_t* x, std::byte* out);
// Rounds the codes of a tile that encode_tile wrote anew with error feedback, scales as they are: `feedback` holds, channel k
// after channel k - 1, the k weights with which the errors (exact - stored) of channels 0..k-1 are added to channel k before it
// is rounded (successive rounding as in LDLQ, QuIP, arXiv 2307.13304, section 3, and GPTQ, arXiv 2210.17323).
void feedback_tile(const CodecSpec& spec, Side side, int head_dim, const uint16_t* x, const float* feedback, std::byte* tile);
// Decodes a tile to float, token-major [kPageTokens][head_dim].
void decode_tile(const CodecSpec& spec, Side side, int head_dim, const std::byte* in, float* x);

// Registry for `kvmix list` and for tests that run through every codec: one row per (family, width).
struct CodecInfo {
  std::string name;         // "int3"
  int bits;                 // code bits per element
  std::string description;  // one line
};
std::span<const CodecInfo> codecs();
// Every valid integer spec of both sides (widths x axes x groups x fits x zero point), for contract tests and search.
std::vector<CodecSpec> all_codec_specs();

}  // namespace kvmix
