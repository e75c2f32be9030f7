// Seals open pages into records, and appends rows to open pages.
//
// A block seals one side of one page of one KV head: the tile goes to shared memory as fp16, ranges are taken
// per 32 elements with packed minima and maxima, one thread a group makes scale and midpoint with quantize.h's arithmetic
// (compiled without fused multiply-adds, so scales and codes equal the CPU codec's to the bit), and every lane packs the words
// of its fragments (tile_layout_cuda.h) straight from the tile.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "attention/cuda_support.h"
#include "attention/launch_cuda.h"
#include "base/fp16.h"
#include "codec/quantize.h"

namespace kvmix::cuda {
namespace {

constexpr int kSegment = 32;
__host__ __device__ constexpr int seal_threads(bool fitted) { return fitted ? 128 : 256; }

struct SealArguments {
  const uint8_t* open_pages;
  int64_t open_page_stride, open_head_stride;
  uint8_t* records;
  int64_t record_page_stride, record_head_stride;
  const int32_t* open_ids;
  const int32_t* record_ids;
  RecordShape shape;
  Fit fit;
};

// Halves of a row of the tile. Fits walk rows side by side: an odd number of words. Otherwise fragments are what is read most:
// four banks further a row.
__host__ __device__ constexpr int tile_row(int head_dim, bool fitted) { return head_dim + (fitted ? 2 : 8); }

// Shared memory: the tile, the ranges of segments (half2 low, high), midpoint and inverse scale of every group.
struct SealSpace {
  int ranges, groups, bytes;
};
__host__ __device__ inline SealSpace seal_space(const SideShape& side, bool fitted) {
  SealSpace space{};
  space.ranges = (kPageTokens * tile_row(side.head_dim, fitted) * 2 + 15) / 16 * 16;
  space.groups = space.ranges + kPageTokens / kSegment * side.head_dim * 8;
  space.bytes = space.groups + side.meta_bytes() / 4 * 8 + 16;
  return space;
}

// A group's values in the tile.
struct TileValues {
  const __half* first;
  int step;
  __device__ float operator[](int i) const { return __half2float(first[i * step]); }
};

template <int dim, bool fitted, bool key, int bits>
__device__ void pack_codes(const SideShape& side, const __half* tile, const float2* groups, uint8_t* part) {
  constexpr float kTop = static_cast<float>((1 << (bits % 16)) - 1), kCentre = kTop * 0.5f;
  constexpr uint32_t kMask = (1u << bits) - 1;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  constexpr int row_halves = tile_row(dim, fitted), tiles = dim / 16;
  const int group_shift = 31 - __clz(side.group);
  for (int block = warp; block < tiles; block += seal_threads(fitted) / 32) {
    uint32_t w[block_words(bits)] = {};
#pragma unroll
    for (int field = 0; field < 8; ++field) {
      const int index = block * 8 + field, token0 = index / tiles * 16, channel0 = index % tiles * 16;
#pragma unroll
      for (int reg = 0; reg < 4; ++reg) {
        const int row = lane / 4 + 8 * (reg % 2), column = 2 * (lane % 4) + 8 * (reg / 2);
        const int token = token0 + (key ? row : column), channel = channel0 + (key ? column : row);
        const __half* const at = tile + token * row_halves + channel;
        __half2 pair;
        if constexpr (key) {
          pair = *reinterpret_cast<const __half2*>(at);
        } else {
          pair = __halves2half2(at[0], at[row_halves]);
        }
        if constexpr (bits == 16) {
          w[code_place(16, reg, field).word] = reinterpret_cast<const uint32_t&>(pair);
        } else {
          // (midpoint, inverse scale) of both; neighbours in their order unless they are the same group.
          const int group =
              side.per_token ? (channel >> group_shift) * kPageTokens + token : (token >> group_shift) * dim + channel;
          float4 g;
          if (key && side.per_token) {
            const float2 same = groups[group];
            g = {same.x, same.y, same.x, same.y};
          } else {
            g = *reinterpret_cast<const float4*>(groups + group);
          }
          const float2 x = __half22float2(pair);
          // As quantize_code: the integer stands in the low bits once 1.5 * 2^23 is added.
          const float v0 = fmaxf(fminf((x.x - g.x) * g.y + kCentre, kTop), 0.0f);
          const float v1 = fmaxf(fminf((x.y - g.z) * g.w + kCentre, kTop), 0.0f);
          const uint32_t c0 = __float_as_uint(v0 + 12582912.0f) & kMask, c1 = __float_as_uint(v1 + 12582912.0f) & kMask;
          if (bits == 3 && field == 7 && reg >= 2) {
#pragma unroll
            for (int b = 0; b < bits; ++b) {
              const CodePlace place = code_bit_place(bits, reg, field, b);
              w[place.word % block_words(bits)] |= ((c0 >> b & 1u) << place.bit) | ((c1 >> b & 1u) << (place.bit + 16));
            }
          } else {
            const CodePlace place = code_place(bits, reg, field);
            w[place.word % block_words(bits)] |= (c0 | c1 << 16) << place.bit;
          }
        }
      }
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

template <int dim, bool fitted, bool key>
__device__ void pack_codes(const SideShape& side, const __half* tile, const float2* groups, uint8_t* part) {
  switch (side.bits) {
    case 1:
      return pack_codes<dim, fitted, key, 1>(side, tile, groups, part);
    case 2:
      return pack_codes<dim, fitted, key, 2>(side, tile, groups, part);
    case 3:
      return pack_codes<dim, fitted, key, 3>(side, tile, groups, part);
    case 4:
      return pack_codes<dim, fitted, key, 4>(side, tile, groups, part);
    case 8:
      return pack_codes<dim, fitted, key, 8>(side, tile, groups, part);
    default:
      return pack_codes<dim, fitted, key, 16>(side, tile, groups, part);
  }
}

// What is not finite counts as zero.
__device__ inline uint32_t finite_pair(uint32_t v) {
  if ((v & 0x7c00u) == 0x7c00u) v &= 0xffff0000u;
  if ((v & 0x7c000000u) == 0x7c000000u) v &= 0xffffu;
  return v;
}

template <int dim, bool fitted>
__global__ void __launch_bounds__(seal_threads(fitted)) seal_kernel(const __grid_constant__ SealArguments args) {
  extern __shared__ __align__(16) uint8_t space[];
  constexpr int kSealThreads = seal_threads(fitted), kSealWarps = kSealThreads / 32;
  __shared__ float largest[kSealWarps];
  const bool key = blockIdx.z == 0;
  const SideShape side = key ? args.shape.key() : args.shape.value();
  const int thread = static_cast<int>(threadIdx.x);
  constexpr int row_halves = tile_row(dim, fitted), octets = dim / 8;
  const SealSpace layout = seal_space(side, fitted);
  auto* const tile = reinterpret_cast<__half*>(space);
  auto* const lows = reinterpret_cast<__half2*>(space + layout.ranges);
  auto* const highs = lows + kPageTokens / kSegment * dim;
  auto* const groups = reinterpret_cast<float2*>(space + layout.groups);
  const auto* const source =
      reinterpret_cast<const uint4*>(args.open_pages + args.open_ids[blockIdx.x] * args.open_page_stride +
                                     static_cast<int64_t>(blockIdx.y) * args.open_head_stride) +
      (key ? 0 : kPageTokens * dim / 8);
  uint8_t* const record = args.records + args.record_ids[blockIdx.x] * args.record_page_stride +
                          static_cast<int64_t>(blockIdx.y) * args.record_head_stride;
  uint8_t* const part = record + (key ? kHeaderBytes : args.shape.key_bytes());

#pragma unroll 8
  for (int at = thread; at < kPageTokens * octets; at += kSealThreads) {
    const uint4 v = __ldcs(source + at);
    auto* const to = reinterpret_cast<uint32_t*>(tile + at / octets * row_halves + at % octets * 8);
    if constexpr (!fitted) {
      *reinterpret_cast<uint4*>(to) =
          side.bits == 16 ? v : uint4{finite_pair(v.x), finite_pair(v.y), finite_pair(v.z), finite_pair(v.w)};
      continue;
    }
    if (side.bits == 16) {
      to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    } else {
      to[0] = finite_pair(v.x), to[1] = finite_pair(v.y), to[2] = finite_pair(v.z), to[3] = finite_pair(v.w);
    }
  }
  __syncthreads();

  float most = 0.0f;
  if (side.bits != 16) {
    // Ranges of 32 tokens of two channels, or of 32 channels of a token.
    const auto ranges = [&](int lines, int segments, int line_step, int segment_step, int step, int count) {
      for (int at = thread; at < lines * segments; at += kSealThreads) {
        const auto* x = reinterpret_cast<const __half2*>(tile + at % lines * line_step + at / lines * segment_step);
        // Lanes that walk rows start at different words, for the sake of banks.
        const int turn = step == 1 && !fitted ? thread / 8 % 4 : 0;
        __half2 low = x[turn], high = low;
#pragma unroll
        for (int i = 1; i < count; ++i) {
          const __half2 v = x[(i + turn) % count * step];
          low = __hmin2(low, v), high = __hmax2(high, v);
        }
        lows[at] = low, highs[at] = high;
      }
    };
    if (side.per_token) {
      ranges(kPageTokens, dim / kSegment, row_halves, kSegment, 1, kSegment / 2);
    } else {
      ranges(dim / 2, kPageTokens / kSegment, 2, kSegment * row_halves, row_halves / 2, kSegment);
    }
    const int lines = side.per_token ? kPageTokens : dim / 2;
    __syncthreads();
    auto* const meta = reinterpret_cast<uint16_t*>(part + side.meta());
    const int width = side.per_token ? kPageTokens : dim;
    for (int at = thread; at < side.groups() * width; at += kSealThreads) {
      const int i = at % width, g = at / width, first = g * side.group;
      const int count = side.per_token && dim - first < side.group ? dim - first : side.group;
      float low = 65504.0f, high = -65504.0f;
      for (int segment = first / kSegment; segment < (first + count) / kSegment; ++segment) {
        const int line = segment * lines + (side.per_token ? i : i / 2);
        const float2 l = __half22float2(lows[line]), h = __half22float2(highs[line]);
        low = fminf(low, side.per_token ? fminf(l.x, l.y) : i % 2 == 0 ? l.x : l.y);
        high = fmaxf(high, side.per_token ? fmaxf(h.x, h.y) : i % 2 == 0 ? h.x : h.y);
      }
      const TileValues x =
          side.per_token ? TileValues{tile + i * row_halves + first, 1} : TileValues{tile + first * row_halves + i, row_halves};
      if (low == 0.0f && high == 0.0f) low = high = x[0];  // the sign of the first zero, as one after the other
      const GroupScale stored =
          quantize_range(x, count, {low, high}, side.bits, args.fit, true, static_cast<uint8_t*>(nullptr));
      const float scale = f16_to_f32(stored.scale);
      most = fmaxf(most, scale);
      groups[at] = make_float2(f16_to_f32(stored.mid), scale > 0.0f ? 1.0f / scale : 0.0f);
      const int to = side.per_token ? g * kPageTokens * 2 + value_scale_slot(i) : g * dim + key_scale_slot(dim, i);
      meta[to] = stored.scale;
      meta[to + side.mid_step()] = stored.mid;
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
  if (key) {
    pack_codes<dim, fitted, true>(side, tile, groups, part);
  } else {
    pack_codes<dim, fitted, false>(side, tile, groups, part);
  }
}

struct AppendArguments {
  kvmix_cuda_append_params p;
};

__device__ inline uint32_t f16_of_bf16(uint32_t v) {
  const auto half = [](float x) { return static_cast<uint32_t>(saturate_f16(x)); };
  return half(__uint_as_float(v << 16)) | half(__uint_as_float(v & 0xffff0000u)) << 16;
}

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

template <bool fitted>
auto kernel_of(int head_dim) {
  switch (head_dim) {
    case 64:
      return seal_kernel<64, fitted>;
    case 96:
      return seal_kernel<96, fitted>;
    case 128:
      return seal_kernel<128, fitted>;
    default:
      return seal_kernel<256, fitted>;
  }
}

}  // namespace

void seal(const kvmix_cuda_seal_params& p) {
  const SealArguments a{static_cast<const uint8_t*>(p.open_pages),
                        p.open_page_stride,
                        p.open_head_stride,
                        static_cast<uint8_t*>(p.records),
                        p.record_page_stride,
                        p.record_head_stride,
                        p.open_ids,
                        p.record_ids,
                        record_shape(p.format),
                        p.fitted != 0 ? Fit::kLeastSquares : Fit::kMinMax};
  const bool fitted = p.fitted != 0;
  const int keys = seal_space(a.shape.key(), fitted).bytes, values = seal_space(a.shape.value(), fitted).bytes;
  const int shared = keys > values ? keys : values;
  auto* const kernel = fitted ? kernel_of<true>(p.format.head_dim) : kernel_of<false>(p.format.head_dim);
  allow_shared(kernel, shared, "seal: shared memory");
  const dim3 grid(static_cast<unsigned>(p.pages), static_cast<unsigned>(p.kv_heads), 2);
  kernel<<<grid, seal_threads(fitted), static_cast<size_t>(shared), static_cast<cudaStream_t>(p.stream)>>>(a);
  check_cuda(cudaGetLastError(), "seal: launch");
}

void append(const kvmix_cuda_append_params& p) {
  const dim3 block(static_cast<unsigned>(p.head_dim / 8), 8);
  const dim3 grid(static_cast<unsigned>((p.rows + 7) / 8), static_cast<unsigned>(p.kv_heads), 2);
  append_kernel<<<grid, block, 0, static_cast<cudaStream_t>(p.stream)>>>(AppendArguments{p});
  check_cuda(cudaGetLastError(), "append: launch");
}

}  // namespace kvmix::cuda
