// Between the host sides of the attention kernels.
#pragma once

#include "attention/cuda/arguments.cuh"
#include "base/cuda/launch.h"
#include "kvmix/kvmix_cuda.h"

namespace kvmix::cuda {

struct DecodeArguments {
  AttendArguments attend;
  Stage stage;
  int row_blocks;  // blocks of an item, each with its share of the query rows
  ThinKeys thin;   // of the kernel for them
};
struct DecodeLaunch {
  int blocks, threads, shared;
  int resident_warps;  // on a multiprocessor
  bool thin;           // at most kFewWarps of them
  bool overlapped;
  void* stream;
};
// Defined for the entries of HeadDims, each in a file that CMake writes (decode_kernel.cu.in), and for trellis codes on a side
// or both (decode_trellis.cu.in).
template <int head_dim>
void launch_decode(const DecodeLaunch& launch, const DecodeArguments& arguments);
template <int head_dim>
void launch_trellis_decode(const DecodeLaunch& launch, const DecodeArguments& arguments);

void launch_prefill(const kvmix_cuda_attend_params& params, const AttendArguments& arguments);
void launch_pages(const kvmix_cuda_attend_params& params, const AttendArguments& arguments);
void launch_thin_pages(const kvmix_cuda_attend_params& params, const AttendArguments& arguments, const ThinKeys& thin);
void launch_fp16(const kvmix_cuda_attend_params& params, const AttendArguments& arguments);
int resident_page_blocks(const kvmix_cuda_format& format, int rows);  // on one multiprocessor
int resident_fp16_blocks(int head_dim);

}  // namespace kvmix::cuda
