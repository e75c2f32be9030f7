// Attention over pages in an engine's own blocks: for servers whose scheduler owns memory, shares prefixes and preempts.
//
// A block holds the kPageTokens tokens at positions [kPageTokens b, kPageTokens (b + 1)) of a sequence, b its place in the
// sequence's list of blocks. A layer's part of it is `block_bytes`: a packed page for each KV head and a nonce. A query sees
// what a cache fed token by token would show it: rows of the block being filled, and of the newest `window` tokens before it,
// as the plan keeps recent rows, sinks in fp16, all else packed. So which rows a query sees, and in which form, does not depend
// on how a prompt was cut, nor, with a window of 0, on who filled a shared block. The order of sums does: results are equal to
// the bit where cuts fall on multiples of kPageTokens and, with several threads, the steps hold the same sequences; others are
// equal but for rounding, and but for the arithmetic of the kernels, which may take other precision for few queries than for
// many. Unlike a Cache's, pages begin at multiples of kPageTokens whatever the sinks are.
//
// With CacheConfig::device "cuda" blocks, and what lies beside them, are in the memory of the calling thread's current GPU;
// rows are as CacheConfig::device_rows says, steps are queued on CacheConfig::stream, which must be given for these. There a
// plan with sinks keeps a sequence's whole first block in fp16, beside the blocks, and results are equal but for rounding where
// a step holds other sequences.
//
// Rows that are not packed, and sinks, lie beside the blocks, found by block and nonce: memory that is lent to another sequence
// is never read for this one's. No call says that a block was freed; what was given up is used again (PagedStep::spare).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "kvmix/cache.h"
#include "kvmix/export.h"

namespace KVMIX_API kvmix {

// Part `part` of `parts` of every layer's heads, as tensor parallelism cuts them: KV heads that are fewer than parts are
// repeated. Throws kUnsupported for heads that do not divide, and for transforms that mix KV heads.
CacheConfig part_of_heads(const CacheConfig& config, int part, int parts);

// New rows of a batch. Pointers are read during the call only.
struct PagedStep {
  int sequences = 0;
  const int32_t* row_begin = nullptr;  // [sequences + 1]: first row of each in q, k, v, out
  const int32_t* lengths = nullptr;    // [sequences]: tokens with the new rows
  const int32_t* blocks = nullptr;     // [sequences][blocks_stride]: by position; those out of a sliding window are not read
  int64_t blocks_stride = 0;
  // The step had room for every sequence that the engine holds: what none of its rows belongs to may be taken for another.
  bool spare = false;
};

struct PagedMemory {
  size_t open_bytes = 0;  // beside the blocks: rows that are not packed
  size_t sink_bytes = 0;
  size_t taken_bytes = 0;  // from the system, for both
};

// Calls come from one thread at a time; `threads` of its own attend.
class PagedAttention {
 public:
  // `most_sequences`: that are live at once, which rows beside the blocks are kept for. CacheConfig::max_bytes is the limit of
  // these. Throws kUnsupported naming what a plan asks for that blocks cannot do: policies, windows that are ratios, more than
  // kPageTokens sinks; and what the device cannot.
  PagedAttention(const CacheConfig& config, int most_sequences);
  ~PagedAttention();
  PagedAttention(const PagedAttention&) = delete;
  PagedAttention& operator=(const PagedAttention&) = delete;

  const CacheConfig& config() const;
  size_t block_bytes(int layer) const;  // a multiple of 64, on a GPU of 128
  // The most that stands beside the blocks: for each of most_sequences its open rows and, of as many first blocks, the sinks.
  // Sinks of first blocks that outlive their sequences in a prefix cache come on top, at most `sink_bytes` a block.
  size_t beside_bytes() const;
  size_t sink_bytes() const;  // of one first block, all layers

  // Stores the rows of a layer and attends. Block b's part is at blocks + b * block_stride, aligned as block_bytes. k,
  // v: float [rows][kv_heads][head_dim], q, out: [rows][q_heads][head_dim], strides in floats; out must not alias q. Throws
  // kInvalidArgument for steps that cannot be, kInternal for rows that were given up while their sequence lived.
  void step(int layer, const PagedStep& step, std::byte* blocks, int64_t block_stride, const float* k, int64_t k_stride,
            const float* v, int64_t v_stride, const float* q, int64_t q_stride, float* out, int64_t out_stride);

  PagedMemory memory() const;
  std::string kernel() const;  // as CacheStats::kernel

 private:
  struct KVMIX_HIDDEN Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvmix
