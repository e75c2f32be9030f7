// Registers of the matrix instruction mma.m16n8k16 and the arithmetic on pairs of fp16 around it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace kvmix::cuda {

__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline uint32_t transpose(uint32_t v) {
  uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(out) : "r"(v));
  return out;
}
__device__ inline __half2 half2_of(uint32_t v) { return reinterpret_cast<const __half2&>(v); }
__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
__device__ inline uint32_t pack(float low, float high) {
  const __half2 h = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(h);
}
__device__ inline uint32_t multiply(uint32_t a, uint32_t b) {
  const __half2 r = __hmul2(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
  return reinterpret_cast<const uint32_t&>(r);
}
__device__ inline float half_bits(uint32_t v) { return __half2float(__ushort_as_half(static_cast<unsigned short>(v))); }
__device__ constexpr uint32_t both(uint32_t v) { return v | (v << 16); }
// fp16 bits of 2^e, e in [-14, 15]
__device__ inline uint32_t power_half(int e) { return both(static_cast<uint32_t>(e + 15) << 10); }
// The same for e in [-24, 15], subnormal numbers included.
__device__ inline uint32_t power_half_from_24(int e) { return e >= -14 ? power_half(e) : both(1u << (e + 24)); }
__device__ inline float power(int e) { return __int_as_float((e + 127) << 23); }
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float tanh_fast(float x) { return 1.0f - __fdividef(2.0f, exp2_fast(2.885390081777927f * x) + 1.0f); }

__device__ inline uint32_t f16_of_bf16(uint32_t v) {  // two of them; finite values beyond fp16 saturate
  const auto limited = [](float x) { return fabsf(x) < INFINITY ? fminf(fmaxf(x, -65504.0f), 65504.0f) : x; };
  return pack(limited(__uint_as_float(v << 16)), limited(__uint_as_float(v & 0xffff0000u)));
}

// Four 8 x 8 tiles of fp16 as registers: lane 4 r + j holds elements 2 j and 2 j + 1 of row r, or of column r. Lane l gives the
// address of row l % 8 of tile l / 8 in shared memory.
__device__ inline void load_tiles(uint32_t row, bool columns, uint32_t (&v)[4]) {
  if (columns) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(row));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(row));
  }
}

}  // namespace kvmix::cuda
