// The attention kernels, best first. One line adds a kernel.
#include <array>

#include "attention/kernel.h"

namespace kvmix {

extern const AttentionKernel kPortableKernel;

namespace {

const std::array kKernels = {
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
