// Seals open pages into records, and appends rows to open pages.
//
// A block seals one side of one page of one KV head: the tile goes to shared memory as fp16, transformed if asked; scales and
// midpoints follow quantize.h's arithmetic (compiled without fused multiply-adds but those it names, so scales and codes equal
// the CPU codec's to the bit): min-max from packed minima and maxima of 32 elements, fits with four threads a group that hold
// their values in registers; then every lane packs the words of its fragments (codec/cuda/tile_layout.h) straight from the
// tile.
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "base/cuda/fragments.cuh"
#include "base/fp16.h"
#include "codec/cuda/feedback.cuh"
#include "codec/cuda/fit.cuh"
#include "codec/cuda/open_tile.cuh"
#include "codec/cuda/seal_launch.cuh"
#include "codec/quantize.h"

namespace kvmix::cuda {
namespace {

constexpr int kSegment = 32;

// Shared memory: the tile, the ranges of segments (half2 low, high) and then the weights of error feedback, the CodeMap of
// every group and, for feedback, its scale and midpoint (half2), rounding errors.
struct SealSpace {
  int ranges, groups, kept, errors, bytes;
};
__host__ __device__ inline SealSpace seal_space(const SideShape& side, bool feedback) {
  SealSpace space{};
  space.ranges = kPageTokens * tile_row(side.head_dim) * 2;
  const int ranges = kPageTokens / kSegment * side.head_dim * 8;
  const int weights = feedback ? side.head_dim * feedback_block(side.head_dim) * 4 : 0;
  space.groups = space.ranges + (ranges > weights ? ranges : weights);
  space.kept = space.groups + side.meta_bytes() / 4 * 8 + 16;
  space.errors = space.kept + (feedback ? (side.meta_bytes() + 15) / 16 * 16 : 0);
  space.bytes = space.errors + (feedback ? side.head_dim * feedback_tokens(side.head_dim) * 4 : 0);
  return space;
}

// What words hold beside codes when every code came with the bits of kRoundToInteger below it, shifted to its place.
template <int bits>
__host__ __device__ constexpr uint32_t word_bias(int word) {
  constexpr uint32_t kInteger = 0x4b400000u;  // of kRoundToInteger
  uint32_t sum = 0;
  for (int field = 0; field < 8; ++field) {
    for (int reg = 0; reg < 4; ++reg) {
      if (bits == 3 && field == 7 && reg >= 2) continue;
      const CodePlace place = code_place(bits, reg, field);
      if (place.word == word) sum += kInteger * (1u << place.bit) + kInteger * (1u << place.bit) * 65536u;
    }
  }
  return sum;
}

template <int dim, bool key, int bits>
__device__ void pack_codes(const SideShape& side, const __half* tile, const CodeMap* groups, uint8_t* part) {
  constexpr float kTop = static_cast<float>((1 << (bits % 16)) - 1);
  constexpr uint32_t kMask = (1u << bits) - 1;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  constexpr unsigned row_halves = tile_row(dim), tiles = dim / 16;
  const int group_shift = 31 - __clz(side.group);
  const bool per_token = !key || side.per_token;
  // A fragment's registers are 8 x 8 tiles, those with further rows and with further columns in turn.
  const int token = lane % 8 + (key ? lane / 8 % 2 : lane / 16) * 8, channel = (key ? lane / 16 : lane / 8 % 2) * 8;
  const uint32_t fragment_row = shared_address(tile + token * static_cast<int>(row_halves) + channel);
  for (unsigned block = threadIdx.x / 32; block < tiles; block += kSealWarps) {
    uint32_t w[block_words(bits)] = {};
    float4 maps[4];  // of both codes of a register
#pragma unroll
    for (int field = 0; field < 8; ++field) {
      const unsigned token0 = 16 * static_cast<unsigned>(field), channel0 = 16 * block;
      // A tile lies in one group.
      if (bits != 16 && (per_token || (token0 & static_cast<unsigned>(side.group - 1)) == 0)) {
        const CodeMap* const from =
            groups + (per_token ? (channel0 >> group_shift) * kPageTokens + token0 : (token0 >> group_shift) * dim + channel0);
        if (key && per_token) {  // the same for neighbours
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const CodeMap same = from[lane / 4 + 8 * i];
            maps[i] = maps[i + 2] = {same.factor, same.offset, same.factor, same.offset};
          }
        } else {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            maps[2 * i] = maps[2 * i + 1] = *reinterpret_cast<const float4*>(from + 2 * (lane % 4) + 8 * i);
          }
        }
      }
      uint32_t v[4];
      load_tiles(fragment_row + (token0 * row_halves + channel0) * 2, !key, v);
#pragma unroll
      for (int reg = 0; reg < 4; ++reg) {
        if constexpr (bits == 16) {
          w[code_place(16, reg, field).word] = v[reg];
        } else {
          const float4 g = maps[reg];
          const float2 x = __half22float2(half2_of(v[reg]));
          const uint32_t c0 = __float_as_uint(raised_code(x.x, {g.x, g.y}, kTop));
          const uint32_t c1 = __float_as_uint(raised_code(x.y, {g.z, g.w}, kTop));
          if (bits == 3 && field == 7 && reg >= 2) {
#pragma unroll
            for (int b = 0; b < bits; ++b) {
              const CodePlace place = code_bit_place(bits, reg, field, b);
              w[place.word % block_words(bits)] +=
                  (((c0 & kMask) >> b & 1u) << place.bit) | (((c1 & kMask) >> b & 1u) << (place.bit + 16));
            }
          } else {
            // What the constant's bits add is known, and taken away once a word.
            const CodePlace place = code_place(bits, reg, field);
            w[place.word % block_words(bits)] += (c0 + (c1 << 16)) << place.bit;
          }
        }
      }
    }
    if constexpr (bits != 16) {
#pragma unroll
      for (int i = 0; i < block_words(bits); ++i) w[i] -= word_bias<bits>(i);
    }
    uint8_t* const to = part + block * block_bytes(bits);
#pragma unroll
    for (int i = 0; i < block_words(bits) / 4; ++i) {
      reinterpret_cast<uint4*>(to + 512 * i)[lane] = {w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3]};
    }
    if constexpr (block_words(bits) % 4 == 2) {
      constexpr int kLast = block_words(bits) - 2;
      reinterpret_cast<uint2*>(to + 512 * (block_words(bits) / 4))[lane] = {w[kLast], w[kLast + 1]};
    }
  }
}

