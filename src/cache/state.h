// The cache's private state, shared by the files of this folder.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "cache/ledger.h"
#include "kvmix/cache.h"

namespace kvmix {

struct Cache::Impl {
  explicit Impl(CacheConfig c);

  CacheConfig config;
  FormatTable formats;
  std::vector<LayerFormats> ids;  // by layer
  Ledger ledger;
  std::unique_ptr<Backend> backend;
  int64_t sealed_pages = 0;

  const PageFormat& format(const PageEntry& entry) const { return formats[static_cast<FormatId>(entry.format)]; }
  void release(std::span<const FreedPage> pages);
  void allocate_changes();
  void abort();
};

}  // namespace kvmix
