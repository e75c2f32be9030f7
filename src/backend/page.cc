#include "backend/page.h"

#include "kvmix/error.h"

namespace kvmix {
namespace {

bool same_tile(const TileFormat& a, const TileFormat& b) {
  return a.spec == b.spec && a.side == b.side && a.head_dim == b.head_dim;
}

}  // namespace

FormatId FormatTable::add(const PageFormat& format) {
  for (size_t i = 0; i < formats_.size(); ++i) {
    const PageFormat& f = formats_[i];
    if (same_tile(f.key, format.key) && same_tile(f.value, format.value) && f.slots == format.slots && f.role == format.role &&
        f.rows == format.rows) {
      return static_cast<FormatId>(i);
    }
  }
  if (formats_.size() > UINT16_MAX) {
    throw Error(Status::kUnsupported, "a cache of more than 65536 different page formats; use fewer kinds of layers");
  }
  formats_.push_back(format);
  return static_cast<FormatId>(formats_.size() - 1);
}

}  // namespace kvmix
