// Warpgroup matrix instructions of compute capability 9.0 (sm_90a) and their operands in shared memory.
#pragma once

#include <cstdint>

#include "base/cuda/fragments.cuh"

namespace kvmix::cuda {

// A K-major operand of `rows` rows in shared memory, in panels of 64 halves a row: 16-byte units of a row of 128 bytes stand
// XOR the row, which the matrix unit knows as its 128-byte swizzle. A panel starts at a multiple of 1024 bytes.
__device__ constexpr int panel_bytes(int rows) { return rows * 128; }
__device__ inline int swizzled(int rows, int row, int column) {  // bytes
  return column / 64 * panel_bytes(rows) + row * 128 + ((column / 8 % 8) ^ (row % 8)) * 16 + column % 8 * 2;
}
// Describes such an operand; `address` of its first row and column.
__device__ inline uint64_t operand(uint32_t address) {
  constexpr uint64_t kSwizzle128 = 1ull << 62, kEightRows = 1024 / 16;
  return kSwizzle128 | kEightRows << 32 | 1ull << 16 | (address & 0x3ffffu) >> 4;
}
// How much further the descriptor of the `step`-th 16 columns lies.
__device__ constexpr uint64_t operand_step(int rows, int step) {
  return static_cast<uint64_t>((step / 4 * panel_bytes(rows) + step % 4 * 32) / 16);
}

#define KVMIX_R8(d, i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define KVMIX_R32(d, i) KVMIX_R8(d, i), KVMIX_R8(d, i + 8), KVMIX_R8(d, i + 16), KVMIX_R8(d, i + 24)
#define KVMIX_D32 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define KVMIX_D48 KVMIX_D32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define KVMIX_D64 KVMIX_D48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// d (64 rows a warpgroup, n columns) = A B^T, or += ; both operands in shared memory.
__device__ inline void multiply(float (&d)[32], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" KVMIX_D32 "}, %32, %33, p, 1, 1, 0, 0;}\n"
      : KVMIX_R32(d, 0)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}
__device__ inline void multiply(float (&d)[64], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" KVMIX_D64 "}, %64, %65, p, 1, 1, 0, 0;}\n"
      : KVMIX_R32(d, 0), KVMIX_R32(d, 32)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}
// d += A B^T with A in registers.
__device__ inline void multiply_add(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{.reg .pred p; setp.eq.b32 p, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" KVMIX_D32 "}, {%32,%33,%34,%35}, %36, p, 1, 1, 0;}\n"
      : KVMIX_R32(d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ inline void multiply_add(float (&d)[48], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{.reg .pred p; setp.eq.b32 p, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n96k16.f32.f16.f16 {" KVMIX_D48 "}, {%48,%49,%50,%51}, %52, p, 1, 1, 0;}\n"
      : KVMIX_R32(d, 0), KVMIX_R8(d, 32), KVMIX_R8(d, 40)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ inline void multiply_add(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{.reg .pred p; setp.eq.b32 p, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" KVMIX_D64 "}, {%64,%65,%66,%67}, %68, p, 1, 1, 0;}\n"
      : KVMIX_R32(d, 0), KVMIX_R32(d, 32)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#undef KVMIX_R8
#undef KVMIX_R32
#undef KVMIX_D32
#undef KVMIX_D48
#undef KVMIX_D64

__device__ inline void matrix_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ inline void matrix_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
template <int pending>
__device__ inline void matrix_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(pending) : "memory");
}
// Keeps the compiler from moving accesses to registers that a matrix instruction under way reads or writes.
template <int n>
__device__ inline void hold(float (&v)[n]) {
#pragma unroll
  for (float& x : v) asm volatile("" : "+f"(x)::"memory");
}
// Lets the matrix unit see what this thread stored to shared memory; before the barrier that tells others.
__device__ inline void publish_stores() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

template <int registers>
__device__ inline void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(registers));
}
template <int registers>
__device__ inline void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(registers));
}

// Four 8 x 8 tiles of fp16, each register a tile; lane l gives the address of row l % 8 of tile l / 8. The compiler may move
// other accesses across it: publish_stores keeps it before.
__device__ inline void store_tiles(uint32_t address, const uint32_t (&a)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};\n" ::"r"(address), "r"(a[0]), "r"(a[1]),
               "r"(a[2]), "r"(a[3]));
}

}  // namespace kvmix::cuda
