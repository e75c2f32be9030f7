// Launches that begin while the one before them in the stream ends (launch_overlapped in base/cuda/launch.h): programmatic
// dependent launch, from compute capability 9.0 on. What comes before wait_for_launch_before may read only what is older than
// the launch before; after a normal launch, and on other devices, it returns at once.
#pragma once

namespace kvmix::cuda {

// Until the launch before has ended and what it wrote can be read.
__device__ inline void wait_for_launch_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}
// Lets the launch after this one begin, once all blocks have called it. Called after wait_for_launch_before, it means that all
// older launches have ended.
__device__ inline void let_next_launch_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

}  // namespace kvmix::cuda
