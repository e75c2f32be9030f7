// What a page is: the same on every device and in files. A page holds some tokens of one KV head of one layer, keys and
// values; its entry says in which format, how many, and at which positions. Sinks, recent rows, sealed pages are formats.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "codec/codec_family.h"

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
  int32_t first = 0;  // slot i holds the token at position first + i, unless the list says otherwise (PageList)
  int32_t live = 0;   // slots 0..live-1 hold tokens

  friend bool operator==(const PageEntry&, const PageEntry&) = default;
};
static_assert(sizeof(PageEntry) == 16);

// The pages of one KV head in one layer of a sequence, by position; sinks first.
//
// A list that tokens were dropped from names the positions of its first `positions.size()` tokens; those behind them stand at
// first + i as ever. `first` of a page with named positions is its newest one less live - 1: no slot is newer than first + i,
// so whoever sees positions up to the newest sees the page, and the next token's slot is its position less `first` here too.
struct PageList {
  std::vector<PageEntry> pages;
  std::vector<int32_t> positions;
  // What queries have paid to each token, where a layer's policy asks for it (LayerFormats::mass).
  std::vector<float> mass;
  // Of the stored key channels those that pages of LayerFormats::thin hold, ascending; empty while none were chosen.
  std::vector<uint8_t> channels;

  int64_t tokens() const {
    int64_t n = 0;
    for (const PageEntry& page : pages) n += page.live;
    return n;
  }
  // The position of the page's slot, if `before` tokens stand in the pages before it.
  int32_t position(const PageEntry& page, int64_t before, int slot) const {
    const int64_t token = before + slot;
    return token < static_cast<int64_t>(positions.size()) ? positions[static_cast<size_t>(token)] : page.first + slot;
  }
  // Calls visit(page, slot, position) for every token, oldest first.
  template <class Visit>
  void for_each_token(const Visit& visit) const {
    int64_t before = 0;
    for (const PageEntry& page : pages) {
      for (int slot = 0; slot < page.live; ++slot) visit(page, slot, position(page, before, slot));
      before += page.live;
    }
  }
};
// Numbers that PageList::mass has room for, so that its size is a formula.
constexpr size_t mass_room(int64_t tokens) {
  return static_cast<size_t>(tokens + kPageTokens - 1) / static_cast<size_t>(kPageTokens) * static_cast<size_t>(kPageTokens);
}
struct LayerPages {
  std::vector<PageList> heads;
  // Tokens that a policy has moved to its low tier, by KV head: sealed pages, all positions named. Empty without such a tier.
  std::vector<PageList> low;

  template <class Visit>
  void for_each_list(const Visit& visit) {
    for (std::vector<PageList>* lists : {&heads, &low}) {
      for (PageList& list : *lists) visit(list);
    }
  }
  template <class Visit>
  void for_each_list(const Visit& visit) const {
    for (const std::vector<PageList>* lists : {&heads, &low}) {
      for (const PageList& list : *lists) visit(list);
    }
  }
};
struct SequencePages {
  int64_t length = 0;
  int64_t prompt_length = 0;  // `length` when the last prompt ended
  int64_t prompt_start = 0;   // of a prompt of which further chunks are to come
  int64_t counted_from = 0;   // PageList::mass counts the queries from this position on
  bool in_prompt = false;
  uint64_t revision = 0;  // another one whenever a page was added or another stands in a place; no two lists of pages share one
  // Up to this length a step changes no list but by how many slots of its last page are live. `late`: such steps have not been
  // written into the lists (Ledger::write_late).
  int64_t quiet_until = 0;
  bool late = false;
  std::vector<LayerPages> layers;
};

}  // namespace kvmix
