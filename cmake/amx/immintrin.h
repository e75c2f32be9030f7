// The compiler's own header for llama.cpp's kernels, mended: GCC before 13.3 declares that ldtilecfg reads 8 bytes of its 64
// and tile loads none of their memory, so what was written there just before is optimised away and the instruction faults.
#pragma once
#include_next <immintrin.h>

#ifdef __AMX_TILE__
static inline __attribute__((always_inline)) void kvmix_tile_loadconfig(const void* config) {
  __asm__ volatile("ldtilecfg\t%X0" ::"m"(*static_cast<const char(*)[64]>(config)));
}
#define _tile_loadconfig(config) kvmix_tile_loadconfig(config)

#undef _tile_loadd_internal
#define _tile_loadd_internal(tile, base, stride)                                                                             \
  __asm__ volatile("tileloadd\t(%0,%1,1), %%tmm" #tile ::"r"(static_cast<const void*>(base)), "r"(static_cast<long>(stride)) \
                   : "memory")
#undef _tile_stream_loadd_internal
#define _tile_stream_loadd_internal(tile, base, stride)                                                                        \
  __asm__ volatile("tileloaddt1\t(%0,%1,1), %%tmm" #tile ::"r"(static_cast<const void*>(base)), "r"(static_cast<long>(stride)) \
                   : "memory")
#endif
