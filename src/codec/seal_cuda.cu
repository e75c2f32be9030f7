// Seals open pages into records: a block of 128 threads takes one page of one KV head, keys then values, one thread a group
// row. The arithmetic is quantize.h's, so codes and scales equal the CPU codec's to the bit (compiled without fused
// multiply-adds); only their order differs (tile_layout_cuda.h).
#include <cuda_runtime.h>

#include "attention/cuda_support.h"
#include "base/fp16.h"
#include "codec/quantize.h"

namespace kvmix::cuda {
namespace {

constexpr int kRowFloats = 129, kRowCodes = 132;  // padded: threads walk rows side by side
constexpr int kSealShared = 128 * kRowFloats * 4 + 128 * kRowCodes;

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

// Words of a side's codes from codes[row][column], row = channel for keys and token for values.
template <int bits>
__device__ void store_codes(bool key, const uint8_t* codes, uint8_t* out) {
  for (int at = static_cast<int>(threadIdx.x); at < kPageBlocks * 32 * block_words(bits); at += 128) {
    const int block = at / (32 * block_words(bits)), lane = at / block_words(bits) % 32, word = at % block_words(bits);
    uint32_t packed = 0;
#pragma unroll
    for (int reg = 0; reg < 4; ++reg) {
#pragma unroll
      for (int field = 0; field < 8; ++field) {
        const CodePlace place = code_place(bits, reg, field);
        if (place.word != word) continue;
        const int row = lane / 4 + 8 * (reg % 2), column = 2 * (lane % 4) + 8 * (reg / 2);
        for (int half = 0; half < 2; ++half) {
          const int token = 16 * block + (key ? row : column + half), channel = 16 * field + (key ? column + half : row);
          const uint32_t code = key ? codes[channel * kRowCodes + token] : codes[token * kRowCodes + channel];
          packed |= code << (place.bit + 16 * half);
        }
      }
    }
    *reinterpret_cast<uint32_t*>(out + block * block_bytes(bits) + word_offset(bits, lane, word)) = packed;
  }
}

__device__ void store_codes(int bits, bool key, const uint8_t* codes, uint8_t* out) {
  switch (bits) {
    case 1:
      return store_codes<1>(key, codes, out);
    case 2:
      return store_codes<2>(key, codes, out);
    case 4:
      return store_codes<4>(key, codes, out);
    default:
      return store_codes<8>(key, codes, out);
  }
}

__global__ void __launch_bounds__(128) seal_kernel(const SealArguments args) {
  extern __shared__ float values[];
  auto* const codes = reinterpret_cast<uint8_t*>(values + 128 * kRowFloats);
  __shared__ float largest[4];
  const int row = static_cast<int>(threadIdx.x);
  const auto* source = reinterpret_cast<const uint16_t*>(args.open_pages + args.open_ids[blockIdx.x] * args.open_page_stride +
                                                         static_cast<int64_t>(blockIdx.y) * args.open_head_stride);
  uint8_t* const record = args.records + args.record_ids[blockIdx.x] * args.record_page_stride +
                          static_cast<int64_t>(blockIdx.y) * args.record_head_stride;
  for (const bool key : {true, false}) {
    const int bits = key ? args.shape.key_bits : args.shape.value_bits;
    const int group = key ? args.shape.key_group : args.shape.value_group, groups = 128 / group;
    for (int token = 0; token < kPageTokens; ++token) {
      const uint16_t h = source[token * kBlockChannels + row];
      // As the CPU codec: what is not finite counts as zero.
      const float x = (h & 0x7c00u) == 0x7c00u ? 0.0f : f16_to_f32(h);
      values[key ? row * kRowFloats + token : token * kRowFloats + row] = x;
    }
    __syncthreads();
    uint8_t* const part = key ? record + kHeaderBytes : record + args.shape.key_bytes();
    auto* const meta = reinterpret_cast<uint16_t*>(part + code_bytes(bits));
    float most = 0.0f;
    for (int g = 0; g < groups; ++g) {
      const GroupScale stored = quantize_group(values + row * kRowFloats + g * group, group, bits, args.fit, true,
                                               codes + row * kRowCodes + g * group);
      most = fmaxf(most, f16_to_f32(stored.scale));
      const int at = key ? g * kBlockChannels + key_scale_slot(row) : g * kPageTokens * 2 + value_scale_slot(row);
      meta[at] = stored.scale;
      meta[at + (key ? groups * kBlockChannels : 2)] = stored.mid;
    }
    for (int step = 1; step < 32; step *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
    if (row % 32 == 0) largest[row / 32] = most;
    __syncthreads();
    if (row == 0) {
      const float all = fmaxf(fmaxf(largest[0], largest[1]), fmaxf(largest[2], largest[3]));
      auto* const header = reinterpret_cast<int32_t*>(record);
      header[key ? 0 : 1] = scale_exponent(all);
      if (key) header[2] = header[3] = 0;
    }
    store_codes(bits, key, codes, part);
    __syncthreads();
    source += kPageTokens * kBlockChannels;
  }
}

}  // namespace

void seal(const kvmix_cuda_seal_params& p) {
  SealArguments a{static_cast<const uint8_t*>(p.open_pages),
                  p.open_page_stride,
                  p.open_head_stride,
                  static_cast<uint8_t*>(p.records),
                  p.record_page_stride,
                  p.record_head_stride,
                  p.open_ids,
                  p.record_ids,
                  record_shape(p.format),
                  p.fitted != 0 ? Fit::kLeastSquares : Fit::kMinMax};
  cudaError_t status = cudaFuncSetAttribute(seal_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSealShared);
  if (status == cudaSuccess) {
    const dim3 grid(static_cast<unsigned>(p.pages), static_cast<unsigned>(p.kv_heads));
    seal_kernel<<<grid, 128, kSealShared, static_cast<cudaStream_t>(p.stream)>>>(a);
    status = cudaGetLastError();
  }
  if (status != cudaSuccess) throw Error(Status::kInternal, std::string("seal: ") + cudaGetErrorString(status));
}

}  // namespace kvmix::cuda
