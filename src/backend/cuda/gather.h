// Pages made of tokens of other pages, after a token policy has dropped some: rows that move as they are where both pages hold
// the same open rows, else by way of fp16, as the CPU's (CpuBackend::gather).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "codec/cuda/tile_layout.h"

namespace kvmix::cuda {

// Where a token comes from. A page of fp16 rows has `rows` slots; else it is a record, open, sealed, or sealed with chosen key
// channels alone.
struct RowSource {
  static constexpr int32_t kOpenRecord = 0, kSealedRecord = -1, kThinRecord = -2;
  const uint8_t* page;
  int32_t slot, rows;
};
// A page that takes `sources` tokens, and repeats the last one up to `slots`: `rows` slots of fp16 rows, or an open record.
struct RowTarget {
  uint8_t* page;
  int64_t first;  // of its sources
  int32_t sources, slots, rows, kv_head;
  const uint8_t* columns = nullptr;  // [head_dim], where a thin record has a channel; kNoColumn: nowhere, it is zero
  static constexpr uint8_t kNoColumn = 255;
};

struct MoveRows {
  const RowTarget* targets;
  const RowSource* sources;
  int count;  // of targets
  int head_dim;
  RecordShape open, sealed;
  ThinShape thin;
  const float* key_panels;  // as AppendRows, where keys are rounded anew with feedback
  bool halves = true;       // numbers go by way of fp16
};
void move_rows(const MoveRows& job, cudaStream_t stream);

}  // namespace kvmix::cuda
