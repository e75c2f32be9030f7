// What the attention kernels share: arguments, fragments and their instructions, partial results and their sum.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "codec/cuda/tile_layout.h"
#include "kvmix/kvmix_cuda.h"

namespace kvmix::cuda {

inline constexpr int kMaxWarps = 8;  // of a block of the decode kernel
inline constexpr int kWarps = 4, kThreads = 32 * kWarps, kRows = 8, kFields = 8;
inline constexpr float kLift = 12.0f;
inline constexpr float kFloor = -1e30f;  // a running maximum before anything was seen; finite, so that differences are

struct AttendArguments {
  const void* q;  // fp16 or bf16, as out
  void* out;
  float* lse;
  const uint8_t* records;
  int64_t record_page_stride, record_head_stride;
  uint8_t* open_pages;
  int64_t open_page_stride, open_head_stride;
  const int32_t* page_table;
  int64_t page_table_stride;
  const kvmix_cuda_item* items;
  float* partials;      // [slots][rows][head_dim]
  float* partial_sums;  // [slots][rows][2]: maximum, sum
  int32_t* tickets;
  int kv_heads, group, q_tokens, sinks, sliding_window;
  bool bf16;
  float scale, softcap;
  const uint8_t *new_keys, *new_values;  // null: rows stand in open pages already
  int64_t new_sequence_stride, new_token_stride, new_head_stride;
};

__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline uint32_t transpose(uint32_t v) {
  uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(out) : "r"(v));
  return out;
}
__device__ inline __half2 half2_of(uint32_t v) { return reinterpret_cast<const __half2&>(v); }
__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
__device__ inline uint32_t pack(float low, float high) {
  const __half2 h = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(h);
}
__device__ inline uint32_t multiply(uint32_t a, uint32_t b) {
  const __half2 r = __hmul2(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
  return reinterpret_cast<const uint32_t&>(r);
}
__device__ inline float half_bits(uint32_t v) { return __half2float(__ushort_as_half(static_cast<unsigned short>(v))); }
__device__ constexpr uint32_t both(uint32_t v) { return v | (v << 16); }
// fp16 bits of 2^e, e in [-14, 15]
__device__ inline uint32_t power_half(int e) { return both(static_cast<uint32_t>(e + 15) << 10); }
__device__ inline float power(int e) { return __int_as_float((e + 127) << 23); }
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float tanh_fast(float x) { return 1.0f - __fdividef(2.0f, exp2_fast(2.885390081777927f * x) + 1.0f); }

__device__ inline float load_query(const AttendArguments& args, int64_t at) {
  return args.bf16 ? __bfloat162float(static_cast<const __nv_bfloat16*>(args.q)[at])
                   : __half2float(static_cast<const __half*>(args.q)[at]);
}
__device__ inline uint32_t f16_of_bf16(uint32_t v) {  // two of them; finite values beyond fp16 saturate
  const auto limited = [](float x) { return fabsf(x) < INFINITY ? fminf(fmaxf(x, -65504.0f), 65504.0f) : x; };
  return pack(limited(__uint_as_float(v << 16)), limited(__uint_as_float(v & 0xffff0000u)));
}
// n of them at `at`, a multiple of n; n is 2 or a multiple of 4.
template <int n>
__device__ inline void load_queries(const AttendArguments& args, int64_t at, float (&x)[n]) {
  uint32_t words[n / 2];
  if constexpr (n == 2) {
    words[0] = static_cast<const uint32_t*>(args.q)[at / 2];
  } else {
#pragma unroll
    for (int i = 0; i < n / 4; ++i) {
      const uint2 v = static_cast<const uint2*>(args.q)[at / 4 + i];
      words[2 * i] = v.x, words[2 * i + 1] = v.y;
    }
  }
#pragma unroll
  for (int i = 0; i < n / 2; ++i) {
    x[2 * i] = args.bf16 ? __uint_as_float(words[i] << 16) : half_bits(words[i] & 0xffffu);
    x[2 * i + 1] = args.bf16 ? __uint_as_float(words[i] & 0xffff0000u) : half_bits(words[i] >> 16);
  }
}
// Stores the newest rows of an item's sequence and head that fall into its open pages, of which it is the only reader; a
// __syncthreads makes them visible to the block.
__device__ inline void store_new_rows(const AttendArguments& args, const kvmix_cuda_item& item, int dim,
                                      int threads = kThreads) {
  if (args.new_keys == nullptr) return;
  const int octets = dim / 8;
  for (int at = static_cast<int>(threadIdx.x); at < args.q_tokens * 2 * octets; at += threads) {
    const int octet = at % octets, side = at / octets % 2, token = at / (2 * octets);
    const int position = item.length - args.q_tokens + token;
    if (position < 0) continue;
    const bool sink = position < args.sinks;
    const int page = sink ? 0 : (position - args.sinks) / kPageTokens + (args.sinks > 0 ? 1 : 0);
    const int slot = sink ? position : (position - args.sinks) % kPageTokens;
    if (page < item.page_begin || page >= item.page_end) continue;
    const int32_t id = args.page_table[item.sequence * args.page_table_stride + page];
    if (id >= 0) continue;
    const uint8_t* const from = (side == 0 ? args.new_keys : args.new_values) + item.sequence * args.new_sequence_stride +
                                token * args.new_token_stride + item.kv_head * args.new_head_stride;
    uint4 v = reinterpret_cast<const uint4*>(from)[octet];
    if (args.bf16) v = {f16_of_bf16(v.x), f16_of_bf16(v.y), f16_of_bf16(v.z), f16_of_bf16(v.w)};
    uint8_t* const to = args.open_pages + static_cast<int64_t>(~id) * args.open_page_stride +
                        item.kv_head * args.open_head_stride + (side * kPageTokens + slot) * dim * 2;
    reinterpret_cast<uint4*>(to)[octet] = v;
  }
}
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
// Whether this block is the last of its head to have stored its part.
__device__ inline bool arrived_last(const AttendArguments& args, const kvmix_cuda_item& item, int* last) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    *last = atomicAdd(args.tickets + item.ticket, 1) == item.splits - 1;
    if (*last) args.tickets[item.ticket] = 0;
  }
  __syncthreads();
  __threadfence();
  return *last != 0;
}
// Adds up the splits of a head, in their order; `sums` is shared memory for rows x splits.
template <int quads, class Finish>
__device__ inline void combine_splits(const AttendArguments& args, const kvmix_cuda_item& item, int threads, int rows,
                                      float2* sums, const Finish& finish) {
  const auto slot = [&](int row, int split) { return static_cast<int64_t>(item.partial + split) * rows + row; };
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
// may overlap the parts. `all_rows` are those of the head, of which the block has `rows`; row_offset(row) is a row's place in
// the output. `threads` of the block are still there.
template <int quads, class RowOffset, class Part>
__device__ inline void write_rows(const AttendArguments& args, const kvmix_cuda_item& item, int threads, int parts, int rows,
                                  int all_rows, float2* sums, int* last, const RowOffset& row_offset, const Part& part) {
  const auto finish = [&](int row, int quad, const float4& value, float top, float sum) {
    store_output(args, row_offset(row) * quads + quad, value, sum > 0.0f ? 1.0f / sum : 0.0f);
    if (args.lse != nullptr && quad == 0) args.lse[row_offset(row)] = log_sum_exp(top, sum);
  };
  for (int at = static_cast<int>(threadIdx.x); at < rows * quads; at += threads) {
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
      store_partial(args, item.partial + item.split, row, all_rows, quad, quads, value, top, sum);
    }
  }
  if (item.splits == 1 || !arrived_last(args, item, last)) return;
  combine_splits<quads>(args, item, threads, rows, sums, finish);
}
// The same for a block of kThreads with a fixed number of parts.
template <int quads, int parts, class RowOffset, class Part>
__device__ inline void write_rows(const AttendArguments& args, const kvmix_cuda_item& item, int rows, int all_rows,
                                  float2* sums, int* last, const RowOffset& row_offset, const Part& part) {
  write_rows<quads>(args, item, kThreads, parts, rows, all_rows, sums, last, row_offset, part);
}

