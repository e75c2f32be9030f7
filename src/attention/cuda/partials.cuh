// Partial results of rows, their sum over warps and over the splits of a head, and the rows that come of it.
#pragma once

#include "attention/cuda/arguments.cuh"

namespace kvmix::cuda {

// Four output channels.
__device__ inline void store_output(const AttendArguments& args, int64_t quad, const float4& v, float scale) {
  uint2 packed;
  if (args.bf16) {
    const __nv_bfloat162 low = __floats2bfloat162_rn(v.x * scale, v.y * scale),
                         high = __floats2bfloat162_rn(v.z * scale, v.w * scale);
    packed = {reinterpret_cast<const uint32_t&>(low), reinterpret_cast<const uint32_t&>(high)};
  } else {
    packed = {pack(v.x * scale, v.y * scale), pack(v.z * scale, v.w * scale)};
  }
  static_cast<uint2*>(args.out)[quad] = packed;
}
__device__ inline float log_sum_exp(float top, float sum) {
  return sum > 0.0f ? (top - kLift + log2f(sum)) * 0.693147180559945f : -INFINITY;
}
__device__ inline void add_weighted(float4& to, float weight, const float4& v) {
  to.x = fmaf(weight, v.x, to.x), to.y = fmaf(weight, v.y, to.y), to.z = fmaf(weight, v.z, to.z),
  to.w = fmaf(weight, v.w, to.w);
}

__device__ inline void store_partial(const AttendArguments& args, int slot, int row, int rows, int quad, int quads,
                                     const float4& value, float top, float sum) {
  const int64_t at = static_cast<int64_t>(slot) * rows + row;
  __stcg(reinterpret_cast<float4*>(args.partials) + at * quads + quad, value);
  if (quad == 0) __stcg(reinterpret_cast<float2*>(args.partial_sums) + at, make_float2(top, sum));
}
// The query rows of a block: `rows` from `row0` on of all those of its KV head, and what counts the splits that arrive.
struct RowSpan {
  int row0, rows, all_rows, ticket;
};
// Whether this block is the last of its rows to have stored its part.
__device__ inline bool arrived_last(const AttendArguments& args, const kvmix_cuda_item& item, int ticket, int* last) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    *last = atomicAdd(args.tickets + ticket, 1) == item.splits - 1;
    if (*last) args.tickets[ticket] = 0;
  }
  __syncthreads();
  __threadfence();
  return *last != 0;
}
// Adds up the splits of a head, in their order; `sums` is shared memory for rows x splits.
template <int quads, class Finish>
__device__ inline void combine_splits(const AttendArguments& args, const kvmix_cuda_item& item, int threads,
                                      const RowSpan& span, float2* sums, const Finish& finish) {
  const int rows = span.rows;
  const auto slot = [&](int row, int split) {
    return static_cast<int64_t>(item.partial + split) * span.all_rows + span.row0 + row;
  };
  for (int at = static_cast<int>(threadIdx.x); at < rows * item.splits; at += threads) {
    sums[at] = __ldcg(reinterpret_cast<const float2*>(args.partial_sums) + slot(at / item.splits, at % item.splits));
  }
  __syncthreads();
  for (int at = static_cast<int>(threadIdx.x); at < rows * quads; at += threads) {
    const int row = at / quads, quad = at % quads;
    const float2* const mine = sums + row * item.splits;
    float top = kFloor, sum = 0.0f;
    float4 value = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int split = 0; split < item.splits; ++split) top = fmaxf(top, mine[split].x);
#pragma unroll 8
    for (int split = 0; split < item.splits; ++split) {
      const float weight = exp2_fast(mine[split].x - top);
      sum = fmaf(weight, mine[split].y, sum);
      add_weighted(value, weight, __ldcg(reinterpret_cast<const float4*>(args.partials) + slot(row, split) * quads + quad));
    }
    finish(row, quad, value, top, sum);
  }
}

// A row's unnormalised sum over some tokens: maximum and sum of weights, and its channels.
struct RowPart {
  float2 sums;
  const float4* quads;
};

// The end of a block: adds up the `parts` of every row, four channels a thread, and writes the row; with several splits the
// block that arrives last writes it for all. part(w, row) is in shared memory, as is `last`; `sums` is shared memory that
// may overlap the parts. row_offset(row) is a row's place in the output. `threads` of the block are still there.
template <int quads, class RowOffset, class Part>
__device__ inline void write_rows(const AttendArguments& args, const kvmix_cuda_item& item, int threads, int parts,
                                  const RowSpan& span, float2* sums, int* last, const RowOffset& row_offset, const Part& part) {
  const auto finish = [&](int row, int quad, const float4& value, float top, float sum) {
    store_output(args, row_offset(row) * quads + quad, value, sum > 0.0f ? 1.0f / sum : 0.0f);
    if (args.lse != nullptr && quad == 0) args.lse[row_offset(row)] = log_sum_exp(top, sum);
  };
  for (int at = static_cast<int>(threadIdx.x); at < span.rows * quads; at += threads) {
    const int row = at / quads, quad = at % quads;
    float top = kFloor, sum = 0.0f;
    float4 value = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
    for (int w = 0; w < parts; ++w) top = fmaxf(top, part(w, row).sums.x);
#pragma unroll 4
    for (int w = 0; w < parts; ++w) {
      const RowPart one = part(w, row);
      const float scale = exp2_fast(one.sums.x - top);
      sum += scale * one.sums.y;
      add_weighted(value, scale, one.quads[quad]);
    }
    if (item.splits == 1) {
      finish(row, quad, value, top, sum);
    } else {
      store_partial(args, item.partial + item.split, span.row0 + row, span.all_rows, quad, quads, value, top, sum);
    }
  }
  if (item.splits == 1 || !arrived_last(args, item, span.ticket, last)) return;
  combine_splits<quads>(args, item, threads, span, sums, finish);
}
// The same for a block of kThreads with a fixed number of parts.
template <int quads, int parts, class RowOffset, class Part>
__device__ inline void write_rows(const AttendArguments& args, const kvmix_cuda_item& item, const RowSpan& span, float2* sums,
                                  int* last, const RowOffset& row_offset, const Part& part) {
  write_rows<quads>(args, item, kThreads, parts, span, sums, last, row_offset, part);
}

}  // namespace kvmix::cuda
