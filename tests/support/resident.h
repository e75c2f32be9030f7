// Resident memory of this process.
#pragma once

#include <unistd.h>

#include <cstddef>
#include <fstream>

namespace kvmix::testing {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr bool kSanitized = true;  // resident memory is then mostly the sanitizer's
#else
inline constexpr bool kSanitized = false;
#endif

inline size_t resident_bytes() {
  std::ifstream file("/proc/self/statm");
  size_t size = 0, resident = 0;
  file >> size >> resident;
  return resident * static_cast<size_t>(sysconf(_SC_PAGESIZE));
}

}  // namespace kvmix::testing
