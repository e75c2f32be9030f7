// Seals sides of trellis codes (codec/trellis_encode.h, whose operations and their order it keeps, without fused multiply-adds,
// for the same bytes).
//
// The four warps of a block have a chain of the page each. What chains have in common, scales and offsets, comes first; from
// then on no warp waits for another: channels one after the other, with error feedback from a token's own errors alone.
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "codec/cuda/open_tile.cuh"
#include "codec/cuda/seal_launch.cuh"
#include "codec/cuda/trellis_layout.h"
#include "codec/cuda/trellis_tables.cuh"
#include "codec/cuda/viterbi.cuh"
#include "codec/trellis.h"

namespace kvmix::cuda {
namespace {

constexpr int kTrellisThreads = kPageTokens, kTrellisWarps = kChains;
static_assert(kTrellisThreads == 32 * kTrellisWarps);
constexpr int kMostDim = 256;
constexpr float kFarLevel = 1024.0f;

// Beside it, in dynamic shared memory, the tile and with feedback the errors, fp32 [channel][chain][token of the chain].
struct TrellisSpace {
  ViterbiSpace chains[kTrellisWarps];
  float levels[kLevels];
  float offsets[kMostDim];
  uint8_t scales[kMostDim / kTrellisGroup * kPageTokens];  // as the CPU's tile has them
  uint32_t largest[kTrellisWarps];
};

// One side of a page.
struct TrellisSide {
  int dim;
  const __half* tile;
  const float* feedback;  // null: none
  float* errors;
  TrellisSpace& space;
  uint8_t* part;  // of the record

