// The cache's private state, shared by the files of this folder.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "cache/governed.h"
#include "cache/ledger.h"
#include "kvmix/cache.h"

namespace kvmix {

struct Cache::Impl {
  explicit Impl(CacheConfig c);

  Governed governed;
  CacheConfig& config;
  FormatTable formats;
  std::vector<LayerFormats> ids;  // by layer
  Ledger ledger;
  std::unique_ptr<Backend> backend;
  int64_t sealed_pages = 0;
  PolicyScratch policy_scratch;
  Decision decision;
  std::vector<FreedPage> reserve;  // for what the prompts that end in the open step will keep

  const PageFormat& format(const PageEntry& entry) const { return formats[static_cast<FormatId>(entry.format)]; }
  void release(std::span<const FreedPage> pages);
  void allocate_changes();
  PageHandle allocate(FormatId format);
  void abort();
  // What a prompt that ends is asked for (src/cache/decide.cc): pages that its layers may take at most, and the decision.
  std::vector<FormatId> pages_to_reserve(const SequencePages& sequence, int64_t end) const;
  void fill_reserve(std::span<const StepItem> items);
  void release_reserve();
  void decide(SequenceId id);
  void compact(SequenceId id, size_t layer);
};

}  // namespace kvmix
