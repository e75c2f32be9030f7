#include "engine/cuda/products.h"

#include <string>

#include "base/cuda/launch.h"
#include "kvmix/error.h"

namespace kvmix::cuda {
namespace {

constexpr int64_t kLeastRows = 3;  // below, kernels that read weights once are faster (row_products.h; ggml's)
constexpr size_t kWorkBytes = size_t{32} << 20;

void check(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw Error(Status::kInternal, std::string(what) + ": " + cublasGetStatusString(status));
}

}  // namespace

Products::Products(cudaStream_t stream) : stream_(stream) {
  check(cublasCreate(&handle_), "cuBLAS");
  check(cublasSetStream(handle_, stream), "cuBLAS: stream");
  work_.reserve(kWorkBytes, "work space of products");
  check(cublasSetWorkspace(handle_, work_.data(), work_.bytes()), "cuBLAS: work space");
}

Products::~Products() {
  if (handle_ != nullptr) static_cast<void>(cublasDestroy(handle_));
}

size_t Products::input_bytes(const ggml_tensor* node) {
  if (node->op != GGML_OP_MUL_MAT) return 0;
  const ggml_tensor *weights = node->src[0], *rows = node->src[1];
  const bool takes = (weights->type == GGML_TYPE_F16 || weights->type == GGML_TYPE_BF16) && rows->type == GGML_TYPE_F32 &&
                     rows->ne[1] >= kLeastRows && ggml_n_dims(weights) <= 2 && ggml_n_dims(rows) <= 2 &&
                     ggml_is_contiguous(weights) && ggml_is_contiguous(rows) && ggml_is_contiguous(node);
  return takes ? static_cast<size_t>(ggml_nelements(rows)) * 2 : 0;
}

bool Products::reserve(size_t bytes) { return input_.reserve(bytes, "rounded rows of products"); }

void Products::queue(const ggml_tensor* node) {
  const ggml_tensor *weights = node->src[0], *rows = node->src[1];
  const bool bf16 = weights->type == GGML_TYPE_BF16;
  if (rounded_ != rows || type_ != weights->type) {
    round_numbers(static_cast<const float*>(rows->data), input_.data(), static_cast<size_t>(ggml_nelements(rows)), bf16,
                  stream_);
    rounded_ = rows, type_ = weights->type;
  }
  const cudaDataType_t type = bf16 ? CUDA_R_16BF : CUDA_R_16F;
  const float one = 1.0f, zero = 0.0f;
  const auto in = static_cast<int>(weights->ne[0]), out = static_cast<int>(weights->ne[1]), n = static_cast<int>(rows->ne[1]);
  check(cublasGemmEx(handle_, CUBLAS_OP_T, CUBLAS_OP_N, out, n, in, &one, weights->data, type, in, input_.data(), type, in,
                     &zero, node->data, CUDA_R_32F, out, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
        "product");
}

}  // namespace kvmix::cuda
