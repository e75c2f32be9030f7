// The bulk copy engine and its barriers in shared memory, from compute capability 9.0 on. Shared memory is named by its address
// (shared_address).
#pragma once

#include <cstdint>

#include "base/cuda/fragments.cuh"

namespace kvmix::cuda {

__device__ inline void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After init_barrier, before other threads and the copy engine see the barriers.
__device__ inline void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory"); }
__device__ inline void arrive(uint32_t barrier) {
  asm volatile("{.reg .b64 state; mbarrier.arrive.shared.b64 state, [%0];}\n" ::"r"(barrier) : "memory");
}
// Arrives at a barrier that completes when `bytes` have come besides.
__device__ inline void expect_bytes(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}
// Copies `bytes` from global to shared memory, multiples of 16 all, and counts them at a barrier that expects them.
__device__ inline void copy_bulk(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(to), "l"(from),
               "r"(bytes), "r"(barrier)
               : "memory");
}
// What the L2 does with what a copy reads. What is read `once` leaves it before what else is there, which is the code of other
// kernels too.
__device__ inline uint64_t copy_policy(bool once) {
  uint64_t policy;
  if (once) {
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;\n" : "=l"(policy));
  } else {
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;\n" : "=l"(policy));
  }
  return policy;
}
__device__ inline void copy_bulk(uint32_t to, const void* from, int bytes, uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;\n" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}
// A copy with a barrier of one arrival, which completes with it.
__device__ inline void load_bulk(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  expect_bytes(barrier, bytes);
  copy_bulk(to, from, bytes, barrier);
}
// The other way; wait_stores waits until this thread's copies are done.
__device__ inline void store_bulk(void* to, uint32_t from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n" ::"l"(to), "r"(from), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
}
__device__ inline void wait_stores() { asm volatile("cp.async.bulk.wait_group 0;\n" ::: "memory"); }
__device__ inline void wait(uint32_t barrier, int parity) {
  asm volatile(
      "{.reg .pred done;\n"
      "again%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again%=;}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

}  // namespace kvmix::cuda
