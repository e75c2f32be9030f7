// The device of this process and checked calls to it.
#pragma once

#include <string>

namespace kvmix::cuda {

// Throws kUnsupported where no cache can be on a CUDA device: a build without CUDA, no driver or one that is too old, no GPU.
// The message says which and what to do.
void check_device();

}  // namespace kvmix::cuda
