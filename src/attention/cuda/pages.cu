// Launch of the page kernel.
#include <cuda_runtime.h>

#include "attention/cuda/launch.h"
#include "attention/cuda/pages.cuh"
#include "attention/cuda/support.h"

namespace kvmix::cuda {
namespace {

// Calls body with the kernel for a format and number of query rows, and its shared memory.
template <class Body>
void with_kernel(int head_dim, int rows, const Body& body) {
  const bool few = rows <= kWarpRows;
  switch (head_dim) {
    case 64:
      return body(few ? page_kernel<64, true> : page_kernel<64, false>, PageTile<64>::shared_bytes);
    case 96:
      return body(few ? page_kernel<96, true> : page_kernel<96, false>, PageTile<96>::shared_bytes);
    case 128:
      return body(few ? page_kernel<128, true> : page_kernel<128, false>, PageTile<128>::shared_bytes);
    default:
      return body(few ? page_kernel<256, true> : page_kernel<256, false>, PageTile<256>::shared_bytes);
  }
}

}  // namespace

void launch_pages(const kvmix_cuda_attend_params& p, const AttendArguments& arguments) {
  const int rows = arguments.group * arguments.q_tokens;
  const RecordShape shape = record_shape(p.format);
  with_kernel(p.format.head_dim, rows, [&](auto* kernel, int shared) {
    allow_shared(kernel, shared, "attend: shared memory");
    const dim3 grid(static_cast<unsigned>(p.item_count), static_cast<unsigned>((rows + kTileRows - 1) / kTileRows));
    kernel<<<grid, kThreads, static_cast<size_t>(shared), static_cast<cudaStream_t>(p.stream)>>>(
        PageArguments{arguments, shape.key(), shape.value(), shape.key_bytes()});
    check_cuda(cudaGetLastError(), "attend: launch");
  });
}

int resident_page_blocks(int head_dim, int rows) {
  int blocks = 0;
  with_kernel(head_dim, rows, [&](auto* kernel, int shared) { blocks = blocks_on_processor(kernel, kThreads, shared); });
  return blocks;
}

}  // namespace kvmix::cuda
