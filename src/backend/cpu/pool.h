// The page pool: records of a few fixed sizes out of large mappings. It knows bytes, not codecs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

namespace kvmix {

inline constexpr size_t kSystemPage = 4096;

// Not thread safe. Records are 64-byte aligned and stay where they are.
class PagePool {
 public:
  explicit PagePool(size_t max_bytes) : max_bytes_(max_bytes) {}
  ~PagePool();
  PagePool(const PagePool&) = delete;
  PagePool& operator=(const PagePool&) = delete;

  // Throws kOutOfMemory at the limit or when the system refuses.
  std::byte* allocate(size_t record_bytes);
  void release(std::byte* record, size_t record_bytes);

  // Hands the system pages that no record uses any more back, those inside huge pages with the whole of one.
  void trim();

  // The most that records of one size, this many bytes in all and none released, take from the system beyond their own bytes.
  static size_t most_slack(size_t record_bytes, size_t bytes);

  size_t used_bytes() const { return used_bytes_; }
  size_t taken_bytes() const { return taken_bytes_; }  // from the system, used or not

 private:
  struct Region {
    std::byte* base;
    size_t mapped_bytes, carved_bytes;
    bool huge;                   // huge pages were asked for
    std::vector<uint8_t> users;  // live records of each system page taken so far
    std::vector<bool> resident;  // taken from the system, and not given back
  };
  struct Class {
    size_t record_bytes = 0;
    std::vector<Region> regions;
    std::vector<std::byte*> free;       // records to use again
    std::vector<std::byte*> untrimmed;  // released since the last trim
    size_t live = 0;
  };

  void take(size_t bytes);
  std::byte* carve(Class& size_class);
  void trim_huge(Region& region, const std::byte* record, size_t bytes);
  static Region& region_of(Class& size_class, const std::byte* record);

  size_t max_bytes_, used_bytes_ = 0, taken_bytes_ = 0;
  std::map<size_t, Class> classes_;
};

}  // namespace kvmix
