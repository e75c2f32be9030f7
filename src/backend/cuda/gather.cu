// A warp takes a token of one head and side. Compiled without fused multiply-adds.
#include <cuda_fp16.h>

#include "backend/cuda/gather.h"
#include "backend/cuda/row_store.cuh"
#include "base/cuda/launch.h"
#include "codec/cuda/format.h"

namespace kvmix::cuda {
namespace {

// A token's codes and scales, or its halves, between two open records of one shape.
template <int dim, bool key>
__device__ inline void copy_row(const SideShape& side, const uint8_t* from, int from_slot, uint8_t* to, int to_slot, int lane) {
  const int width = side.bits == 16 ? 2 : 1;
#pragma unroll
  for (int i = 0; i < dim / 32; ++i) {
    const auto place = [&](int slot) {
      const CodeCell cell = code_cell(key, slot, 32 * i + lane);
      const CodePlace at = code_place(side.bits, cell.at.reg, cell.field);
      return cell.block * block_bytes(side.bits) + word_offset(side.bits, cell.at.lane, at.word) + 2 * cell.at.half +
             at.bit / 8;
    };
    const int a = place(from_slot), b = place(to_slot);
    for (int byte = 0; byte < width; ++byte) to[b + byte] = from[a + byte];
  }
  if (lane >= side.groups()) return;
  const auto* const scales =
      reinterpret_cast<const uint16_t*>(from + side.meta()) + side.scale_at(from_slot, lane * side.group);
  auto* const moved = reinterpret_cast<uint16_t*>(to + side.meta()) + side.scale_at(to_slot, lane * side.group);
  moved[0] = scales[0];
  moved[kMidStep] = scales[kMidStep];
}

template <int dim, bool key>
__device__ inline void move_row(const MoveRows& job, const RowTarget& target, int slot, const Feedback<dim, 1>& feedback) {
  const int lane = lane_of();
  const RowSource source = job.sources[target.first + min(slot, target.sources - 1)];
  const bool thin = source.rows == RowSource::kThinRecord;
  const RecordShape& record = source.rows == RowSource::kSealedRecord ? job.sealed : job.open;
  const SideShape side = thin ? (key ? job.thin.key() : job.thin.value()) : key ? record.key() : record.value();
  const int values = thin ? job.thin.key_bytes() : record.key_bytes();
  const uint8_t* const part = source.page + (key ? kHeaderBytes : values);
  if (source.rows == RowSource::kOpenRecord && target.rows == 0) {
    uint8_t* const to = target.page + (key ? kHeaderBytes : job.open.key_bytes());
    copy_row<dim, key>(side, part, source.slot, to, slot, lane);
    return;
  }
  float x[1][dim / 32];
  const auto* const halves = reinterpret_cast<const __half*>(source.page) + ((key ? 0 : source.rows) + source.slot) * dim;
  with_numbers(side, key, part, [&](const auto& number_of) {
#pragma unroll
    for (int i = 0; i < dim / 32; ++i) {
      const int channel = 32 * i + lane;
      if (source.rows > 0) {
        x[0][i] = __half2float(halves[channel]);
        continue;
      }
      const bool chosen = !key || !thin || target.columns[channel] != RowTarget::kNoColumn;
      const int column = key && thin ? target.columns[channel] : channel;
      const float number = chosen ? number_of(source.slot, column) : 0.0f;
      x[0][i] = job.halves ? __half2float(__float2half_rn(number)) : number;
    }
  });
  const OpenSlot to[1] = {{target.page, slot, target.rows, target.rows > 0}};
  store_rows<dim, 1, key>(x, job.open, to, feedback);
}

template <int dim, bool feedback>
__global__ void __launch_bounds__(kFeedbackThreads) move_kernel(const __grid_constant__ MoveRows job) {
  extern __shared__ __align__(16) uint8_t shared[];
  const RowTarget target = job.targets[blockIdx.x];
  const int slot = static_cast<int>(blockIdx.y) * kFeedbackWarps + static_cast<int>(threadIdx.x) / 32;
  if (blockIdx.z == 1) {
    if (slot < target.slots) move_row<dim, false>(job, target, slot, {});
    return;
  }
  Feedback<dim, 1> with;
  if constexpr (feedback) {
    with = bring_panels<dim, 1>(shared, job.key_panels + target.kv_head * feedback_panel(dim, dim));
    wait_panels();
  }
  if (slot < target.slots) move_row<dim, true>(job, target, slot, with);
}

}  // namespace

void move_rows(const MoveRows& job, cudaStream_t stream) {
  if (job.count == 0) return;
  const dim3 grid(static_cast<unsigned>(job.count), kPageTokens / kFeedbackWarps, 2);
  const auto launch = [&](auto dim) {
    if (job.key_panels == nullptr) {
      move_kernel<dim.value, false><<<grid, kFeedbackThreads, 0, stream>>>(job);
    } else {
      auto* const kernel = move_kernel<dim.value, true>;
      constexpr int kShared = FeedbackSpace<dim.value, 1>::bytes;
      allow_shared(kernel, kShared, "move tokens: shared memory");
      kernel<<<grid, kFeedbackThreads, kShared, stream>>>(job);
    }
  };
  if (!HeadDims::visit(job.head_dim, launch))
    throw Error(Status::kUnsupported, "move tokens: head_dim " + std::to_string(job.head_dim) + " has no kernel");
  check_cuda(cudaGetLastError(), "move tokens: launch");
}

}  // namespace kvmix::cuda
