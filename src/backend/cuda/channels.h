// Keys of chosen channels (docs/channels.md) on the device: records that hold those alone, and what they are chosen by.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "codec/cuda/tile_layout.h"

namespace kvmix::cuda {

// Sealed records to records of chosen key channels. Scales per channel: a channel's codes do not depend on others, so that what
// is written is what encoding the chosen ones would write.
struct PickRecords {
  const uint8_t* from;  // [count] records of shape `whole`, `stride` bytes apart
  int64_t stride;
  uint8_t* pages;         // kPageUnit bytes a unit
  const int32_t* ids;     // [count], the units that they go to; kNoRecord: nowhere
  const uint8_t* chosen;  // [count][thin.key_width], ascending
  int count;
  RecordShape whole;
  ThinShape thin;
};
void pick_records(const PickRecords& job, cudaStream_t stream);

// Means over `rows` queries, the last of those that KeepQueries keeps, of their squares: [q_heads][head_dim].
struct SquareQueries {
  const __half* queries;
  int window, q_heads, head_dim;
  int64_t begin;  // position of the first
  int rows;
  float* means;
};
void square_queries(const SquareQueries& job, cudaStream_t stream);

// Means by channel of the squares of lists' keys, [lists][head_dim], first page by page.
struct SquarePage {
  const uint8_t* page;
  int32_t rows, live;   // rows: as RowSource
  uint32_t dropped[4];  // a bit a slot
};
struct SquareKeys {
  const SquarePage* pages;
  const int32_t *first, *tokens;  // [lists + 1], a list's first page; [lists], those that stay
  int page_count, lists, head_dim;
  RecordShape open, sealed;
  float *sums, *means;  // sums: [pages][head_dim]
};
void square_keys(const SquareKeys& job, cudaStream_t stream);

}  // namespace kvmix::cuda
