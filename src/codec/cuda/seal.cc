// Checks of what is sealed and appended.
#include "codec/cuda/seal.h"

#include "codec/cuda/format.h"

namespace kvmix::cuda {

void check_seal(const kvmix_cuda_seal_params& p) {
  check_format(p.format);
  require(p.pages >= 0, "seal: pages " + std::to_string(p.pages) + " is negative");
  require(p.kv_heads > 0 && p.kv_heads <= 65535, "seal: kv_heads " + std::to_string(p.kv_heads) + " not in 1..65535");
  for (const kvmix_cuda_transform* t : {&p.key_transform, &p.value_transform}) {
    require(t->scales == nullptr || t->hadamard != 0, "seal: scales belong to a Hadamard transform");
  }
  require(p.value_transform.center == nullptr, "seal: centring is for keys only");
}

void check_append(const kvmix_cuda_append_params& p) {
  require(p.rows >= 0, "append: rows " + std::to_string(p.rows) + " is negative");
  require(p.kv_heads > 0 && p.kv_heads <= 65535, "append: kv_heads " + std::to_string(p.kv_heads) + " not in 1..65535");
  require(p.head_dim > 0 && p.head_dim % 8 == 0 && p.head_dim <= 1024,
          "append: head_dim " + std::to_string(p.head_dim) + " is not a multiple of 8 up to 1024");
}

#ifndef KVMIX_CUDA
namespace {
[[noreturn]] void no_cuda() {
  throw Error(Status::kUnsupported, "CUDA is not available in this build; configure with -DKVMIX_CUDA=ON");
}
}  // namespace
void seal(const kvmix_cuda_seal_params&, const SealDetails&) { no_cuda(); }
void append(const kvmix_cuda_append_params&) { no_cuda(); }
#endif

}  // namespace kvmix::cuda
