// Launch of the prefill kernel.
#include <cuda_runtime.h>

#include "attention/launch_cuda.h"
#include "attention/prefill_cuda.cuh"

namespace kvmix::cuda {
namespace {

template <int dim>
void launch(const kvmix_cuda_attend_params& p, const AttendArguments& arguments) {
  constexpr int kShared = PrefillTile<dim>::shared_bytes;
  allow_shared(prefill_kernel<dim>, kShared, "attend: shared memory");
  const RecordShape shape = record_shape(p.format);
  const int rows = arguments.group * arguments.q_tokens;
  const dim3 grid(static_cast<unsigned>(p.item_count), static_cast<unsigned>((rows + kPrefillRows - 1) / kPrefillRows));
  prefill_kernel<dim><<<grid, kPrefillThreads, kShared, static_cast<cudaStream_t>(p.stream)>>>(
      PrefillArguments{arguments, shape.key(), shape.value(), shape.key_bytes()});
  check_cuda(cudaGetLastError(), "attend: launch");
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
  switch (p.format.head_dim) {
    case 64:
      return launch<64>(p, arguments);
    case 96:
      return launch<96>(p, arguments);
    case 128:
      return launch<128>(p, arguments);
    default:
      return launch<256>(p, arguments);
  }
}

}  // namespace kvmix::cuda
