// Products with weights of 16 bits by cuBLAS, for steps of several rows: fp32 rows are rounded to the weights' type, sums and
// results are fp32. ggml's kernels take 1.2 to 1.8 times as long there.
#pragma once

#include <cublas_v2.h>
#include <cuda_runtime.h>
#include <ggml.h>

#include <cstddef>

#include "backend/cuda/memory.h"

namespace kvmix::cuda {

class Products {
 public:
  explicit Products(cudaStream_t stream);
  Products(const Products&) = delete;
  Products& operator=(const Products&) = delete;
  ~Products();

  // Room that a node's rows take; 0 for one that is ggml's to compute.
  static size_t input_bytes(const ggml_tensor* node);
  // True where the memory is new. Throws kOutOfMemory.
  bool reserve(size_t bytes);
  void begin() { rounded_ = nullptr; }  // of a step
  void queue(const ggml_tensor* node);

 private:
  cudaStream_t stream_;
  cublasHandle_t handle_ = nullptr;
  DeviceMemory work_, input_;
  const ggml_tensor* rounded_ = nullptr;  // whose rows are in input_: query, key and value projections share theirs
  ggml_type type_ = GGML_TYPE_F16;
};

// n numbers to fp16, or bf16.
void round_numbers(const float* from, void* to, size_t n, bool bf16, cudaStream_t stream);

}  // namespace kvmix::cuda
