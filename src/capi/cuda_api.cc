// The C ABI of the CUDA kernels (kvmix/kvmix_cuda.h): argument checks that C callers need, and exceptions turned into statuses.
#include <algorithm>
#include <string>

#include "attention/cuda/cut.h"
#include "attention/cuda/shape.h"
#include "capi/guard.h"
#include "codec/cuda/format.h"
#include "codec/cuda/record.h"
#include "codec/cuda/seal.h"
#include "kvmix/error.h"
#include "kvmix/kvmix_cuda.h"

namespace kvmix::cuda {
namespace {

thread_local std::string last_error;

template <class Body>
kvmix_status guarded(const Body& body) noexcept {
  return run_guarded(last_error, body);
}

}  // namespace
}  // namespace kvmix::cuda

using namespace kvmix;
using namespace kvmix::cuda;

extern "C" {

kvmix_status kvmix_cuda_record_bytes(const kvmix_cuda_format* format, size_t* bytes) {
  return guarded([&] {
    need(format, "format"), need(bytes, "bytes");
    check_format(*format);
    *bytes = static_cast<size_t>(record_shape(*format).bytes());
  });
}

kvmix_status kvmix_cuda_record_from_tiles(const kvmix_cuda_format* format, const void* key_tile, const void* value_tile,
                                          void* record) {
  return guarded([&] {
    need(format, "format"), need(key_tile, "key_tile"), need(value_tile, "value_tile"), need(record, "record");
    check_format(*format);
    record_from_tiles({record_shape(*format)}, static_cast<const uint8_t*>(key_tile), static_cast<const uint8_t*>(value_tile),
                      static_cast<uint8_t*>(record));
  });
}

kvmix_status kvmix_cuda_tiles_from_record(const kvmix_cuda_format* format, const void* record, void* key_tile,
                                          void* value_tile) {
  return guarded([&] {
    need(format, "format"), need(key_tile, "key_tile"), need(value_tile, "value_tile"), need(record, "record");
    check_format(*format);
    tiles_from_record({record_shape(*format)}, static_cast<const uint8_t*>(record), static_cast<uint8_t*>(key_tile),
                      static_cast<uint8_t*>(value_tile));
  });
}

kvmix_status kvmix_cuda_cut(const kvmix_cuda_attend_params* params, const int32_t* lengths, int32_t slots,
                            kvmix_cuda_item* items, int32_t capacity, int32_t* item_count, size_t* workspace_bytes) {
  return guarded([&] {
    need(params, "params"), need(lengths, "lengths"), need(item_count, "item_count"), need(workspace_bytes, "workspace_bytes");
    check_shape(*params);
    const std::span of_sequences(lengths, static_cast<size_t>(params->sequences));
    const PageRuns runs = page_runs(*params, of_sequences);
    const Pieces pieces = choose_pieces(*params, runs, slots);
    const auto count = static_cast<int32_t>(count_items(*params, runs, pieces));
    if (items != nullptr) {
      require(capacity >= count,
              "cut: " + std::to_string(count) + " items do not fit a capacity of " + std::to_string(capacity));
      write_items(*params, of_sequences, pieces, {items, static_cast<size_t>(count)});
    }
    *item_count = count;
    *workspace_bytes = cuda::workspace_bytes(*params, runs, static_cast<size_t>(count));
  });
}

kvmix_status kvmix_cuda_attend(const kvmix_cuda_attend_params* params) {
  return guarded([&] {
    need(params, "params");
    check_shape(*params);
    attend(*params);
  });
}

const char* kvmix_cuda_attend_kernel(const kvmix_cuda_attend_params* params) {
  const char* name = nullptr;
  const kvmix_status status = guarded([&] {
    need(params, "params");
    check_shape(*params);
    name = kernel_name(*params);
  });
  return status == KVMIX_OK ? name : nullptr;
}

float kvmix_cuda_attend_cost(const kvmix_cuda_attend_params* params) {
  float cost = -1.0f;
  const kvmix_status status = guarded([&] {
    need(params, "params");
    check_shape(*params);
    cost = relative_cost(*params);
  });
  return status == KVMIX_OK ? cost : -1.0f;
}

kvmix_status kvmix_cuda_seal(const kvmix_cuda_seal_params* params) {
  return guarded([&] {
    need(params, "params");
    check_seal(*params);
    if (params->pages > 0) seal(*params);
  });
}

kvmix_status kvmix_cuda_append(const kvmix_cuda_append_params* params) {
  return guarded([&] {
    need(params, "params");
    check_append(*params);
    if (params->rows > 0) append(*params);
  });
}

const char* kvmix_cuda_last_error(void) { return last_error.c_str(); }

}  // extern "C"
