// What the attention kernels are given, and how they take queries and new rows.
#pragma once

#include <cstdint>

#include "attention/cuda/stage.h"
#include "base/cuda/fragments.cuh"
#include "codec/cuda/tile_layout.h"
#include "kvmix/kvmix_cuda.h"

namespace kvmix::cuda {

inline constexpr int kThreads = 32 * kWarps;
inline constexpr uint32_t kOnes = 0x3c003c00u;
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
  int sink_slots;    // of page 0, if there are sinks; other open pages have kPageTokens
  RecordShape open;  // of these
  bool bf16;
  bool overlapped;  // with the launch before, which makes the queries
  float scale, softcap;
  const uint8_t *new_keys, *new_values;  // null: rows stand in open pages already
  int64_t new_sequence_stride, new_token_stride, new_head_stride;
};

// Keys of which a head's pages hold chosen channels alone: how many, a multiple of 16, and which, [lists][width] ascending. A
// launch for such pages meets no others; a query comes to them with these channels.
struct ThinKeys {
  int width;
  const uint8_t* channels;
  __device__ const uint8_t* of(const kvmix_cuda_item& item, int kv_heads) const {
    return channels + (static_cast<int64_t>(item.sequence) * kv_heads + item.kv_head) * width;
  }
};

__device__ inline float load_query(const AttendArguments& args, int64_t at) {
  return args.bf16 ? __bfloat162float(static_cast<const __nv_bfloat16*>(args.q)[at])
                   : __half2float(static_cast<const __half*>(args.q)[at]);
}
// Two neighbouring ones.
__device__ inline float2 load_query_pair(const AttendArguments& args, int64_t at) {
  const uint32_t v = static_cast<const uint32_t*>(args.q)[at / 2];
  return args.bf16 ? make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u)) : __half22float2(half2_of(v));
}
// Whether an open page is fp16 rows, as sinks are, and not a record.
__device__ inline bool is_rows(const AttendArguments& args, int page) {
  return !args.open.has_codes() || (args.sinks > 0 && page == 0);
}
// Rows from the first key to the first value of an open page of rows.
__device__ inline int value_row(const AttendArguments& args, int page) {
  return args.sinks > 0 && page == 0 ? args.sink_slots : kPageTokens;
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
                        item.kv_head * args.open_head_stride + (side * value_row(args, page) + slot) * dim * 2;
    reinterpret_cast<uint4*>(to)[octet] = v;
  }
}

}  // namespace kvmix::cuda
