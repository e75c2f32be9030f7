// The attention kernels, best first. One line adds a kernel.
#include <array>

#include "attention/cpu/kernel.h"

namespace kvmix {

#if defined(KVMIX_SIMD)
extern const AttentionKernel kAvx512VnniKernel;
extern const AttentionKernel kAvx512Bf16Kernel;
extern const AttentionKernel kAvxVnniKernel;
extern const AttentionKernel kAvx2Kernel;
#endif
extern const AttentionKernel kPortableKernel;

namespace {

const std::array kKernels = {
#if defined(KVMIX_SIMD)
    &kAvx512VnniKernel, &kAvx512Bf16Kernel, &kAvxVnniKernel, &kAvx2Kernel,
#endif
    &kPortableKernel,
};

}  // namespace

std::span<const AttentionKernel* const> attention_kernel_registry() { return kKernels; }

std::vector<AttentionKernelInfo> attention_kernels() {
  std::vector<AttentionKernelInfo> infos;
  for (const AttentionKernel* kernel : kKernels) infos.push_back({kernel->name, kernel->description, kernel->available()});
  return infos;
}

}  // namespace kvmix
