#include "backend/cpu/pool.h"

#include <sys/mman.h>

#include <algorithm>
#include <string>

#include "kvmix/error.h"

namespace kvmix {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kRegionBytes = size_t{64} << 20;  // of address space; memory is taken as records are carved
constexpr size_t kHugeFrom = 32 * kHugePage;

size_t round_up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// System pages that a record touches, from the start of its region: [first, last].
struct PageSpan {
  size_t first, last;
};
PageSpan pages_of(const std::byte* region, const std::byte* record, size_t bytes) {
  const auto offset = static_cast<size_t>(record - region);
  return {offset / kSystemPage, (offset + bytes - 1) / kSystemPage};
}

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

// A record that no one had yet.
std::byte* PagePool::carve(Class& size_class) {
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
    size_class.regions.push_back({raw + skip, mapped, 0, false, {}, {}});
  }
  Region& region = size_class.regions.back();
  const size_t end = region.carved_bytes + record, taken = region.users.size() * kSystemPage;
  if (end > taken) {
    // A class that has grown large takes huge pages, unless its records can be given back one by one; a small one stays exact
    // to a system page.
    const bool huge = record % kSystemPage != 0 && taken % kHugePage == 0 && size_class.live * record >= kHugeFrom;
    const size_t target = std::min(region.mapped_bytes, round_up(end, huge ? kHugePage : kSystemPage));
    take(target - taken);
    if (huge) madvise(region.base + taken, target - taken, MADV_HUGEPAGE);
    region.huge = region.huge || huge;
    region.users.resize(target / kSystemPage, 0);
    region.resident.resize(target / kSystemPage, true);
  }
  std::byte* out = region.base + region.carved_bytes;
  region.carved_bytes = end;
  return out;
}

size_t PagePool::most_slack(size_t record_bytes, size_t bytes) {
  if (bytes == 0) return 0;
  const size_t step = record_bytes % kSystemPage != 0 && bytes >= kHugeFrom ? kHugePage : kSystemPage;
  // A full region ends with room for less than a record.
  return step + bytes / kRegionBytes * (record_bytes + kSystemPage);
}

PagePool::Region& PagePool::region_of(Class& size_class, const std::byte* record) {
  return *std::find_if(size_class.regions.begin(), size_class.regions.end(),
                       [record](const Region& r) { return record >= r.base && record < r.base + r.mapped_bytes; });
}

std::byte* PagePool::allocate(size_t record_bytes) {
  record_bytes = round_up(record_bytes, 64);
  Class& size_class = classes_[record_bytes];
  size_class.record_bytes = record_bytes;
  const bool fresh = size_class.free.empty();
  std::byte* out = fresh ? carve(size_class) : size_class.free.back();
  Region& region = region_of(size_class, out);
  const PageSpan span = pages_of(region.base, out, record_bytes);
  size_t missing = 0;
  for (size_t p = span.first; p <= span.last; ++p) missing += region.resident[p] ? 0 : 1;
  if (missing > 0) take(missing * kSystemPage);
  if (!fresh) size_class.free.pop_back();
  for (size_t p = span.first; p <= span.last; ++p) {
    region.resident[p] = true;
    ++region.users[p];
  }
  ++size_class.live;
  used_bytes_ += record_bytes;
  return out;
}

void PagePool::release(std::byte* record, size_t record_bytes) {
  record_bytes = round_up(record_bytes, 64);
  Class& size_class = classes_.at(record_bytes);
  Region& region = region_of(size_class, record);
  const PageSpan span = pages_of(region.base, record, record_bytes);
  for (size_t p = span.first; p <= span.last; ++p) --region.users[p];
  size_class.free.push_back(record);
  size_class.untrimmed.push_back(record);
  --size_class.live;
  used_bytes_ -= record_bytes;
}

// Gives back huge pages that a freed record touched and that no record uses. They come back as small ones, so that what is
// resident stays what is accounted.
void PagePool::trim_huge(Region& region, const std::byte* record, size_t bytes) {
  constexpr size_t kPages = kHugePage / kSystemPage;
  const PageSpan span = pages_of(region.base, record, bytes);
  for (size_t first = span.first / kPages * kPages; first <= span.last; first += kPages) {
    const size_t end = std::min(first + kPages, region.users.size());
    size_t resident = 0;
    bool idle = true;
    for (size_t p = first; p < end && idle; ++p) {
      idle = region.users[p] == 0;
      resident += region.resident[p] ? 1 : 0;
    }
    if (!idle || resident == 0) continue;
    std::fill(region.resident.begin() + static_cast<ptrdiff_t>(first), region.resident.begin() + static_cast<ptrdiff_t>(end),
              false);
    std::byte* at = region.base + first * kSystemPage;
    madvise(at, (end - first) * kSystemPage, MADV_DONTNEED);
    madvise(at, (end - first) * kSystemPage, MADV_NOHUGEPAGE);
    taken_bytes_ -= resident * kSystemPage;
  }
}

void PagePool::trim() {
  for (auto& [bytes, size_class] : classes_) {
    if (size_class.live == 0) {
      for (const Region& region : size_class.regions) {
        munmap(region.base, region.mapped_bytes);
        taken_bytes_ -= static_cast<size_t>(std::count(region.resident.begin(), region.resident.end(), true)) * kSystemPage;
      }
      size_class.regions.clear();
      size_class.free.clear();
    } else {
      for (const std::byte* record : size_class.untrimmed) {
        Region& region = region_of(size_class, record);
        if (region.huge) {
          trim_huge(region, record, bytes);
          continue;
        }
        const PageSpan span = pages_of(region.base, record, bytes);
        const auto idle = [&](size_t p) { return region.users[p] == 0 && region.resident[p]; };
        for (size_t p = span.first; p <= span.last; ++p) {
          if (!idle(p)) continue;
          size_t end = p;
          for (; end <= span.last && idle(end); ++end) region.resident[end] = false;
          madvise(region.base + p * kSystemPage, (end - p) * kSystemPage, MADV_DONTNEED);
          taken_bytes_ -= (end - p) * kSystemPage;
          p = end;
        }
      }
    }
    size_class.untrimmed.clear();
  }
}

}  // namespace kvmix
