// The window pass on the device: how much the last queries of a prompt look at each stored key (backend/cpu/window.cc).
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "backend/cuda/rows.h"

namespace kvmix::cuda {

// A prompt's last `window` queries of a layer, [window][q_heads][head_dim] by position modulo `window`: those at positions
// [begin, end), from `start` on out of the step's halves (HeadRows), before that out of what was kept.
struct KeepQueries {
  const __half *halves, *kept;
  __half* to;
  int64_t before;  // rows of the entries before
  int tokens;      // of the entry
  int kv_heads, heads_per_kv, head_dim, window;
  int64_t begin, end, start;
};
void keep_queries(const KeepQueries& job, cudaStream_t stream);

struct WindowHead {
  int64_t first_sum;  // of the head's sums, [heads_per_kv][tokens]
  int64_t tokens;     // that the last query sees
};
struct ScoreWindow {
  PageTable table;  // of the sequence, [kv_heads][stride]
  RecordShape open, sealed;
  ThinShape thin;
  const uint8_t* channels;  // [kv_heads][thin.key_width], as ThinKeys; null where no page is thin
  const WindowHead* heads;  // [kv_heads]
  int kv_heads, heads_per_kv, head_dim;
  const __half* queries;  // as KeepQueries
  int window;
  int64_t begin;  // position of the first query
  int rows;       // queries
  int64_t most_tokens;
  float scale, softcap;
  float* room;  // of scores
  size_t room_floats;
  float* sums;
};
// Floats of room that a KV head takes; with more, so many heads go together.
size_t window_room(int heads_per_kv, int rows, int64_t most_tokens);
void score_window(const ScoreWindow& job, cudaStream_t stream);

}  // namespace kvmix::cuda
