// How the decode kernel brings records to shared memory.
#pragma once

#include "attention/cuda/arguments.cuh"
#include "base/cuda/async_copy.cuh"
#include "base/cuda/bulk_copy.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define KVMIX_BULK 1
#else
#define KVMIX_BULK 0
#endif

namespace kvmix::cuda {

// Copies of record halves (keys, then values) into a warp's own buffers, each waited for before the next of its side starts.
// With compute capability 9 one lane asks the bulk copy engine and a barrier in shared memory counts the bytes; before, every
// lane copies 16 bytes at a time.
// The engine asks the L2 for whole lines where source and destination share their place in a 128-byte line, else for 32 bytes
// at a time, and the L2 then limits the rate. So buffers start at lines, and the copy of values starts at the line's beginning,
// value_shift bytes before them; records at multiples of 128 bytes do the rest.
class PageCopies {
 public:
  // With `once` nobody else reads what is copied (copy_policy).
  __device__ PageCopies(const Stage& stage, uint8_t* ring, int lane, int warp, bool once)
      : stage_(stage), ring_(ring), lane_(lane) {
#if KVMIX_BULK
    policy_ = copy_policy(once);
    __shared__ uint64_t barriers[2 * kMaxWarps];
    barriers_ = shared_address(barriers + 2 * warp);
    if (lane == 0) {
      init_barrier(barriers_, 1), init_barrier(barriers_ + 8, 1);
      publish_barriers();
    }
    __syncwarp();
#else
    static_cast<void>(warp), static_cast<void>(once);
#endif
  }

  // After __syncwarp, once all lanes have read what stood there. `record` is null where there is nothing to copy.
  __device__ void start(const uint8_t* record, bool keys) {
    const int bytes = keys ? stage_.key_bytes : stage_.value_bytes;
    uint8_t* const to = ring_ + (keys ? 0 : stage_.key_pitch);
    const int begin = keys ? 0 : stage_.value_begin;
#if KVMIX_BULK
    if (record == nullptr || lane_ != 0) return;
    const uint32_t barrier = barriers_ + (keys ? 0 : 8);
    expect_bytes(barrier, bytes);
    copy_bulk(shared_address(to), record + begin, bytes, barrier, policy_);
#else
    if (record != nullptr) {
#pragma unroll 4
      for (int at = lane_ * 16; at < bytes; at += 512) copy_async(to + at, record + begin + at);
    }
    commit_copies();
#endif
  }

  // Until the copy of a side has arrived for all lanes.
  __device__ void wait(bool keys) {
#if KVMIX_BULK
    const uint32_t bit = keys ? 1u : 2u;
    const int phase = (phases_ & bit) != 0 ? 1 : 0;
    phases_ ^= bit;
    cuda::wait(barriers_ + (keys ? 0 : 8), phase);
#else
    wait_copies<1>();
    __syncwarp();
#endif
  }

 private:
  const Stage& stage_;
  uint8_t* ring_;
  int lane_;
#if KVMIX_BULK
  uint32_t barriers_, phases_ = 0;
  uint64_t policy_;
#endif
};

}  // namespace kvmix::cuda
