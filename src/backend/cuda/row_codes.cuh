// Rows as 8-bit codes in an open page's record: the scales and codes of encode_uniform_rows (src/codec/uniform_row.cc),
// operation for operation. A warp holds rows of one head, lane l channels l, l + 32, ... For a file that is compiled without
// fused multiply-adds.
#pragma once

#include <cuda_fp16.h>

#include "backend/cuda/feedback_panels.h"
#include "base/fp16.h"
#include "codec/cuda/tile_layout.h"
#include "codec/quantize.h"

namespace kvmix::cuda {

// Whole rows on a side of 16 bits, codes on one of 8: a lane's numbers to their places in slot `slot` of a record's part.
template <int dim, bool key>
__device__ inline void store_halves(const float (&x)[dim / 32], int slot, int lane, uint8_t* part) {
#pragma unroll
  for (int i = 0; i < dim / 32; ++i) {
    const CodeCell cell = code_cell(key, slot, 32 * i + lane);
    const int word = code_place(16, cell.at.reg, cell.field).word;
    auto* const halves = reinterpret_cast<__half*>(part + cell.block * block_bytes(16) + word_offset(16, cell.at.lane, word));
    halves[cell.at.half] = __float2half_rn(x[i]);
  }
}

// Of 8-bit rows.
inline constexpr int kRowCodeBits = 8;
inline constexpr float kRowCodeTop = static_cast<float>((1 << kRowCodeBits) - 1);

__device__ inline float finite_or_zero(float v) { return fabsf(v) < INFINITY ? v : 0.0f; }

// Rows of a warp while errors are fed back. Rows stand four banks apart.
template <int dim, int rows>
struct FeedbackRoom {
  alignas(16) float exact[rows][dim + 4];
  alignas(16) float wanted[rows][dim + 4];    // with the errors so far; in the end codes
  alignas(16) float4 groups[rows][dim / 32];  // scale, midpoint and CodeMap, of 32 channels each
};

// Rounds with error feedback, the operations of encode_with_feedback (codec/row_feedback.h) in its order. A channel's error is
// known once all errors before it are added, so a row is a chain of dependent operations, and its length is what this takes.
// kTurnChannels channels at a time are rounded by each of a row's 32 / rows lanes alike, from registers, so that no lane waits
// for another's; then the lanes share what the block's errors mean for the channels behind it.
template <int dim, int rows>
__device__ inline void feed_back_rows(const float* panel, FeedbackRoom<dim, rows>& room, int lane) {
  constexpr int kLanes = 32 / rows, kQuads = kTurnChannels / 4;
  const int row = lane / kLanes, mine = lane % kLanes;
  float* const wanted = room.wanted[row];
  const float* const exact = room.exact[row];
#pragma unroll 1
  for (int c0 = 0; c0 < dim; c0 += kTurnChannels) {
    const int width = dim - c0;
    const float4 group = room.groups[row][c0 / 32];
    const float scale = group.x, mid = group.y;
    const CodeMap map{group.z, group.w};
    const float of_zero = unit_multiply_add(0.0f, map.factor, map.offset);
    const float lowest = -(scale * code_centre(kRowCodeBits));  // exact, as is lowest + scale * code: scales are fp16 numbers
    float x[kTurnChannels], v[kTurnChannels], error[kTurnChannels];  // v: what is wanted, then the code
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const float4 a = reinterpret_cast<const float4*>(exact + c0)[q], b = reinterpret_cast<const float4*>(wanted + c0)[q];
      x[4 * q] = a.x, x[4 * q + 1] = a.y, x[4 * q + 2] = a.z, x[4 * q + 3] = a.w;
      v[4 * q] = b.x, v[4 * q + 1] = b.y, v[4 * q + 2] = b.z, v[4 * q + 3] = b.w;
    }
    __syncwarp();
#pragma unroll
    for (int t = 0; t < kTurnChannels; ++t) {
      // quantize_code(finite_or_zero(v[t])), with the choice beside the product.
      const float unit = unit_multiply_add(v[t], map.factor, map.offset);
      const float limited = fabsf(v[t]) < INFINITY ? unit : of_zero;
      v[t] = fused_multiply_add(limited, kRowCodeTop, kRoundToInteger) - kRoundToInteger;
      error[t] = x[t] - (mid + fused_multiply_add(scale, v[t], lowest));
#pragma unroll
      for (int q = (t + 1) / 4; q < kQuads; ++q) {
        const float4 w = *reinterpret_cast<const float4*>(panel + t * width + 4 * q);
        const float weights[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (4 * q + i > t) v[4 * q + i] = v[4 * q + i] + weights[i] * error[t];
        }
      }
    }
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      if (mine == q) reinterpret_cast<float4*>(wanted + c0)[q] = {v[4 * q], v[4 * q + 1], v[4 * q + 2], v[4 * q + 3]};
    }
    for (int k = kTurnChannels + 4 * mine; k < width; k += 4 * kLanes) {
      float4 later = *reinterpret_cast<const float4*>(wanted + c0 + k);
#pragma unroll
      for (int t = 0; t < kTurnChannels; ++t) {
        const float4 w = *reinterpret_cast<const float4*>(panel + t * width + k);
        later.x = later.x + w.x * error[t], later.y = later.y + w.y * error[t];
        later.z = later.z + w.z * error[t], later.w = later.w + w.w * error[t];
      }
      *reinterpret_cast<float4*>(wanted + c0 + k) = later;
    }
    __syncwarp();
    panel += kTurnChannels * width;
  }
}

