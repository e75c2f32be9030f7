// The bulk copy engine and its barriers in shared memory, from compute capability 9.0 on.
#pragma once

#include <cstdint>

#include "base/cuda/fragments.cuh"

namespace kvmix::cuda {

__device__ inline void init_barrier(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// After init_barrier, before other threads and the copy engine see the barriers.
__device__ inline void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory"); }
__device__ inline void arrive(uint64_t* barrier) {
  asm volatile("{.reg .b64 state; mbarrier.arrive.shared.b64 state, [%0];}\n" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives at a barrier that completes when `bytes` have come besides.
__device__ inline void expect_bytes(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Copies `bytes` from global to shared memory, multiples of 16 all, and counts them at a barrier that expects them.
__device__ inline void copy_bulk(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
// The same with a barrier of one arrival, which completes with them.
__device__ inline void load_bulk(void* to, const void* from, int bytes, uint64_t* barrier) {
  expect_bytes(barrier, bytes);
  copy_bulk(to, from, bytes, barrier);
}
// The other way; wait_stores waits until this thread's copies are done.
__device__ inline void store_bulk(void* to, const void* from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n" ::"l"(to), "r"(shared_address(from)), "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
}
__device__ inline void wait_stores() { asm volatile("cp.async.bulk.wait_group 0;\n" ::: "memory"); }
__device__ inline void wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{.reg .pred done;\n"
      "again%=: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again%=;}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

}  // namespace kvmix::cuda
