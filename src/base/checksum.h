// FNV-1a over 64-bit words: finds damage in files, no defence against intent.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace kvmix {

class Checksum {
 public:
  void update(const void* data, size_t bytes) {
    const auto* p = static_cast<const unsigned char*>(data);
    for (; bytes >= 8; p += 8, bytes -= 8) {
      uint64_t word;
      std::memcpy(&word, p, 8);
      mix(word);
    }
    for (; bytes > 0; ++p, --bytes) mix(*p);
  }
  uint64_t value() const { return state_; }

 private:
  void mix(uint64_t word) {
    state_ = (state_ ^ word) * 0x100000001b3u;
    state_ ^= state_ >> 29;
  }
  uint64_t state_ = 0xcbf29ce484222325u;
};

}  // namespace kvmix
