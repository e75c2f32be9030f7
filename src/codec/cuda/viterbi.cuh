// The search of trellis_encode.h's best_windows by a warp: the windows of a chain of 32 tokens whose levels come nearest to
// targets, errors weighed. For a file that is compiled without fused multiply-adds.
//
// Every lane reaches the same eight windows at each token, so that their levels stay in its registers; with 4 and 5 bits, where
// there are fewer states than lanes, several lanes share the branches of a state. Costs go from token to token through shared
// memory, in an order that gives a lane those of its sources side by side; there too is by which window each state of each
// token was reached, in the end the way back.
#pragma once

#include <cuda_runtime.h>

#include <cfloat>

#include "codec/trellis_code.h"

namespace kvmix::cuda {

// How states and branches lie on lanes.
template <int bits>
struct TrellisLanes {
  static constexpr int states = kLevels >> bits, branches = 1 << bits;
  static constexpr int lane_states = states > 32 ? states / 32 : 1;
  static constexpr int lanes = states < 32 ? 32 / states : 1;  // of a state
  static constexpr int lane_branches = branches / lanes;
  // States from which a state is reached, by how many windows from each, and those of a lane.
  static constexpr int sources = branches < states ? branches : states, parallel = branches / sources;
  static constexpr int lane_sources = lane_branches / parallel;
  static_assert(lane_states * lane_branches == kLevels / 32);

  // Where a state's cost stands: the sources of a state next to each other.
  static constexpr int run = states / sources;
  __device__ static constexpr int place(int state) { return state % run * sources + state / run; }
};

// A warp's shared memory.
struct alignas(16) ViterbiSpace {
  float costs[2][kLevels >> kTrellisBits.front()];
  float targets[kChainTokens], weights[kChainTokens];
  uint8_t windows[kChainTokens * (kLevels >> kTrellisBits.front())];
};

template <int bits>
class Viterbi {
  using Lanes = TrellisLanes<bits>;

 public:
  // levels: of all windows.
  __device__ Viterbi(const float* levels, ViterbiSpace& space) : space_(space), lane_(static_cast<int>(threadIdx.x) % 32) {
    state_ = lane_ * Lanes::lane_states % Lanes::states;
    first_branch_ = lane_ / Lanes::states * Lanes::lane_branches;
    first_source_ = state_ / Lanes::branches * Lanes::sources + first_branch_ / Lanes::parallel;
#pragma unroll
    for (int s = 0; s < Lanes::lane_states; ++s) {
#pragma unroll
      for (int k = 0; k < Lanes::lane_branches; ++k) {
        level_[s][k] = levels[(first_branch_ + k) * Lanes::states + state_ + s];
      }
    }
  }

  // The window of token `lane` of a chain with the targets, and where `weighted` the weights (else 1), in the space.
  template <bool weighted>
  __device__ int search() {
    Best best[Lanes::lane_states];
    if (lane_ < Lanes::states) {
#pragma unroll
      for (int s = 0; s < Lanes::lane_states; ++s) {
        space_.costs[0][Lanes::place(state_ + s)] = state_ + s == 0 ? 0.0f : FLT_MAX;
      }
    }
    __syncwarp();
    for (int quad = 0; quad < kChainTokens; quad += 4) {
      const float4 t = *reinterpret_cast<const float4*>(space_.targets + quad);
      const float4 w = *reinterpret_cast<const float4*>(space_.weights + quad);
      step<weighted>(quad, 0, t.x, w.x, best);
      step<weighted>(quad + 1, 1, t.y, w.y, best);
      step<weighted>(quad + 2, 0, t.z, w.z, best);
      step<weighted>(quad + 3, 1, t.w, w.w, best);
    }
    int window = 0, state = last_state(best);
#pragma unroll 8
    for (int i = kChainTokens - 1; i >= 0; --i) {
      const int through = space_.windows[i * Lanes::states + state];
      if (lane_ == i) window = through;
      state = through >> bits;
    }
    return window;
  }

 private:
  struct Best {
    float cost;
    int window;  // less the lane's first
  };

  // Of equal costs the first.
  template <int count>
  __device__ static Best first_best(const float* costs, int first) {
    if constexpr (count == 1) {
      return {costs[0], first * Lanes::states};
    } else {
      const Best a = first_best<count / 2>(costs, first), b = first_best<count / 2>(costs + count / 2, first + count / 2);
      const bool later = b.cost < a.cost;
      return {later ? b.cost : a.cost, later ? b.window : a.window};
    }
  }

  template <bool weighted>
  __device__ void step(int token, int parity, float target, float weight, Best (&best)[Lanes::lane_states]) {
    float old[Lanes::lane_sources];
    const float* const from = space_.costs[parity] + first_source_;
    if constexpr (Lanes::lane_sources % 4 == 0) {
#pragma unroll
      for (int i = 0; i < Lanes::lane_sources; i += 4) {
        const float4 v = *reinterpret_cast<const float4*>(from + i);
        old[i] = v.x, old[i + 1] = v.y, old[i + 2] = v.z, old[i + 3] = v.w;
      }
    } else {
      static_assert(Lanes::lane_sources == 2);
      const float2 v = *reinterpret_cast<const float2*>(from);
      old[0] = v.x, old[1] = v.y;
    }
#pragma unroll
    for (int s = 0; s < Lanes::lane_states; ++s) {
      float reached[Lanes::lane_branches];
#pragma unroll
      for (int k = 0; k < Lanes::lane_branches; ++k) {
        const float e = target - level_[s][k];
        float squared = e * e;
        if (weighted) squared = squared * weight;
        reached[k] = old[k / Lanes::parallel] + squared;
      }
      best[s] = first_best<Lanes::lane_branches>(reached, 0);
      best[s].window += first_branch_ * Lanes::states + state_ + s;
    }
    // Among the lanes of a state the lowest has the first branches, and in the end what is best of all.
#pragma unroll
    for (int away = Lanes::states; away < 32; away *= 2) {
      const float cost = __shfl_xor_sync(~0u, best[0].cost, away);
      const int window = __shfl_xor_sync(~0u, best[0].window, away);
      const bool better = cost < best[0].cost;
      best[0] = {better ? cost : best[0].cost, better ? window : best[0].window};
    }
    if (lane_ < Lanes::states) {
      uint8_t* const through = space_.windows + token * Lanes::states + state_;
      if constexpr (Lanes::lane_states == 2) {
        *reinterpret_cast<uint16_t*>(through) = static_cast<uint16_t>(best[0].window | best[1].window << 8);
      } else {
        *through = static_cast<uint8_t>(best[0].window);
      }
#pragma unroll
      for (int s = 0; s < Lanes::lane_states; ++s) space_.costs[1 - parity][Lanes::place(state_ + s)] = best[s].cost;
    }
    __syncwarp();
  }

  // The first state of the least cost.
  __device__ int last_state(const Best (&best)[Lanes::lane_states]) const {
    float least = best[0].cost;
    int state = state_;
#pragma unroll
    for (int s = 1; s < Lanes::lane_states; ++s) {
      if (best[s].cost < least) least = best[s].cost, state = state_ + s;
    }
    const uint32_t bits_of_least = __float_as_uint(least);  // costs are not negative: in the order of their bits
    const uint32_t lanes = __ballot_sync(~0u, bits_of_least == __reduce_min_sync(~0u, bits_of_least));
    return __shfl_sync(~0u, state, __ffs(static_cast<int>(lanes)) - 1);
  }

  ViterbiSpace& space_;
  int lane_, state_, first_branch_, first_source_;
  float level_[Lanes::lane_states][Lanes::lane_branches];
};

}  // namespace kvmix::cuda
