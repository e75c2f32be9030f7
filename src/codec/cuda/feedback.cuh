// Rounding with error feedback on the GPU, as feedback_tile (kvmix/codec.h) does it. For a file that is compiled without fused
// multiply-adds.
#pragma once

#include "base/cuda/fragments.cuh"
#include "codec/cuda/tile_layout.h"
#include "codec/quantize.h"

namespace kvmix::cuda {

inline constexpr int kSealThreads = 256, kSealWarps = kSealThreads / 32;

// Halves of a row of the tile: four banks further a row, for fragments and fits alike.
__host__ __device__ constexpr int tile_row(int head_dim) { return head_dim + 8; }
// Tokens whose errors are fed back at once, channels of a token that a thread takes, and those of all threads of a token.
__host__ __device__ constexpr int feedback_tokens(int head_dim) { return head_dim <= 128 ? kPageTokens : kPageTokens / 2; }
inline constexpr int kFeedbackChannels = 8;
__host__ __device__ constexpr int feedback_block(int head_dim) {
  return kFeedbackChannels * kSealThreads / feedback_tokens(head_dim);
}

__device__ inline float finite(float v) { return fabsf(v) < INFINITY ? v : 0.0f; }

// A thread's share of the weights of a block of channels from c0 on, [input channel][channel of the block]; a warp reads 8 of 4
// rows at a time.
template <int dim>
struct PanelShare {
  static constexpr int block = feedback_block(dim), loads = dim * block / kSealThreads, parts = 4 * kSealWarps / block;
  float v[loads];

  __device__ static int channel() {
    return (static_cast<int>(threadIdx.x) / 32 * 4 + static_cast<int>(threadIdx.x) % 4) % block;
  }
  __device__ static int input(int i) {
    const int thread = static_cast<int>(threadIdx.x);
    return (thread / 32 * 4 / block + i * parts) * 8 + thread % 32 / 4;
  }
  __device__ void load(const float* weights, int c0) {
    const int c = c0 + channel();
#pragma unroll
    for (int i = 0; i < loads; ++i) v[i] = input(i) < c ? __ldg(weights + c * (c - 1) / 2 + input(i)) : 0.0f;
  }
  __device__ void store(float* panel) const {
#pragma unroll
    for (int i = 0; i < loads; ++i) panel[input(i) * block + channel()] = v[i];
  }
};

// Rounds a page with error feedback as feedback_tile (kvmix/codec.h) does and leaves codes in the tile. Channels come in
// blocks, 8 of them to each thread of a token: first all threads add what the errors of the blocks before mean for their
// channels, the block's weights in shared memory, then they take turns, since the errors of 8 channels change those of the
// next. Every sum runs over the channels in their order. `stored` holds scales and midpoints of groups.
template <int dim>
__device__ void feed_back(const SideShape& side, const float* weights, const CodeMap* groups, const __half2* stored,
                          float* errors, float* panel, __half* tile) {
  constexpr int kTokens = feedback_tokens(dim), kBlock = feedback_block(dim), kTurns = kBlock / kFeedbackChannels;
  const float top = static_cast<float>((1 << side.bits) - 1), centre = code_centre(side.bits);
  const int group_shift = 31 - __clz(side.group);
  const int turn = static_cast<int>(threadIdx.x) / kTokens;
  PanelShare<dim> share;
  share.load(weights, 0);
  for (int strip = 0; strip < kPageTokens; strip += kTokens) {
    const int token = strip + static_cast<int>(threadIdx.x) % kTokens;
    float* const mine = errors + token - strip;
    for (int c0 = 0; c0 < dim; c0 += kBlock) {
      __syncthreads();
      share.store(panel);
      __syncthreads();
      share.load(weights, (c0 + kBlock) % dim);
      const int first = c0 + turn * kFeedbackChannels;
      const float* const my_weights = panel + turn * kFeedbackChannels;
      uint4* const cells = reinterpret_cast<uint4*>(tile + token * tile_row(dim) + first);
      float exact[kFeedbackChannels], wanted[kFeedbackChannels];
      const uint4 before = *cells;
      const uint32_t pairs[4] = {before.x, before.y, before.z, before.w};
#pragma unroll
      for (int k = 0; k < kFeedbackChannels; k += 2) {
        const float2 x = __half22float2(half2_of(pairs[k / 2]));
        exact[k] = wanted[k] = x.x, exact[k + 1] = wanted[k + 1] = x.y;
      }
      CodeMap maps[kFeedbackChannels];
      float2 scales[kFeedbackChannels];
#pragma unroll
      for (int k = 0; k < kFeedbackChannels; ++k) {
        const int c = first + k;
        const int group = side.per_token ? (c >> group_shift) * kPageTokens + token : (token >> group_shift) * dim + c;
        maps[k] = groups[group], scales[k] = __half22float2(stored[group]);
      }
      const auto add = [&](int i) {
        const float error = mine[i * kTokens];
        const auto* const w = reinterpret_cast<const float4*>(my_weights + i * kBlock);
        const float4 a = w[0], b = w[1];
        const float row[kFeedbackChannels] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
        for (int k = 0; k < kFeedbackChannels; ++k) wanted[k] = wanted[k] + row[k] * error;
      };
#pragma unroll 4
      for (int i = 0; i < c0; ++i) add(i);
      for (int now = 0; now < kTurns; ++now) {
        if (turn == now) {
          float fresh[kFeedbackChannels], code[kFeedbackChannels];
#pragma unroll
          for (int k = 0; k < kFeedbackChannels; ++k) {
#pragma unroll
            for (int i = 0; i < k; ++i) wanted[k] = wanted[k] + my_weights[(first + i) * kBlock + k] * fresh[i];
            code[k] = quantize_code(finite(wanted[k]), maps[k], top);
            fresh[k] = exact[k] - (scales[k].y + scales[k].x * (code[k] - centre));
          }
#pragma unroll
          for (int k = 0; k < kFeedbackChannels; ++k) mine[(first + k) * kTokens] = fresh[k];
          *cells = {pack(code[0], code[1]), pack(code[2], code[3]), pack(code[4], code[5]), pack(code[6], code[7])};
        }
        if (now == kTurns - 1) break;
        __syncthreads();
        if (turn > now) {
#pragma unroll
          for (int i = 0; i < kFeedbackChannels; ++i) add(c0 + now * kFeedbackChannels + i);
        }
      }
    }
  }
}

}  // namespace kvmix::cuda
