// Rows as 8-bit codes in an open page's record: the scales and codes of encode_uniform_rows (src/codec/uniform_row.cc),
// operation for operation. A warp holds rows of one head, lane l channels l, l + 32, ... For a file that is compiled without
// fused multiply-adds.
#pragma once

#include <cuda_fp16.h>

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

// What is stored of `rows` rows next to each other in a warp.
template <int dim, int rows>
struct RowCodes {
  static constexpr int kPerLane = dim / 32, kBits = 8;
  static constexpr float kTop = static_cast<float>((1 << kBits) - 1);
  float scale[rows][kPerLane], mid[rows][kPerLane];  // of the group that channels 32 i to 32 i + 31 belong to, fp16 numbers
  float code[rows][kPerLane];

  // Rows as encode_rows takes them; what is not finite becomes 0.
  __device__ void encode(float (&x)[rows][kPerLane], int group) {
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
        GroupRange limits{low[i], high[i]};
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) {
          if (32 * j / group != 32 * i / group) continue;
          limits = {fminf(limits.low, low[j]), fmaxf(limits.high, high[j])};
        }
        const GroupScale stored = min_max_scale(coded_range(limits, true), kTop);
        scale[r][i] = f16_to_f32(stored.scale), mid[r][i] = f16_to_f32(stored.mid);
        code[r][i] = quantize_code(x[r][i], code_map(scale[r][i], mid[r][i], kTop), kTop);
      }
    }
  }

  // Codes of encoded rows once more, with error feedback: channel after channel, as encode_with_feedback. All lanes round what
  // they want of theirs, and the one whose turn it is says its error. `columns`: feedback_columns (codec/row.h) of the head,
  // [dim][dim], whose weights of earlier channels are zero.
  __device__ void feed_back(const float (&x)[rows][kPerLane], const float* columns, int lane) {
    constexpr int kAhead = 4;  // turns whose weights are asked for beforehand
    float wanted[rows][kPerLane];
    CodeMap map[rows][kPerLane];
#pragma unroll
    for (int r = 0; r < rows; ++r)
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) wanted[r][i] = x[r][i], map[r][i] = code_map(scale[r][i], mid[r][i], kTop);
    float ahead[kAhead][kPerLane];
    const auto ask = [&](int channel, int first) {
#pragma unroll
      for (int k = 0; k < kAhead; ++k)
#pragma unroll
        for (int j = first; j < kPerLane; ++j) {
          ahead[k][j] = channel + k < dim ? __ldg(columns + (channel + k) * dim + 32 * j + lane) : 0.0f;
        }
    };
    ask(0, 0);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
#pragma unroll 1
      for (int turn = 0; turn < 32; turn += kAhead) {
        float weight[kAhead][kPerLane];
#pragma unroll
        for (int k = 0; k < kAhead; ++k)
#pragma unroll
          for (int j = i; j < kPerLane; ++j) weight[k][j] = ahead[k][j];
        ask(32 * i + turn + kAhead, i);
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
#pragma unroll
          for (int r = 0; r < rows; ++r) {
            const float rounded = quantize_code(finite_or_zero(wanted[r][i]), map[r][i], kTop);
            const float mine = x[r][i] - (mid[r][i] + scale[r][i] * (rounded - code_centre(kBits)));
            const float error = __shfl_sync(~0u, mine, turn + k);
            if (lane == turn + k) code[r][i] = rounded;
#pragma unroll
            for (int j = i; j < kPerLane; ++j) wanted[r][j] = wanted[r][j] + weight[k][j] * error;
          }
        }
      }
    }
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
      if (lane != 0 || 32 * i % side.group != 0) continue;
      const int at = side.scale_at(slot, 32 * i);
      meta[at] = f32_to_f16(scale[r][i]);
      meta[at + kMidStep] = f32_to_f16(mid[r][i]);
    }
  }

 private:
  __device__ static float finite_or_zero(float v) { return fabsf(v) < INFINITY ? v : 0.0f; }
};

}  // namespace kvmix::cuda
