// Launch of the prefill kernel.
#include <string>

#include "attention/cuda/launch.h"
#include "attention/cuda/prefill.cuh"

namespace kvmix::cuda {
namespace {

template <auto kernel>
void launch(dim3 grid, int threads, int shared, const PrefillArguments& arguments, void* stream) {
  allow_shared(kernel, shared, "attend: shared memory");
  kernel<<<grid, static_cast<unsigned>(threads), static_cast<size_t>(shared), static_cast<cudaStream_t>(stream)>>>(arguments);
  check_cuda(cudaGetLastError(), "attend: launch");
}

template <int dim, bool trellis>
void launch(const kvmix_cuda_attend_params& p, const AttendArguments& arguments) {
  using Tile = PrefillTile<dim>;
  constexpr int kImageBlocks = 2048;  // about; several for each place on a device
  const RecordShape shape = record_shape(p.format);
  const PrefillArguments a{arguments, shape.key(), shape.value(), shape.key_bytes(),
                           reinterpret_cast<uint8_t*>(arguments.partial_sums)};
  const int rows = arguments.group * arguments.q_tokens;
  const dim3 grid(static_cast<unsigned>(p.item_count), static_cast<unsigned>((rows + kPrefillRows - 1) / kPrefillRows));
  if (!uses_images(p))
    return launch<prefill_kernel<dim, false, trellis>>(grid, kPrefillThreads, Tile::shared_bytes, a, p.stream);
  const dim3 image_grid(grid.x, static_cast<unsigned>((kImageBlocks + p.item_count - 1) / p.item_count));
  launch<image_kernel<dim, trellis>>(image_grid, kImageThreads, Tile::part_bytes + 1024, a, p.stream);
  launch<prefill_kernel<dim, true, false>>(grid, kPrefillThreads, Tile::shared_bytes, a, p.stream);
}

}  // namespace

bool has_prefill_kernel() {
#ifdef KVMIX_CUDA_90A
  int device = 0, major = 0, minor = 0;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess;
  if (!known) static_cast<void>(cudaGetLastError());  // no device: nothing to launch
  return known && major == 9 && minor == 0;
#else
  return false;
#endif
}

void launch_prefill(const kvmix_cuda_attend_params& p, const AttendArguments& arguments) {
  const bool trellis = has_trellis(p.format);
  const bool known = HeadDims::visit(
      p.format.head_dim, [&](auto dim) { trellis ? launch<dim, true>(p, arguments) : launch<dim, false>(p, arguments); });
  if (!known)
    throw Error(Status::kUnsupported, "attend: head_dim " + std::to_string(p.format.head_dim) + " has no prefill kernel");
}

}  // namespace kvmix::cuda
