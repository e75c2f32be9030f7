// What host and CUDA device code share.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define KVMIX_HOST_DEVICE __host__ __device__
#else
#define KVMIX_HOST_DEVICE
#endif

namespace kvmix {

KVMIX_HOST_DEVICE inline float bits_to_float(uint32_t bits) {
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

KVMIX_HOST_DEVICE inline uint32_t float_to_bits(float f) {
  uint32_t bits;
  memcpy(&bits, &f, sizeof bits);
  return bits;
}

}  // namespace kvmix
