#include "cache/pool.h"

#include <sys/mman.h>

#include <algorithm>
#include <string>

#include "kvmix/error.h"

namespace kvmix {
namespace {

constexpr size_t kSystemPage = 4096;
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kRegionBytes = size_t{64} << 20;  // of address space; memory is taken as records are carved
constexpr size_t kStepBytes = size_t{64} << 10;

size_t round_up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Records that the system can take back one by one.
bool returnable(size_t record_bytes) { return record_bytes % kSystemPage == 0 && record_bytes >= 4 * kSystemPage; }

}  // namespace

PagePool::~PagePool() {
  for (auto& [bytes, size_class] : classes_) {
    for (const Region& region : size_class.regions) munmap(region.base, region.mapped_bytes);
  }
}

void PagePool::take(size_t bytes) {
  if (max_bytes_ != 0 && taken_bytes_ + bytes > max_bytes_) {
    throw Error(Status::kOutOfMemory, "the cache limit of " + std::to_string(max_bytes_) +
                                          " bytes is reached: remove a sequence, raise the limit or use a smaller plan");
  }
  taken_bytes_ += bytes;
}

std::byte* PagePool::carve(Class& size_class, PagePool& pool) {
  const size_t record = size_class.record_bytes;
  if (size_class.regions.empty() || size_class.regions.back().carved_bytes + record > size_class.regions.back().mapped_bytes) {
    const size_t mapped = std::max(kRegionBytes, round_up(record, kHugePage));
    void* base = mmap(nullptr, mapped + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED)
      throw Error(Status::kOutOfMemory,
                  "the system has no memory for another cache region: use a shorter context or a smaller plan");
    // Keep the huge-page aligned part.
    auto* raw = static_cast<std::byte*>(base);
    const auto address = reinterpret_cast<uintptr_t>(raw);
    const size_t skip = round_up(address, kHugePage) - address;
    if (skip != 0) munmap(raw, skip);
    if (skip != kHugePage) munmap(raw + skip + mapped, kHugePage - skip);
    size_class.regions.push_back({raw + skip, mapped, 0, 0});
  }
  Region& region = size_class.regions.back();
  const size_t end = region.carved_bytes + record;
  if (end > region.taken_bytes) {
    // A class that has grown large takes huge pages; a small one stays exact to 64 KiB.
    const bool huge = !returnable(record) && region.taken_bytes % kHugePage == 0 && size_class.live * record >= 32 * kHugePage;
    const size_t target = std::min(region.mapped_bytes, round_up(end, huge ? kHugePage : kStepBytes));
    pool.take(target - region.taken_bytes);
    if (huge) madvise(region.base + region.taken_bytes, target - region.taken_bytes, MADV_HUGEPAGE);
    region.taken_bytes = target;
  }
  std::byte* out = region.base + region.carved_bytes;
  region.carved_bytes = end;
  return out;
}

std::byte* PagePool::allocate(size_t record_bytes) {
  record_bytes = round_up(record_bytes, 64);
  Class& size_class = classes_[record_bytes];
  size_class.record_bytes = record_bytes;
  std::byte* out;
  if (!size_class.free_resident.empty()) {
    out = size_class.free_resident.back();
    size_class.free_resident.pop_back();
  } else if (!size_class.free_released.empty()) {
    take(record_bytes);
    out = size_class.free_released.back();
    size_class.free_released.pop_back();
  } else {
    out = carve(size_class, *this);
  }
  ++size_class.live;
  used_bytes_ += record_bytes;
  return out;
}

void PagePool::add_reference(std::byte* record) { ++extra_references_[record]; }

void PagePool::release(std::byte* record, size_t record_bytes) {
  const auto extra = extra_references_.find(record);
  if (extra != extra_references_.end()) {
    if (--extra->second == 0) extra_references_.erase(extra);
    return;
  }
  record_bytes = round_up(record_bytes, 64);
  Class& size_class = classes_.at(record_bytes);
  size_class.free_resident.push_back(record);
  --size_class.live;
  used_bytes_ -= record_bytes;
}

void PagePool::trim() {
  for (auto& [bytes, size_class] : classes_) {
    if (size_class.live == 0) {
      for (const Region& region : size_class.regions) munmap(region.base, region.mapped_bytes);
      for (const Region& region : size_class.regions) taken_bytes_ -= region.taken_bytes;
      taken_bytes_ += size_class.free_released.size() * bytes;  // was subtracted when released
      size_class.regions.clear();
      size_class.free_resident.clear();
      size_class.free_released.clear();
    } else if (returnable(bytes)) {
      for (std::byte* record : size_class.free_resident) {
        madvise(record, bytes, MADV_DONTNEED);
        size_class.free_released.push_back(record);
        taken_bytes_ -= bytes;
      }
      size_class.free_resident.clear();
    }
  }
}

}  // namespace kvmix
