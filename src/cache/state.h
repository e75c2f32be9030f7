// The cache's private state, shared by the files of this folder.
#pragma once

#include <algorithm>
#include <map>
#include <vector>

#include "attention/cpu/kernel.h"
#include "base/parallel.h"
#include "cache/pool.h"
#include "codec/encoders.h"
#include "codec/row.h"
#include "kvmix/cache.h"
#include "rows/row_map.h"

namespace kvmix {

// Page tables grow in steps of this many entries, so that their size is a formula.
inline constexpr size_t kTableStep = 64;

struct HeadState {
  std::byte* sinks = nullptr;     // fp16 rows: keys [sinks][head_dim], then values
  std::vector<std::byte*> pages;  // page i holds positions sinks + kPageTokens * i ...; null once freed
};

struct LayerState {
  int64_t sealed = 0;  // pages before this one are packed
  int64_t freed = 0;   // pages before this one have left the sliding window
  std::vector<HeadState> heads;
};

struct SequenceState {
  int64_t length = 0;
  std::vector<LayerState> layers;
};

// Sizes of a layer's records.
struct LayerSizes {
  TileFormat key, value, open_key, open_value;
  size_t sink_bytes, open_bytes, packed_bytes;
  bool recent_codes;  // some open rows are codes
  bool seals;         // false when both sides stay fp16
  int group;          // query heads per KV head
};

struct StepEntry {
  SequenceId id;
  SequenceState* sequence;
  int64_t start;  // length before the step
  int n_tokens;
  int64_t row;  // first row in q, k, v, out
};

struct SealJob {
  const std::byte* open;
  std::byte* packed;
  int kv_head;
};

// A table slot that the step in progress changed: undone by abort_step, made final by end_step.
struct SlotChange {
  HeadState* head;
  int64_t page;  // -1: the sinks
  std::byte* old;
  size_t old_bytes;
  std::byte* fresh;
  size_t fresh_bytes;

  std::byte*& slot() const { return page < 0 ? head->sinks : head->pages[static_cast<size_t>(page)]; }
};

// A part of one layer's attention: queries of one entry and head over a range of its pages.
struct AttendUnit {
  int entry, head;
  int first_token, tokens;
  int part, parts;
  int64_t page_begin, page_end;  // pages; part 0 also takes the sinks
  int merge;                     // counter of this (entry, head, query block)
  int part_slot;                 // its first row in the partial results
};

// Room for a partial softmax: m and l [rows], acc [rows][head_dim].
struct PartialRoom {
  std::vector<float> m, l, acc;
};

struct ThreadScratch {
  std::vector<std::byte> kernel;
  std::vector<float> q;
  PartialRoom whole, open;     // of a unit, and of its open pages where they are attended to apart
  std::vector<uint16_t> rows;  // a page's rows on their way from open codes to packed ones
  std::vector<int64_t> positions;
  std::vector<PageRef> pages, open_pages;
  double append_seconds = 0, seal_seconds = 0, attend_seconds = 0;
};

struct LayerStep {
  std::vector<SealJob> seals;
  std::vector<AttendUnit> units;
  int merges = 0, part_rows = 0;
};

struct Cache::Impl {
  explicit Impl(CacheConfig c);

  CacheConfig config;
  std::vector<LayerSizes> sizes;
  std::vector<RowMapChain> key_rows, value_rows;  // by layer; they view the config
  // Feedback of recent keys by layer, [kv_heads][head_dim][head_dim] (feedback_columns), or empty. Values do not need it: their
  // errors are not put through a softmax.
  std::vector<std::vector<float>> key_columns;
  PagePool pool;
  std::map<SequenceId, SequenceState> sequences;
  SequenceId next_id = 0;

  // The step in progress.
  bool in_step = false;
  std::vector<StepEntry> entries;
  std::vector<LayerStep> steps;  // per layer
  std::vector<SlotChange> changes;
  std::vector<std::pair<int64_t*, int64_t>> old_sealed;
  AtomicCounters next_unit;  // per layer
  AtomicCounters remaining;  // per merge of the layer in progress
  std::vector<float> part_m, part_l, part_acc;
  std::vector<ThreadScratch> threads;

  std::vector<const AttentionKernel*> kernels;  // candidates, best first
  std::vector<std::string> kernels_used;        // by layer
  int64_t sealed_pages = 0;

  SequenceState& find(SequenceId id);
  const SequenceState& find(SequenceId id) const { return const_cast<Impl*>(this)->find(id); }
  void release_sequence(SequenceState& sequence);
  const float* recent_columns(size_t layer, int kv_head) const;
  int64_t seal_target(const LayerConfig& layer, const LayerState& state, int64_t length) const;
  void plan_layer(size_t layer);
  void plan_attention(size_t layer);
  std::byte* change_slot(HeadState& head, int64_t page, size_t old_bytes, size_t fresh_bytes);
  const AttentionKernel& pick_kernel(const AttendJob& job) const;
};

// Rows that are stored together.
inline constexpr int kRowsTogether = 4;

// Stores n <= kRowsTogether rows of head_dim floats into slots of an open page's side, codes with error feedback unless
// `columns` is null.
inline void store_open_rows(const TileFormat& format, int first_slot, int n, const float* rows, const float* columns,
                            std::byte* page) {
  const int dim = format.width;
  if (format.spec.is_f16()) {
    to_f16(rows, n * dim, reinterpret_cast<uint16_t*>(page) + static_cast<ptrdiff_t>(first_slot) * dim);
    return;
  }
  std::byte records[kRowsTogether * kMostRowBytes];
  encode_rows(format.spec, dim, n, rows, columns, records);
  for (int r = 0; r < n; ++r) {
    store_row(format.spec, format.side, dim, records + static_cast<size_t>(r) * row_bytes(format.spec, dim), first_slot + r,
              page);
  }
}

// Live slots of page `page` at this sequence length.
inline int live_slots(const LayerConfig& layer, int64_t page, int64_t length) {
  const int64_t first = layer.sinks + page * kPageTokens;
  return static_cast<int>(std::clamp<int64_t>(length - first, 0, kPageTokens));
}
inline int64_t page_count(const LayerConfig& layer, int64_t length) {
  return length <= layer.sinks ? 0 : (length - layer.sinks + kPageTokens - 1) / kPageTokens;
}
LayerSizes layer_sizes(const LayerConfig& layer);
// Pages that a fixed window seals at this length.
int64_t fixed_seal_target(const LayerConfig& layer, int64_t length);
// Pages that the ratio rule (KVmix b.4) seals from an fp16 tail of this many tokens.
int64_t ratio_surplus_pages(const LayerConfig& layer, int64_t tail_tokens);
// Pages of one KV head at this length: all that were begun, those sealed (or freed), those freed.
struct PagePrediction {
  int64_t pages, sealed, freed;
};
PagePrediction predict_pages(const LayerConfig& layer, int64_t n_tokens);
// Bytes of the tables of one sequence.
size_t table_bytes(const CacheConfig& config, int64_t length);

}  // namespace kvmix
