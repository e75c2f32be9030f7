// Launch of the page kernel.
#include <string>

#include "attention/cuda/launch.h"
#include "attention/cuda/pages.cuh"

namespace kvmix::cuda {
namespace {

// Calls body with the kernel for a format and number of query rows, and its shared memory.
template <bool thin, class Body>
void with_kernel(const kvmix_cuda_format& format, int rows, const Body& body) {
  const bool few = rows <= kWarpRows, trellis = has_trellis(format);
  const int head_dim = format.head_dim;
  const bool known = HeadDims::visit(head_dim, [&](auto dim) {
    const auto take = [&](auto with) {
      body(few ? page_kernel<dim, true, thin, with> : page_kernel<dim, false, thin, with>, PageTile<dim>::shared_bytes);
    };
    trellis ? take(std::true_type{}) : take(std::false_type{});
  });
  if (!known) throw Error(Status::kUnsupported, "attend: head_dim " + std::to_string(head_dim) + " has no page kernel");
}

template <bool thin>
void launch(const kvmix_cuda_attend_params& p, const AttendArguments& arguments, const ThinKeys& keys) {
  const int rows = arguments.group * arguments.q_tokens;
  const ThinShape shape{record_shape(p.format), keys.width};
  with_kernel<thin>(p.format, rows, [&](auto* kernel, int shared) {
    allow_shared(kernel, shared, "attend: shared memory");
    const dim3 grid(static_cast<unsigned>(p.item_count), static_cast<unsigned>((rows + kTileRows - 1) / kTileRows));
    kernel<<<grid, kThreads, static_cast<size_t>(shared), static_cast<cudaStream_t>(p.stream)>>>(
        PageArguments{arguments, shape.key(), shape.value(), shape.key_bytes(), keys});
    check_cuda(cudaGetLastError(), "attend: launch");
  });
}

}  // namespace

void launch_pages(const kvmix_cuda_attend_params& p, const AttendArguments& arguments) { launch<false>(p, arguments, {}); }
void launch_thin_pages(const kvmix_cuda_attend_params& p, const AttendArguments& arguments, const ThinKeys& keys) {
  launch<true>(p, arguments, keys);
}

int resident_page_blocks(const kvmix_cuda_format& format, int rows) {
  int blocks = 0;
  with_kernel<false>(format, rows, [&](auto* kernel, int shared) { blocks = blocks_on_processor(kernel, kThreads, shared); });
  return blocks;
}

}  // namespace kvmix::cuda