  __device__ int groups() const { return (dim + kTrellisGroup - 1) / kTrellisGroup; }
  __device__ float number(int token, int channel) const { return __half2float(tile[token * tile_row(dim) + channel]); }
};

__device__ uint32_t most_in_block(uint32_t v, uint32_t* warps) {
  v = __reduce_max_sync(~0u, v);
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
  __syncthreads();
  v = warps[0];
  for (int i = 1; i < kTrellisWarps; ++i) v = max(v, warps[i]);
  return v;
}

// Scales of the thread's token.
template <int bits>
__device__ void store_scales(const TrellisSide& side) {
  constexpr float kUnit = trellis_code(bits).unit, kGain = trellis_code(bits).gain;
  const int token = static_cast<int>(threadIdx.x);
  for (int c = 0; c < side.dim; c += kTrellisGroup) {
    const int n = min(kTrellisGroup, side.dim - c);
    float squares = 0.0f, most = 0.0f;
    for (int i = c; i < c + n; i += 8) {
      const uint4 v = *reinterpret_cast<const uint4*>(side.tile + token * tile_row(side.dim) + i);
      const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const float x = half_bits(pairs[k / 2] >> (16 * (k % 2)) & 0xffffu) - side.space.offsets[i + k];
        squares = squares + x * x;
        most = fmaxf(most, fabsf(x));
      }
    }
    side.space.scales[c / kTrellisGroup * kPageTokens + token] =
        store_trellis_scale(kGain * fmaxf(sqrtf(squares / static_cast<float>(n)) / kUnit, most / kLevelCentre));
  }
}

// The largest scale and the first place that has it, of the threads' own scales.
struct LargestScale {
  int stored, at;
};
__device__ LargestScale largest_scale(const TrellisSide& side) {
  constexpr uint32_t kPlaces = sizeof side.space.scales;
  uint32_t v = 0;
  for (int at = static_cast<int>(threadIdx.x); at < side.groups() * kPageTokens; at += kTrellisThreads) {
    v = max(v, side.space.scales[at] * kPlaces + (kPlaces - 1 - static_cast<uint32_t>(at)));
  }
  v = most_in_block(v, side.space.largest);
  return {static_cast<int>(v / kPlaces), static_cast<int>(kPlaces - 1 - v % kPlaces)};
}

// Offsets and scales of keys; returns the largest scale.
template <int bits>
__device__ int store_offsets(const TrellisSide& side) {
  constexpr float kMost = 127.0f;
  const int thread = static_cast<int>(threadIdx.x);
  float* const offsets = side.space.offsets;
  float farthest = 0.0f;
  for (int c = thread; c < side.dim; c += kTrellisThreads) {
    float mean = 0.0f;
#pragma unroll 8
    for (int t = 0; t < kPageTokens; ++t) mean = mean + side.number(t, c);
    offsets[c] = mean = mean / static_cast<float>(kPageTokens);
    farthest = fmaxf(farthest, fabsf(mean));
  }
  farthest = __uint_as_float(most_in_block(__float_as_uint(farthest), side.space.largest));
  store_scales<bits>(side);
  const LargestScale largest = largest_scale(side);
  const auto reaches = [&](int stored) { return trellis_scale(static_cast<uint8_t>(stored)) * kMost >= farthest; };
  int kept = largest.stored;
  while (!reaches(kept) && kept < 255) ++kept;
  const float unit = trellis_scale(static_cast<uint8_t>(kept));
  uint8_t* const stored = side.part + code_bytes(kTrellis + bits, side.dim) + side.groups() * kPageTokens;
  for (int c = thread; c < (side.dim + 63) / 64 * 64; c += kTrellisThreads) {
    int offset = 0;
    if (c < side.dim) {
      const float wanted = unit > 0.0f ? offsets[c] / unit : 0.0f;
      offset = __float2int_rn(fminf(fmaxf(wanted, -kMost), kMost));
      offsets[c] = static_cast<float>(offset) * unit;
    }
    stored[trellis_offset_slot(c)] = static_cast<uint8_t>(offset);
  }
  __syncthreads();
  if (reaches(largest.stored)) return kept;
  store_scales<bits>(side);
  for (int at = thread; at < side.groups() * kPageTokens; at += kTrellisThreads) {
    uint8_t& scale = side.space.scales[at];
    if (at == largest.at || scale > kept) scale = static_cast<uint8_t>(kept);
  }
  return kept;
}

// A lane's codes on their way to the record.
template <int bits, bool key>
class CodeWriter {
 public:
  __device__ explicit CodeWriter(uint8_t* part)
      : part_(part), lane_(static_cast<int>(threadIdx.x) % 32), chain_(static_cast<int>(threadIdx.x) / 32) {}

  // The chain's codes of a channel, one a lane; channels one after the other.
  __device__ void put(int channel, uint32_t code) { key ? put_key(channel, code) : put_value(channel, code); }

 private:
  // A chain's codes of a channel are whole words of one lane of the record.
  __device__ void put_value(int channel, uint32_t code) const {
    const int bit = lane_ * bits;
    const uint64_t at = static_cast<uint64_t>(code) << (64 - bit % 32 - bits);
    uint32_t word = 0;
#pragma unroll
    for (int w = 0; w < bits; ++w) {
      const uint32_t mine = bit / 32 == w       ? static_cast<uint32_t>(at >> 32)
                            : bit / 32 + 1 == w ? static_cast<uint32_t>(at)
                                                : 0u;
      const uint32_t all = __reduce_or_sync(~0u, mine);
      if (lane_ == w) word = all;
    }
    if (lane_ < bits) {
      const StreamPlace place = stream_place(bits, false, chain_, channel);
      stream_word(part_, bits, channel, place, lane_) = word;
    }
  }