// Four 8 x 8 tiles of fp16 as registers: lane 4 r + j holds elements 2 j and 2 j + 1 of row r, or of column r. Lane l gives the
// address of row l % 8 of tile l / 8 in shared memory.
__device__ inline void load_tiles(uint32_t row, bool columns, uint32_t (&v)[4]) {
  if (columns) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(row));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(row));
  }
}

__device__ inline void copy_async(void* to, const void* from) {
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;\n" ::"r"(shared), "l"(from) : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int pending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(pending) : "memory");
}

// A lane's words of one block.
template <int bits>
__device__ inline void load_words(const uint8_t* block, int lane, uint32_t (&w)[block_words(bits)]) {
#pragma unroll
  for (int i = 0; i < block_words(bits) / 4; ++i) {
    const uint4 v = reinterpret_cast<const uint4*>(block + 512 * i)[lane];
    w[4 * i] = v.x, w[4 * i + 1] = v.y, w[4 * i + 2] = v.z, w[4 * i + 3] = v.w;
  }
  if constexpr (block_words(bits) % 4 == 2) {
    const uint2 v = reinterpret_cast<const uint2*>(block + 512 * (block_words(bits) / 4))[lane];
    w[block_words(bits) - 2] = v.x, w[block_words(bits) - 1] = v.y;
  }
}

}  // namespace kvmix::cuda
