// Memory at a 64-byte boundary, as tiles and scratch need it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace kvmix {

class AlignedBytes {
 public:
  explicit AlignedBytes(size_t bytes, std::byte fill = std::byte{0}) : storage_(bytes + 64, fill), size_(bytes) {}
  // A copy would start elsewhere in its storage.
  AlignedBytes(AlignedBytes&&) = default;
  AlignedBytes& operator=(AlignedBytes&&) = default;
  std::byte* data() { return storage_.data() + shift(); }
  const std::byte* data() const { return storage_.data() + shift(); }
  size_t size() const { return size_; }
  friend bool operator==(const AlignedBytes& a, const AlignedBytes& b) {
    return a.size_ == b.size_ && std::memcmp(a.data(), b.data(), a.size_) == 0;
  }

 private:
  size_t shift() const { return (64 - reinterpret_cast<uintptr_t>(storage_.data()) % 64) % 64; }
  std::vector<std::byte> storage_;
  size_t size_;
};

}  // namespace kvmix