  // A lane of the record has four pieces of a chain in a block of 16 channels: `bits` halves of words, gathered by the lane of
  // the same number.
  __device__ void put_key(int channel, uint32_t code) {
    uint32_t piece = code << ((kPieceCodes - 1 - lane_ % kPieceCodes) * bits);
    piece |= __shfl_xor_sync(~0u, piece, 1);
    piece |= __shfl_xor_sync(~0u, piece, 2);
    constexpr int kPieceBits = kPieceCodes * bits;
    const bool mine = lane_ % 4 == channel % 8 / 2;
    if (mine && channel % 16 < 8) first_ = first_ << kPieceBits | piece;
    if (mine && channel % 16 >= 8) second_ = second_ << kPieceBits | piece;
    if (channel % 16 != 15) return;
    uint8_t* const block = part_ + channel / 16 * block_bytes(bits);
#pragma unroll
    for (int h = 0; h < bits; ++h) {
      constexpr int kTwo = 2 * kPieceBits;
      const int after = 16 * (bits - 1 - h);  // bits behind this half
      const uint64_t half = after >= kTwo ? first_ >> (after - kTwo) : first_ << (kTwo - after) | second_ >> after;
      const int at = chain_ * bits + h;
      *reinterpret_cast<uint16_t*>(block + word_offset(bits, lane_, at / 2) + (at % 2 == 0 ? 2 : 0)) =
          static_cast<uint16_t>(half);
    }
    first_ = second_ = 0;
  }

  uint8_t* part_;
  int lane_, chain_;
  uint64_t first_ = 0, second_ = 0;
};

// A channel's weights of error feedback, 32 at a time, one a lane.
__device__ float feedback_weight(const TrellisSide& side, int channel, int first) {
  const int i = first + static_cast<int>(threadIdx.x) % 32;
  return side.feedback != nullptr && i < channel ? __ldg(side.feedback + channel * (channel - 1) / 2 + i) : 0.0f;
}

template <int bits, bool key>
__device__ void encode_chain(const TrellisSide& side) {
  constexpr float kGain = trellis_code(bits).gain;
  const int lane = static_cast<int>(threadIdx.x) % 32, chain = static_cast<int>(threadIdx.x) / 32;
  const int token = chain_token(key ? Side::kKey : Side::kValue, chain, lane);
  ViterbiSpace& space = side.space.chains[chain];
  Viterbi<bits> viterbi(side.space.levels, space);
  CodeWriter<bits, key> writer(side.part);
  float* const errors = side.errors + threadIdx.x;
  float scale = 0.0f, inverse = 0.0f, ahead = 0.0f;  // ahead: the first weights of the next channel
  for (int c = 0; c < side.dim; ++c) {
    if (c % kTrellisGroup == 0) {
      scale = trellis_scale(side.space.scales[c / kTrellisGroup * kPageTokens + token]);
      inverse = scale > 0.0f ? kGain / scale : 0.0f;
      if (key) {
        const float largest = __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(scale)));
        const float share = largest > 0.0f ? scale / largest : 0.0f;
        space.weights[lane] = share * share;
      }
    }
    const float exact = side.number(token, c) - side.space.offsets[c];
    float wanted = exact;
    if (side.feedback != nullptr) {
      for (int first = 0; first < c; first += 32) {
        const float weights = ahead;
        ahead = feedback_weight(side, c, first + 32);
#pragma unroll 8
        for (int i = first; i < min(c, first + 32); ++i) {
          wanted = wanted + __shfl_sync(~0u, weights, i - first) * errors[i * kPageTokens];
        }
      }
      if (c + 1 < side.dim) ahead = feedback_weight(side, c + 1, 0);
    }
    const float level = wanted * inverse;
    // What is not a number, of infinite weights, is negative on the CPU.
    space.targets[lane] = fabsf(level) < kFarLevel ? level : (level > 0.0f ? kFarLevel : -kFarLevel);
    const int window = viterbi.template search<key>();
    writer.put(c, static_cast<uint32_t>(window) & ((1u << bits) - 1));
    if (side.feedback != nullptr) errors[c * kPageTokens] = exact - scale * side.space.levels[window];
  }
}