template <int dim, bool key>
__device__ void pack_codes(const SideShape& side, const __half* tile, const CodeMap* groups, uint8_t* part) {
  Widths::visit(side.bits, [&](auto bits) { pack_codes<dim, key, bits>(side, tile, groups, part); });
}

// What a kernel can do; transforms and feedback apart, as they take registers, and there scales of a side are of either kind.
enum class Way { kMinMax, kFitted, kTransformed, kFeedback };

template <int dim, Way way>
__global__ void __launch_bounds__(kSealThreads, way == Way::kFeedback      ? 2
                                                : way == Way::kTransformed ? 3
                                                                           : 4)
    seal_kernel(const __grid_constant__ SealArguments args) {
  extern __shared__ __align__(16) uint8_t space[];
  __shared__ float largest[kSealWarps];
  const bool key = blockIdx.z == 0;
  const int at_layer = layer_of_block(args);
  const SealLayer& layer = args.layers[at_layer];
  const SideShape side = key ? layer.shape.key() : layer.shape.value();
  const kvmix_cuda_transform& transform = key ? layer.key_transform : layer.value_transform;
  constexpr bool changed = way == Way::kTransformed || way == Way::kFeedback;
  const bool feedback = way == Way::kFeedback && transform.feedback != nullptr && side.bits != 16;
  const int thread = static_cast<int>(threadIdx.x);
  constexpr int row_halves = tile_row(dim);
  const SealSpace layout = seal_space(side, feedback);
  auto* const tile = reinterpret_cast<__half*>(space);
  auto* const groups = reinterpret_cast<CodeMap*>(space + layout.groups);
  auto* const kept = reinterpret_cast<__half2*>(space + layout.kept);
  if (side.trellis()) return;  // trellis_seal.cu's
  const auto [open, record] = place_of_block(args, at_layer);
  if (record == nullptr) return;
  uint8_t* const part = record + (key ? kHeaderBytes : layer.shape.key_bytes());

  const bool transformed = changed && (transform.center != nullptr || transform.hadamard != 0);
  load_page<dim, kSealThreads>(open, layer.open, key, transformed || side.bits == 16, tile);
  __syncthreads();
  if constexpr (changed) {
    if (transformed) transform_tile<dim, kSealWarps>(transform, side.bits == 16, tile);
    __syncthreads();
  }

  float most = 0.0f;
  if (side.bits != 16) {
    const float top = static_cast<float>((1 << side.bits) - 1);
    auto* const meta = reinterpret_cast<uint16_t*>(part + side.meta());
    const int width = side.per_token ? kPageTokens : dim, count_of_groups = side.groups() * width;
    const auto store = [&](int at, int i, int g, GroupScale stored) {
      const float scale = f16_to_f32(stored.scale);
      most = fmaxf(most, scale);
      groups[at] = code_map(scale, f16_to_f32(stored.mid), top);
      const int to = g * side.group_halves() + scale_slot(i);
      meta[to] = stored.scale;
      meta[to + kMidStep] = stored.mid;
      if (feedback) kept[at] = __halves2half2(__ushort_as_half(stored.scale), __ushort_as_half(stored.mid));
    };
    if (way == Way::kFitted || (changed && (key ? layer.keys_fitted : layer.values_fitted))) {
      auto* const fits = reinterpret_cast<GroupScale*>(space + layout.ranges);
      // Whole warps: `width` is a multiple of the eight groups that a warp takes.
      for (int job = thread; job < count_of_groups * kPartialSums; job += kSealThreads) {
        const int at = job / kPartialSums, i = at % width, g = at / width, first = g * side.group;
        const int line = i - thread % 32 / kPartialSums;
        const auto fit = [&](auto values) {
          return fit_values<values.value, row_halves>(tile, !side.per_token, line, first, side.bits,
                                                      key ? layer.keys_unbiased : layer.values_unbiased);
        };
        GroupScale stored;
        // A last group of channels may be shorter.
        List<32, 64, 96, 128>::visit(side.per_token && dim - first < side.group ? dim - first : side.group,
                                     [&](auto count) { stored = fit(std::integral_constant<int, count / kPartialSums>{}); });
        if (job % kPartialSums == 0) fits[at] = stored;
      }
      __syncthreads();
      for (int at = thread; at < count_of_groups; at += kSealThreads) store(at, at % width, at / width, fits[at]);
    } else {
      auto* const lows = reinterpret_cast<__half2*>(space + layout.ranges);
      auto* const highs = lows + kPageTokens / kSegment * dim;
      // Ranges of 32 channels of a token, or of 32 tokens of two channels.
      if (side.per_token) {
        for (int at = thread; at < kPageTokens * (dim / kSegment); at += kSealThreads) {
          const auto* x = reinterpret_cast<const uint4*>(tile + at % kPageTokens * row_halves + at / kPageTokens * kSegment);
          __half2 low = __float2half2_rn(65504.0f), high = __float2half2_rn(-65504.0f);
#pragma unroll
          for (int i = 0; i < kSegment / 8; ++i) {
            const uint4 v = x[i];
            for (const uint32_t word : {v.x, v.y, v.z, v.w}) {
              const __half2 pair = reinterpret_cast<const __half2&>(word);
              low = __hmin2(low, pair), high = __hmax2(high, pair);
            }
          }
          lows[at] = low, highs[at] = high;
        }
      } else {
        for (int at = thread; at < dim / 2 * (kPageTokens / kSegment); at += kSealThreads) {
          const auto* x = reinterpret_cast<const __half2*>(tile + at / (dim / 2) * kSegment * row_halves) + at % (dim / 2);
          __half2 low = x[0], high = low;
#pragma unroll
          for (int i = 1; i < kSegment; ++i) {
            const __half2 v = x[i * (row_halves / 2)];
            low = __hmin2(low, v), high = __hmax2(high, v);
          }
          lows[at] = low, highs[at] = high;
        }
      }
      const int lines = side.per_token ? kPageTokens : dim / 2;
      __syncthreads();
      for (int at = thread; at < count_of_groups; at += kSealThreads) {
        const int i = at % width, g = at / width, first = g * side.group;
        const int count = side.per_token && dim - first < side.group ? dim - first : side.group;
        float low = 65504.0f, high = -65504.0f;
        for (int segment = first / kSegment; segment < (first + count) / kSegment; ++segment) {
          const int line = segment * lines + (side.per_token ? i : i / 2);
          const float2 l = __half22float2(lows[line]), h = __half22float2(highs[line]);
          low = fminf(low, side.per_token ? fminf(l.x, l.y) : i % 2 == 0 ? l.x : l.y);
          high = fmaxf(high, side.per_token ? fmaxf(h.x, h.y) : i % 2 == 0 ? h.x : h.y);
        }
        store(at, i, g, min_max_scale(coded_range({low, high}, true), top));
      }
    }
  }
  for (int step = 1; step < 32; step *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
  if (thread % 32 == 0) largest[thread / 32] = most;
  __syncthreads();
  if (thread == 0) {
    float all = 0.0f;
    for (int warp = 0; warp < kSealWarps; ++warp) all = fmaxf(all, largest[warp]);
    auto* const header = reinterpret_cast<int32_t*>(record);
    header[key ? 0 : 1] = side.bits == 16 ? 0 : scale_exponent(all);
    if (key) header[2] = header[3] = 0;
  }
  if constexpr (way == Way::kFeedback)
    if (feedback) {
      feed_back<dim>(side, transform.feedback + static_cast<int64_t>(blockIdx.y) * (dim * (dim - 1) / 2), groups, kept,
                     reinterpret_cast<float*>(space + layout.errors), reinterpret_cast<float*>(space + layout.ranges), tile);
      __syncthreads();
      // The tile holds codes now.
      const float factor = 1.0f / static_cast<float>((1 << side.bits) - 1);
      for (int at = thread; at < side.meta_bytes() / 4; at += kSealThreads) groups[at] = {factor, 0.0f};
      __syncthreads();
    }
  if (key) {
    pack_codes<dim, true>(side, tile, groups, part);
  } else {
    pack_codes<dim, false>(side, tile, groups, part);
  }
}

struct AppendArguments {
  kvmix_cuda_append_params p;
};

// A block copies one head's keys or values of 8 rows.
__global__ void append_kernel(const __grid_constant__ AppendArguments args) {
  const kvmix_cuda_append_params& p = args.p;
  const int octets = p.head_dim / 8, row = static_cast<int>(blockIdx.x * blockDim.y + threadIdx.y);
  if (row >= p.rows || static_cast<int>(threadIdx.x) >= octets) return;
  const int64_t slot = p.slots[row];
  if (slot < 0) return;
  const bool key = blockIdx.z == 0;
  const auto* from = static_cast<const uint8_t*>(key ? p.keys : p.values) + row * p.row_stride + blockIdx.y * p.head_stride;
  uint4 v = reinterpret_cast<const uint4*>(from)[threadIdx.x];
  if (p.bf16 != 0) v = {f16_of_bf16(v.x), f16_of_bf16(v.y), f16_of_bf16(v.z), f16_of_bf16(v.w)};
  auto* to = static_cast<uint8_t*>(p.open_pages) + slot / kPageTokens * p.open_page_stride + blockIdx.y * p.open_head_stride +
             (slot % kPageTokens + (key ? 0 : kPageTokens)) * p.head_dim * 2;
  reinterpret_cast<uint4*>(to)[threadIdx.x] = v;
}

template <Way way>
SealKernel kernel_of(int head_dim) {
  SealKernel kernel{nullptr, kSealThreads};
  if (!HeadDims::visit(head_dim, [&](auto dim) { kernel.kernel = seal_kernel<dim, way>; }))
    throw Error(Status::kUnsupported, "seal: head_dim " + std::to_string(head_dim) + " has no kernel");
  return kernel;
}
SealKernel kernel_of(const SealJob& job) {
  const kvmix_cuda_seal_params& p = job.params;
  if (is_trellis_width(p.format.key_bits) && is_trellis_width(p.format.value_bits)) return {nullptr, 0};
  const auto any = [&](auto&& has) { return has(p.key_transform) || has(p.value_transform); };
  const int dim = p.format.head_dim;
  if (any([](const kvmix_cuda_transform& t) { return t.feedback != nullptr; })) return kernel_of<Way::kFeedback>(dim);
  if (any([](const kvmix_cuda_transform& t) { return t.center != nullptr || t.hadamard != 0; })) {
    return kernel_of<Way::kTransformed>(dim);
  }
  if (keys_fitted(job) != values_fitted(job)) return kernel_of<Way::kTransformed>(dim);
  return keys_fitted(job) ? kernel_of<Way::kFitted>(dim) : kernel_of<Way::kMinMax>(dim);
}

int shared_of(const SealJob& job) {
  const kvmix_cuda_seal_params& p = job.params;
  const RecordShape shape = record_shape(p.format);
  const auto bytes = [](const SideShape& side, const kvmix_cuda_transform& transform) {
    return side.trellis() ? 0 : seal_space(side, transform.feedback != nullptr).bytes;
  };
  return std::max(bytes(shape.key(), p.key_transform), bytes(shape.value(), p.value_transform));
}

}  // namespace

void seal(std::span<const SealJob> jobs) {
  launch_seals(
      jobs, [](const SealJob& job) { return kernel_of(job); }, shared_of);
  seal_trellis(jobs);
}

void seal(const kvmix_cuda_seal_params& p, const SealDetails& details) {
  const SealJob job{p, details};
  seal({&job, 1});
}

void append(const kvmix_cuda_append_params& p) {
  const dim3 block(static_cast<unsigned>(p.head_dim / 8), 8);
  const dim3 grid(static_cast<unsigned>((p.rows + 7) / 8), static_cast<unsigned>(p.kv_heads), 2);
  append_kernel<<<grid, block, 0, static_cast<cudaStream_t>(p.stream)>>>(AppendArguments{p});
  check_cuda(cudaGetLastError(), "append: launch");
}

}  // namespace kvmix::cuda
