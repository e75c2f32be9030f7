/* The C ABI of the CUDA kernels: attention over packed pages in device memory that the caller owns.
 *
 * Every function returns a kvmix_status; kvmix_cuda_last_error() says more, per thread. A library built without CUDA
 * answers KVMIX_UNSUPPORTED. Device work is queued on `stream` (a cudaStream_t) and never waited for; launches are checked.
 *
 * A *record* is one packed page: 128 tokens of one KV head, keys and values (src/codec/cuda/tile_layout.h). An *open* page is
 * fp16 here (a cache's may be 8 bits): 128 key rows, then 128 value rows, [128][head_dim] each; slots that hold no token may
 * hold anything, NaN included. */
#ifndef KVMIX_KVMIX_CUDA_H_
#define KVMIX_KVMIX_CUDA_H_

#include "kvmix/kvmix.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Keys are scaled per channel over key_group tokens or per token over key_group channels, values per token over value_group
 * channels, all with midpoints. Widths 1, 2, 3, 4, 8 and 16 (plain fp16, whose group does not matter) in any combination,
 * groups 32, 64 and 128, head_dim 64, 96, 128 and 256; and KVMIX_CUDA_TRELLIS + 2 to 5, codes that are read with those before
 * them, in groups of 128 (scales per token, keys' with offsets per channel: key_per_token 0). Anything else answers
 * KVMIX_UNSUPPORTED with this list. */
#define KVMIX_CUDA_TRELLIS 32
typedef struct kvmix_cuda_format {
  int32_t head_dim;
  int32_t key_bits, value_bits;
  int32_t key_group, value_group;
  int32_t key_per_token; /* 0: a key scale per channel; otherwise per token, as values */
} kvmix_cuda_format;

/* Bytes of one record, a multiple of 16. */
KVMIX_API kvmix_status kvmix_cuda_record_bytes(const kvmix_cuda_format* format, size_t* bytes);

/* Between the CPU's encoded tiles (kvmix/codec.h: int<bits>.channel.g<key_group>...zero and int<bits>.token.g<value_group>
 * ...zero, or trellis<bits>.zero and trellis<bits>.sym) and a record, all in host memory. Lossless. */
KVMIX_API kvmix_status kvmix_cuda_record_from_tiles(const kvmix_cuda_format* format, const void* key_tile,
                                                    const void* value_tile, void* record);
KVMIX_API kvmix_status kvmix_cuda_tiles_from_record(const kvmix_cuda_format* format, const void* record, void* key_tile,
                                                    void* value_tile);

/* A piece of work: pages [page_begin, page_end) of one sequence and KV head. A sequence below 0 is no work: lists of one length
 * can be had so, which a captured launch needs. */
typedef struct kvmix_cuda_item {
  int32_t sequence, kv_head;
  int32_t page_begin, page_end;
  int32_t split, splits;   /* this piece of that many of the head */
  int32_t partial, ticket; /* first partial slot and ticket of the head */
  int32_t length;          /* tokens of the sequence, the query tokens included */
  int32_t evict_first;     /* not 0: records leave the L2 before what else it holds */
  int32_t unused[2];
} kvmix_cuda_item;

typedef struct kvmix_cuda_attend_params {
  kvmix_cuda_format format;
  int32_t sequences, q_heads, kv_heads;
  int32_t q_tokens;       /* per sequence, its newest, causal among themselves: 1 in decode, a chunk's tokens in prefill */
  int32_t sinks;          /* > 0: page 0 is open and holds this many tokens; later pages follow at sinks + 128 i */
  int32_t sliding_window; /* > 0: a query sees this many newest tokens, itself included */
  float scale;            /* of q.k; 0: 1 / sqrt(head_dim) */
  float softcap;          /* > 0 */
  const void* q;          /* fp16 (or bf16) [sequences][q_tokens][q_heads][head_dim], 16-byte aligned */
  void* out;              /* as q */
  float* lse;             /* natural log-sum-exp [sequences][q_tokens][q_heads], or null; -inf where nothing is visible */
  /* Record of (page id, kv head) at id * record_page_stride + kv_head * record_head_stride bytes, 16-byte aligned; strides that
   * are multiples of 128 (or at least 32) are read fastest. */
  const void* records;
  int64_t record_page_stride, record_head_stride;
  void* open_pages; /* likewise for open pages */
  int64_t open_page_stride, open_head_stride;
  const int32_t*
      page_table; /* [sequences][page_table_stride]: id >= 0 of a record, or ~id of an open page, in position order */
  int64_t page_table_stride;
  const kvmix_cuda_item* items; /* device copy of what kvmix_cuda_cut wrote */
  int32_t item_count;
  void* workspace; /* device memory, zeroed once before the first launch; each launch leaves it ready for the next */
  size_t workspace_bytes;
  void* stream;
  int32_t bf16; /* q and out (and new rows) are bf16 instead of fp16 */
  /* The q_tokens newest rows, stored into their slots of open pages before they are read, so that no append of its own is
   * needed; null: they are there already. Token t, head h of sequence s at s * new_sequence_stride + t * new_token_stride + h *
   * new_head_stride bytes, 16-byte aligned; at most 64 query rows a KV head. Open pages are written in this case alone. */
  const void *new_keys, *new_values;
  int64_t new_sequence_stride, new_token_stride, new_head_stride;
} kvmix_cuda_attend_params;

/* Cuts the work of kvmix_cuda_attend into pieces of even size for a device of `slots` resident thread blocks (0: ask the
 * current device). `lengths` [sequences] is host memory. Writes at most `capacity` items and their number; with null items
 * only the number and the workspace's bytes. Reads the shape of `params`, none of its pointers. The output for given items is
 * the same to the bit on every launch. */
KVMIX_API kvmix_status kvmix_cuda_cut(const kvmix_cuda_attend_params* params, const int32_t* lengths, int32_t slots,
                                      kvmix_cuda_item* items, int32_t capacity, int32_t* item_count, size_t* workspace_bytes);

/* Attention, decode and prefill, in one launch; in two where "prefill-128" takes 512 query rows a KV head or more, of many
 * sequences and KV heads 257, whose workspace then holds all pages of the items as fp16. Can be captured in a graph. Every slot
 * of a packed page must be finite. */
KVMIX_API kvmix_status kvmix_cuda_attend(const kvmix_cuda_attend_params* params);

/* The kernel that kvmix_cuda_attend runs for a shape: "codes-4", "codes-8" and "codes-16" (up to 4, 8, 16 query rows a KV head)
 * on packed codes: widths 1, 2, 3, 4 and 8 in any pair, any groups, keys with a scale per channel, every head_dim; not where
 * four records exceed a multiprocessor's shared memory (8/8 at head_dim 256) or a token has more than seven value groups.
 * "fp16-4", "fp16-8" and "fp16-16" likewise where both sides are fp16, every head_dim.
 * "prefill-128" (tiles of 128 query rows, on devices of compute capability 9.0 in a build for 90a) for more than 64, "pages-16"
 * and "pages-64" (pages dequantised in shared memory) for the rest. Null where the shape is refused. */
KVMIX_API const char* kvmix_cuda_attend_kernel(const kvmix_cuda_attend_params* params);

/* What that kernel takes, as a share of the time of fp16 attention over the same tokens: decode of large batches, fitted to an
 * H100 (docs/performance-gpu.md). Formats on packed codes cost .17 to .6; 1 and more is no gain in speed. Widths 5, 6 and 7 and
 * codecs without a zero point have no kernel: negative, as every shape that is refused. */
KVMIX_API float kvmix_cuda_attend_cost(const kvmix_cuda_attend_params* params);

/* New rows of keys and values into open pages: row i goes to slot slots[i] (page * 128 + slot in the page). */
typedef struct kvmix_cuda_append_params {
  int32_t rows, kv_heads, head_dim;
  int32_t bf16;              /* the input is bf16 (finite values beyond fp16 saturate) instead of fp16 */
  const void *keys, *values; /* row i, head h at i * row_stride + h * head_stride bytes; 16-byte aligned */
  int64_t row_stride, head_stride;
  void* open_pages;
  int64_t open_page_stride, open_head_stride;
  const int64_t* slots; /* [rows], device memory; negative: the row is left out */
  void* stream;
} kvmix_cuda_append_params;

/* One launch. */
KVMIX_API kvmix_status kvmix_cuda_append(const kvmix_cuda_append_params* params);

/* What a side's rows become before they are sealed, as TransformSpec (kvmix/cache.h): (x - center) times scales, then an
 * orthonormal Hadamard of each block. Device memory, fp32, null where there is none: center and scales [kv_heads][head_dim] (a
 * center is for keys only, scales need the Hadamard), feedback [kv_heads][head_dim (head_dim - 1) / 2], the weights of rounding
 * with error feedback. All zero: rows are sealed as they are.
 * Queries against such records are q' = (q / scales) H, and outputs of transformed values are turned back the same way, by the
 * caller. Open pages are read as they are: either rows are transformed before they are appended, as the CPU's cache does, and
 * sealed with feedback alone; or open pages hold original rows and are attended to by a launch of their own, merged by lse. */
typedef struct kvmix_cuda_transform {
  const float *center, *scales, *feedback;
  int32_t hadamard;
} kvmix_cuda_transform;

typedef struct kvmix_cuda_seal_params {
  kvmix_cuda_format format;
  int32_t pages, kv_heads;
  int32_t fitted;         /* 0: min-max scales; otherwise fitted by least squares */
  const void* open_pages; /* full: all 128 slots hold tokens */
  int64_t open_page_stride, open_head_stride;
  void* records;
  int64_t record_page_stride, record_head_stride;
  const int32_t* open_ids;   /* [pages], device memory: the open page ... */
  const int32_t* record_ids; /* ... and the record it becomes */
  void* stream;
  kvmix_cuda_transform key_transform, value_transform;
} kvmix_cuda_seal_params;

/* Seals open pages into records: scales and codes equal the CPU codec's to the bit. One launch; two where one side alone has
 * trellis codes. */
KVMIX_API kvmix_status kvmix_cuda_seal(const kvmix_cuda_seal_params* params);

/* What the last failing call of this thread said; "" if none failed. */
KVMIX_API const char* kvmix_cuda_last_error(void);

#ifdef __cplusplus
}
#endif
#endif