template <int bits, bool key>
__device__ void seal_side(const TrellisSide& side, int32_t* header) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int w = thread; w < kLevels; w += kTrellisThreads) {
    side.space.levels[w] = static_cast<float>(kLevelTables.of[bits - kTrellisBits.front()][w]) - kLevelCentre;
  }
  int largest = 0;
  if constexpr (key) {
    largest = store_offsets<bits>(side);
  } else {
    for (int c = thread; c < side.dim; c += kTrellisThreads) side.space.offsets[c] = 0.0f;
    __syncthreads();
    store_scales<bits>(side);
    largest = largest_scale(side).stored;
  }
  __syncthreads();
  if (thread == 0) {
    header[key ? 0 : 1] = scale_exponent(trellis_scale(static_cast<uint8_t>(largest)));
    if (key) header[2] = 0, header[3] = largest;
  }
  uint8_t* const scales = side.part + code_bytes(kTrellis + bits, side.dim);
  for (int at = thread; at < side.groups() * kPageTokens; at += kTrellisThreads) {
    scales[at / kPageTokens * kPageTokens + trellis_scale_slot(key, at % kPageTokens)] = side.space.scales[at];
  }
  encode_chain<bits, key>(side);
}

__host__ __device__ constexpr int tile_bytes_of(int dim) { return kPageTokens * tile_row(dim) * 2; }

// Of a multiprocessor's blocks shared memory is the bound: two with feedback at head_dim 128, four without.
__global__ void __launch_bounds__(kTrellisThreads, 4) trellis_seal_kernel(const __grid_constant__ SealArguments args) {
  extern __shared__ __align__(16) uint8_t dynamic[];
  __shared__ TrellisSpace space;
  const bool key = blockIdx.z == 0;
  const int at_layer = layer_of_block(args);
  const SealLayer& layer = args.layers[at_layer];
  const SideShape shape = key ? layer.shape.key() : layer.shape.value();
  if (!shape.trellis()) return;  // seal.cu's
  const auto [open, record] = place_of_block(args, at_layer);
  if (record == nullptr) return;
  const kvmix_cuda_transform& transform = key ? layer.key_transform : layer.value_transform;
  auto* const tile = reinterpret_cast<__half*>(dynamic);
  HeadDims::visit(shape.head_dim, [&](auto dim) {
    const bool transformed = transform.center != nullptr || transform.hadamard != 0;
    load_page<dim, kTrellisThreads>(open, layer.open, key, transformed, tile);
    __syncthreads();
    if (transformed) transform_tile<dim, kTrellisWarps>(transform, false, tile);
  });
  __syncthreads();
  const int dim = shape.head_dim;
  const TrellisSide side{
      dim,
      tile,
      transform.feedback == nullptr ? nullptr : transform.feedback + static_cast<int64_t>(blockIdx.y) * (dim * (dim - 1) / 2),
      reinterpret_cast<float*>(dynamic + tile_bytes_of(dim)),
      space,
      record + (key ? kHeaderBytes : layer.shape.key_bytes())};
  auto* const header = reinterpret_cast<int32_t*>(record);
  TrellisWidths::visit(shape.bits, [&](auto width) {
    constexpr int bits = code_bits(width);
    key ? seal_side<bits, true>(side, header) : seal_side<bits, false>(side, header);
  });
}

}  // namespace

void seal_trellis(std::span<const SealJob> jobs) {
  launch_seals(
      jobs,
      [](const SealJob& job) {
        return SealKernel{has_trellis(job.params.format) ? trellis_seal_kernel : nullptr, kTrellisThreads};
      },
      [](const SealJob& job) {
        const kvmix_cuda_seal_params& p = job.params;
        const bool feedback = (is_trellis_width(p.format.key_bits) && p.key_transform.feedback != nullptr) ||
                              (is_trellis_width(p.format.value_bits) && p.value_transform.feedback != nullptr);
        return tile_bytes_of(p.format.head_dim) + (feedback ? p.format.head_dim * kPageTokens * 4 : 0);
      });
}

}  // namespace kvmix::cuda
