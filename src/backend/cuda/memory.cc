#include "backend/cuda/memory.h"

#include <algorithm>
#include <string>

#include "base/cuda/launch.h"
#include "kvmix/error.h"

namespace kvmix::cuda {
namespace {

size_t roomy(size_t bytes) { return (bytes + bytes / 4 + 4095) / 4096 * 4096; }

void check_memory(cudaError_t status, size_t bytes, const char* what) {
  if (status == cudaErrorMemoryAllocation) {
    static_cast<void>(cudaGetLastError());  // it is said here
    throw Error(Status::kOutOfMemory, std::string(what) + ": no " + std::to_string(bytes) +
                                          " bytes are left for it; use fewer sequences, shorter chunks or a smaller plan");
  }
  check_cuda(status, what);
}

}  // namespace

bool DeviceMemory::reserve(size_t bytes, const char* what) {
  if (bytes <= bytes_) return false;
  check_cuda(cudaFree(std::exchange(data_, nullptr)), what);
  bytes_ = 0;
  check_memory(cudaMalloc(&data_, roomy(bytes)), roomy(bytes), what);
  bytes_ = roomy(bytes);
  return true;
}

bool PinnedMemory::reserve(size_t bytes, const char* what) {
  if (bytes <= bytes_) return false;
  check_cuda(cudaFreeHost(std::exchange(data_, nullptr)), what);
  bytes_ = 0;
  check_memory(cudaMallocHost(&data_, roomy(bytes)), roomy(bytes), what);
  bytes_ = roomy(bytes);
  return true;
}

StepInputs::~StepInputs() {
  for (const Half& half : halves_) {
    if (half.copied != nullptr) static_cast<void>(cudaEventDestroy(half.copied));
  }
}

std::byte* StepInputs::begin(size_t bytes) {
  turn_ = 1 - turn_;
  Half& half = halves_[turn_];
  if (half.copied == nullptr) check_cuda(cudaEventCreateWithFlags(&half.copied, cudaEventDisableTiming), "step inputs");
  if (half.waiting) check_cuda(cudaEventSynchronize(half.copied), "step inputs: the copy before");
  half.waiting = false;
  half.memory.reserve(bytes, "pinned memory of step inputs");
  device_.reserve(bytes, "device memory of step inputs");
  return half.memory.data<std::byte>();
}

void StepInputs::upload(size_t bytes, cudaStream_t stream) {
  Half& half = halves_[turn_];
  check_cuda(cudaMemcpyAsync(device_.data(), half.memory.data<std::byte>(), bytes, cudaMemcpyHostToDevice, stream),
             "step inputs: copy");
  check_cuda(cudaEventRecord(half.copied, stream), "step inputs: event");
  half.waiting = true;
}

PageTables::~PageTables() {
  if (copied_ != nullptr) static_cast<void>(cudaEventDestroy(copied_));
}

void PageTables::reserve(size_t rows, size_t ids_of_row, int64_t ids_of_head) {
  if (rows <= rows_ && ids_of_head <= stride) return;
  wait();
  constexpr size_t kRowStep = 8;
  constexpr int64_t kIdStep = 16;
  const size_t more_rows = std::max(rows_, (rows + rows / 4 + kRowStep - 1) / kRowStep * kRowStep);
  const int64_t more_ids = std::max(stride, (ids_of_head + ids_of_head / 4 + kIdStep - 1) / kIdStep * kIdStep);
  const size_t bytes = more_rows * ids_of_row * static_cast<size_t>(more_ids) * sizeof(int32_t);
  rows_ = 0, stride = 0;  // until there is room for them
  revisions.clear();
  host_.reserve(bytes, "pinned memory of page tables");
  device_.reserve(bytes, "device memory of page tables");
  if (copied_ == nullptr) check_cuda(cudaEventCreateWithFlags(&copied_, cudaEventDisableTiming), "page tables");
  rows_ = more_rows, stride = more_ids;
  revisions.assign(rows_, 0);
}

void PageTables::wait() {
  if (waiting_) check_cuda(cudaEventSynchronize(copied_), "page tables: the copy before");
  waiting_ = false;
}

void PageTables::copy(size_t at, size_t ids, size_t times, size_t step, cudaStream_t stream) {
  constexpr size_t kId = sizeof(int32_t);
  check_cuda(cudaMemcpy2DAsync(device_.data() + at * kId, step * kId, host(at), step * kId, ids * kId, times,
                               cudaMemcpyHostToDevice, stream),
             "page tables: copy");
  check_cuda(cudaEventRecord(copied_, stream), "page tables: event");
  waiting_ = true;
}

}  // namespace kvmix::cuda
