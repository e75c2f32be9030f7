// Launch of the decode kernel of fp16 pages.
#include <string>

#include "attention/cuda/fp16_pages.cuh"
#include "attention/cuda/launch.h"

namespace kvmix::cuda {
namespace {

template <class Body>
void with_kernel(int head_dim, const Body& body) {
  if (!HeadDims::visit(head_dim, [&](auto dim) { body(fp16_kernel<dim>, fp16_shared_bytes(dim)); }))
    throw Error(Status::kUnsupported, "attend: head_dim " + std::to_string(head_dim) + " has no kernel of fp16 pages");
}

}  // namespace

void launch_fp16(const kvmix_cuda_attend_params& p, const AttendArguments& arguments) {
  const int blocks = row_blocks(p);
  with_kernel(p.format.head_dim, [&](auto* kernel, int shared) {
    allow_shared(kernel, shared, "attend: shared memory");
    launch_overlapped(arguments.overlapped, kernel, dim3(static_cast<unsigned>(p.item_count * blocks)), kThreads,
                      static_cast<size_t>(shared), static_cast<cudaStream_t>(p.stream),
                      Fp16Arguments{arguments, record_shape(p.format).key_bytes(), blocks}, "attend: launch");
  });
}

int resident_fp16_blocks(int head_dim) {
  int blocks = 0;
  with_kernel(head_dim, [&](auto* kernel, int shared) { blocks = blocks_on_processor(kernel, kThreads, shared); });
  return blocks;
}

}  // namespace kvmix::cuda
