// Asks for memory before it is read.
#pragma once

namespace kvmix {

inline void fetch_ahead(const void* memory) {
  __builtin_prefetch(memory);
  asm volatile("");  // GCC 12 takes a function that does nothing else for one without effect and leaves its calls out
}

}  // namespace kvmix