// What is stored of `rows` rows next to each other in a warp.
template <int dim, int rows>
struct RowCodes {
  static constexpr int kPerLane = dim / 32, kBits = kRowCodeBits;
  static constexpr float kTop = kRowCodeTop;
  static_assert(rows * kPerLane <= 32);
  // Scale and midpoint, fp16 numbers, and CodeMap of the group that channels 32 i to 32 i + 31 of row r belong to: lane
  // r * kPerLane + i has them, so that all groups are divided for at once.
  float4 of_group;
  float code[rows][kPerLane];

  // Rows as encode_rows takes them; what is not finite becomes 0. `group`: a power of two.
  __device__ void encode(float (&x)[rows][kPerLane], int group, int lane) {
    const int shift = 31 - __clz(group), mine = 32 * (lane % kPerLane) >> shift, row = lane / kPerLane;
    GroupRange limits{INFINITY, -INFINITY};
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      float low[kPerLane], high[kPerLane];
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        low[i] = high[i] = x[r][i] = finite_or_zero(x[r][i]);
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
          low[i] = fminf(low[i], __shfl_xor_sync(~0u, low[i], step));
          high[i] = fmaxf(high[i], __shfl_xor_sync(~0u, high[i], step));
        }
      }
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (row != r || 32 * i >> shift != mine) continue;
        limits = {fminf(limits.low, low[i]), fmaxf(limits.high, high[i])};
      }
    }
    if (row >= rows) limits = {0.0f, 0.0f};
    const GroupScale stored = min_max_scale(coded_range(limits, true), kTop);
    const float scale = f16_to_f32(stored.scale), mid = f16_to_f32(stored.mid);
    const CodeMap map = code_map(scale, mid, kTop);
    of_group = make_float4(scale, mid, map.factor, map.offset);
#pragma unroll
    for (int r = 0; r < rows; ++r) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const int from = r * kPerLane + i;
        const CodeMap of_x{__shfl_sync(~0u, map.factor, from), __shfl_sync(~0u, map.offset, from)};
        code[r][i] = quantize_code(x[r][i], of_x, kTop);
      }
    }
  }

  // Codes of encoded rows once more, with error feedback (feed_back below). `panels`: feedback_panels of the head in shared
  // memory.
  __device__ void feed_back(const float (&x)[rows][kPerLane], const float* panels, FeedbackRoom<dim, rows>& room, int lane) {
#pragma unroll
    for (int r = 0; r < rows; ++r) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        room.exact[r][32 * i + lane] = room.wanted[r][32 * i + lane] = x[r][i];
      }
    }
    if (lane < rows * kPerLane) room.groups[lane / kPerLane][lane % kPerLane] = of_group;
    __syncwarp();
    feed_back_rows(panels, room, lane);
#pragma unroll
    for (int r = 0; r < rows; ++r)
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) code[r][i] = room.wanted[r][32 * i + lane];
  }

  // Row r to a slot of a record's part.
  template <bool key>
  __device__ void store(int r, const SideShape& side, int slot, int lane, uint8_t* part) const {
    auto* const meta = reinterpret_cast<uint16_t*>(part + side.meta());
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const CodeCell cell = code_cell(key, slot, 32 * i + lane);
      const CodePlace place = code_place(kBits, cell.at.reg, cell.field);
      part[cell.block * block_bytes(kBits) + word_offset(kBits, cell.at.lane, place.word) + 2 * cell.at.half + place.bit / 8] =
          static_cast<uint8_t>(code[r][i]);
    }
    const int channel = 32 * (lane - r * kPerLane);  // where this lane's group begins, if it is the first of its 32
    if (channel < 0 || channel >= dim || (channel & (side.group - 1)) != 0) return;
    const int at = side.scale_at(slot, channel);
    meta[at] = f32_to_f16(of_group.x);
    meta[at + kMidStep] = f32_to_f16(of_group.y);
  }
};

}  // namespace kvmix::cuda
