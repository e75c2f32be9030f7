// Rows between a model's fp32 and what pages hold, with the row maps of a layer: the same operations in the same order as
// src/rows and, of 8-bit rows, src/codec, so that what is stored equals the CPU's to the bit.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "codec/cuda/tile_layout.h"

namespace kvmix::cuda {

// What is done to a row, in this order; device memory, null where there is nothing: [kv_heads][head_dim], of the matrix
// [kv_heads][head_dim][head_dim] (row vector times matrix).
struct RowOps {
  const float *subtract, *multiply, *divide;
  const float* divide_after;  // the Hadamard
  const float* matrix;
  bool hadamard;
};

// Where a row of the step belongs.
struct RowPlace {
  int32_t entry;     // of the page tables
  int32_t position;  // in its sequence
  int32_t before;    // rows of the entries before it
  int32_t tokens;    // of its entry in this step
  int32_t token;     // among these
};

// The page tables of a layer, [entries][kv_heads][stride]: id >= 0 of a sealed page, ~id of an open one.
struct PageTable {
  uint8_t* pages;
  const int32_t* ids;
  int64_t stride;
  int sinks;  // slots of page 0 of each head, if there are
};

// An id of the tables that is another one from this step on.
struct TablePatch {
  int64_t at;
  int32_t id;
};
void patch_table(int32_t* ids, const TablePatch* patches, size_t count, cudaStream_t stream);

struct AppendRows {
  const float *k, *v;  // [rows][kv_heads][head_dim]
  int64_t k_stride, v_stride;
  int rows, kv_heads, head_dim;
  const RowPlace* places;
  PageTable table;
  const int32_t* dropped;  // [entries][kv_heads], how far the head's list is behind the positions, or null
  RowOps key, value;
  RecordShape open;         // of pages but the sinks' (RecordShape::has_codes)
  const float* key_panels;  // feedback of 8-bit keys, of each KV head as feedback_panels.h, or null
};
// Stores the step's rows in their slots of open pages. May begin, `overlapped`, before the launch that makes the rows has
// ended.
void append_rows(const AppendRows& job, bool overlapped, cudaStream_t stream);

// Queries and outputs in fp16 lie as attention takes them: entry by entry, of each [kv_heads][tokens][heads_per_kv][head_dim].
// The place of a token's query head, in rows of head_dim, of an entry of so many tokens that so many rows stand before.
KVMIX_HOST_DEVICE constexpr int64_t half_row(int64_t before, int tokens, int64_t token, int head, int kv_heads,
                                             int heads_per_kv) {
  return (before * kv_heads + static_cast<int64_t>(head / heads_per_kv) * tokens + token) * heads_per_kv + head % heads_per_kv;
}
struct HeadRows {
  const float* q;  // [rows][q_heads][head_dim]
  float* out;
  int64_t stride;
  int rows, kv_heads, heads_per_kv, head_dim;
  const RowPlace* places;
  void* halves;
  RowOps ops;
};
void map_queries(const HeadRows& job, cudaStream_t stream);
void map_outputs(const HeadRows& job, cudaStream_t stream);

// The rows of a record as those of an open page of shape `open`; `panels`: of its head's keys, as key_panels.
void open_record(const uint8_t* record, const RecordShape& shape, uint8_t* page, const RecordShape& open, const float* panels,
                 cudaStream_t stream);

}  // namespace kvmix::cuda
