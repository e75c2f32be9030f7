// The contract between the cache and an attention kernel. A kernel attends a few query rows of one KV head over a list of
// pages and leaves an unnormalised partial softmax; the cache splits the work, merges partials and undoes transforms.
// One file per kernel + one line in registry.cc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "codec/codec_family.h"
#include "kvmix/cache.h"

namespace kvmix {

// A page of one KV head. Packed: encoded tiles of the job's formats. Otherwise fp16 rows, token-major [live][width] of either
// side.
struct PageRef {
  const std::byte* key;
  const std::byte* value;
  int64_t first_position;  // position of slot 0; slot i is at first_position + i
  int live;                // slots 0..live-1 count; bytes of other slots may be anything, NaN included (not codes of trellises)
  bool packed;
  // Where the softmax weights of the page's slots go, for token policies; null: nowhere. weights[rows][kPageTokens] are
  // exp(score - reference[row]), 0 where the row sees nothing; a row whose reference the kernel leaves as it was (-inf) sees
  // nothing of the page.
  float* weights = nullptr;
  float* reference = nullptr;
};

struct AttendJob {
  TileFormat key, value;  // their widths may differ
  float scale, softcap;
  int sliding_window;
  bool exact;               // arithmetic at least as exact as bf16 products with fp32 sums
  int rows;                 // query rows: row = token * heads_per_kv + head
  const float* q;           // [rows][key.width], contiguous, as it meets stored keys, not scaled
  const int64_t* position;  // [rows] position of the query; sees keys at p <= position (and > position - sliding_window)
  std::span<const PageRef> pages;
  // Partial softmax, overwritten: a reference m at or a little below the largest score (-inf if nothing was visible), sum l of
  // exp(score - m), acc = sum of exp(score - m) * value row. [rows], [rows], [rows][value.width].
  float* m;
  float* l;
  float* acc;
};

struct AttentionKernel {
  const char* name;
  const char* description;
  bool (*available)();  // this machine can run it
  // Can run these formats with this many rows. The portable kernel can always; the others know the uniform family.
  bool (*supports)(const AttendJob& job);
  size_t (*scratch_bytes)(int width, int rows);              // per thread, of the wider side; for the most rows used
  void (*attend)(const AttendJob& job, std::byte* scratch);  // scratch 64-byte aligned; no allocation
};

std::span<const AttentionKernel* const> attention_kernel_registry();

}  // namespace kvmix
