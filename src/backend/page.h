// What a page is: the same on every device and in files. A page holds some tokens of one KV head of one layer, keys and
// values; its entry says in which format, how many, and at which positions. Sinks, recent rows, sealed pages are formats.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "attention/cpu/kernel.h"
#include "kvmix/codec.h"

namespace kvmix {

using PageHandle = uint64_t;  // a page's memory, as its backend knows it; below 2^48
inline constexpr PageHandle kNoPage = 0;
using FormatId = uint16_t;  // row of the cache's FormatTable

// What a format is for. Attention does not ask; sealing and reports do.
enum class PageRole : uint8_t {
  kSinks,   // first tokens, fp16 rows for ever
  kRecent,  // filled token by token, until sealed
  kSealed,  // encoded once
};

// A side is either a tile of kPageTokens slots or, when `rows`, fp16 rows of `slots` tokens; values stand behind keys.
struct PageFormat {
  TileFormat key, value;
  int slots = kPageTokens;
  PageRole role = PageRole::kRecent;
  bool rows = false;
  size_t value_offset = 0, bytes = 0;

  bool appendable() const { return role != PageRole::kSealed; }
};

// The formats of a cache; equal ones have one id.
class FormatTable {
 public:
  FormatId add(const PageFormat& format);
  const PageFormat& operator[](FormatId id) const { return formats_[id]; }
  size_t size() const { return formats_.size(); }

 private:
  std::vector<PageFormat> formats_;
};

struct PageEntry {
  uint64_t handle : 48 = kNoPage;
  uint64_t format : 16 = 0;
  int32_t first = 0;  // slot i holds the token at position first + i
  int32_t live = 0;   // slots 0..live-1 hold tokens

  friend bool operator==(const PageEntry&, const PageEntry&) = default;
};
static_assert(sizeof(PageEntry) == 16);

// The pages of one KV head in one layer of a sequence, by position; sinks first.
struct PageList {
  std::vector<PageEntry> pages;
};
struct LayerPages {
  std::vector<PageList> heads;
};
struct SequencePages {
  int64_t length = 0;
  std::vector<LayerPages> layers;
};

}  // namespace kvmix
