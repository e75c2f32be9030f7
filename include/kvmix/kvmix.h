/* The C ABI of the core: a cache that any engine can call, on the CPU or a CUDA device.
 *
 * Every function returns a status; none throws, prints or exits. After a failure kvmix_last_error() gives one line for a
 * person, per thread, until that thread's next failing call. Output arguments are written on success only.
 * Handles may be used from one thread at a time, except kvmix_cache_append and kvmix_cache_attend (see there).
 *
 * Structs begin with struct_bytes, which the caller sets to sizeof of what it was compiled with. Later versions append fields
 * and change none, so programs and libraries of different versions go together: fields that the caller's struct lacks take
 * their defaults, fields that the library does not know must be zero. Elements of an array are struct_bytes of the first apart.
 */
#ifndef KVMIX_KVMIX_H_
#define KVMIX_KVMIX_H_

#include <stddef.h>
#include <stdint.h>

#include "kvmix/export.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The values of kvmix::Status. */
typedef enum kvmix_status {
  KVMIX_OK = 0,
  KVMIX_INVALID_ARGUMENT = 1,
  KVMIX_NOT_FOUND = 2,
  KVMIX_CORRUPT = 3,
  KVMIX_MISMATCH = 4,
  KVMIX_OUT_OF_MEMORY = 5,
  KVMIX_IO = 6,
  KVMIX_UNSUPPORTED = 7,
  KVMIX_CANCELLED = 8,
  KVMIX_INTERNAL = 9
} kvmix_status;

/* "0.1.0" */
KVMIX_API const char* kvmix_version(void);
/* The same to compare: 10000 major + 100 minor + patch. */
KVMIX_API int32_t kvmix_version_number(void);
/* Short lower-case name of a status; never null. */
KVMIX_API const char* kvmix_status_name(kvmix_status status);
/* What the last failing call of this thread said; "" if none failed. */
KVMIX_API const char* kvmix_last_error(void);

typedef struct kvmix_cache kvmix_cache;
typedef struct kvmix_plan kvmix_plan;
typedef int32_t kvmix_sequence;

/* How a cache runs, whatever it stores. A null pointer to it, or zeros, take the defaults. */
typedef struct kvmix_cache_options {
  size_t struct_bytes;
  size_t max_bytes;    /* 0: no limit */
  const char* kernel;  /* NULL or "": the best that this machine runs */
  int32_t threads;     /* that will call append and attend together, 1..256; 0: 1 */
  int32_t exact;       /* nonzero: attention arithmetic at least as exact as bf16 products */
  const char* device;  /* NULL, "" or "cpu"; "cuda": pages and arithmetic on the calling thread's current CUDA device.
                          KVMIX_UNSUPPORTED says why there is none, or which layer it has no code for */
  void* stream;        /* of "cuda": the cudaStream_t that all work is queued on; NULL: one of the cache's own */
  int32_t device_rows; /* of "cuda", nonzero: k, v, q and out are device memory, append and attend only queue; otherwise host
                          memory, and attend waits */
  int32_t reserved;    /* 0 */
} kvmix_cache_options;

/* One layer of a cache without a plan. kvmix_layer_defaults() sets everything but the shape. */
typedef struct kvmix_layer_config {
  size_t struct_bytes;
  int32_t q_heads, kv_heads; /* q_heads is a multiple of kv_heads */
  int32_t head_dim;          /* 32..256, multiple of 16 */
  float scale;               /* of q.k; 0: 1 / sqrt(head_dim) */
  float softcap;             /* > 0: scores become softcap * tanh(score / softcap) */
  int32_t sliding_window;    /* > 0: a query sees this many newest tokens, itself included */
  int32_t sinks;             /* first tokens kept in fp16 */
  int32_t window;            /* newest tokens that are not packed yet, at least */
  const char* recent_codec;  /* those: NULL or "f16", or "int8.token.g64.minmax.zero" for half the bytes */
  const char* key_codec;     /* "f16" or e.g. "int3.channel.g128.fitted.zero" */
  const char* value_codec;   /* "f16" or e.g. "int2.token.g64.minmax.zero" */
  int32_t key_hadamard;      /* nonzero: rotate before storing */
  int32_t value_hadamard;
} kvmix_layer_config;

/* 16 sinks, a window of 128, 3-bit keys, 3-bit values, no transform; shape zero. Reads struct_bytes, writes what is behind. */
KVMIX_API kvmix_status kvmix_layer_defaults(kvmix_layer_config* layer);

KVMIX_API kvmix_status kvmix_cache_create(const kvmix_layer_config* layers, size_t layer_count,
                                          const kvmix_cache_options* options, kvmix_cache** cache);
/* Null is allowed. */
KVMIX_API void kvmix_cache_destroy(kvmix_cache* cache);

/* What a plan must fit: a model's layers, and which model it is. */
typedef struct kvmix_model_layer {
  size_t struct_bytes;
  int32_t q_heads, kv_heads;
  int32_t head_dim;
  int32_t sliding_window; /* 0: none */
  float scale;            /* of q.k; 0: 1 / sqrt(head_dim) */
  float softcap;          /* 0: none */
} kvmix_model_layer;

typedef struct kvmix_model_shape {
  size_t struct_bytes;
  const char* name;        /* for messages; may be null */
  const char* fingerprint; /* the the plan's must equal it; null or "": any plan whose layers fit */
  const kvmix_model_layer* layers;
  size_t layer_count;
} kvmix_model_shape;

/* A plan (docs/file-formats.md) from a file or from JSON text. KVMIX_CORRUPT names field, value and remedy. */
KVMIX_API kvmix_status kvmix_plan_read(const char* path, kvmix_plan** plan);
KVMIX_API kvmix_status kvmix_plan_parse(const char* json, kvmix_plan** plan);
/* Null is allowed. Caches made from the plan do not need it. */
KVMIX_API void kvmix_plan_destroy(kvmix_plan* plan);
/* The cache that the plan means on this model: codecs, sinks, recent rows, transforms and feedback, and the token policy.
 * KVMIX_MISMATCH where the plan is another model's or its layers do not fit, KVMIX_INVALID_ARGUMENT for a shape, a transform or
 * a policy's parameter that cannot be, KVMIX_UNSUPPORTED for a policy on a model whose layers all have a sliding window. */
KVMIX_API kvmix_status kvmix_cache_create_from_plan(const kvmix_plan* plan, const kvmix_model_shape* model,
                                                    const kvmix_cache_options* options, kvmix_cache** cache);

KVMIX_API kvmix_status kvmix_sequence_create(kvmix_cache* cache, kvmix_sequence* sequence);
KVMIX_API kvmix_status kvmix_sequence_remove(kvmix_cache* cache, kvmix_sequence sequence);
/* A copy that shares full pages. */
KVMIX_API kvmix_status kvmix_sequence_fork(kvmix_cache* cache, kvmix_sequence sequence, kvmix_sequence* copy);
KVMIX_API kvmix_status kvmix_sequence_truncate(kvmix_cache* cache, kvmix_sequence sequence, int64_t n_tokens);
KVMIX_API kvmix_status kvmix_sequence_length(const kvmix_cache* cache, kvmix_sequence sequence, int64_t* n_tokens);
KVMIX_API kvmix_status kvmix_sequence_save(const kvmix_cache* cache, kvmix_sequence sequence, const char* path,
                                           const char* fingerprint);
KVMIX_API kvmix_status kvmix_sequence_load(kvmix_cache* cache, const char* path, const char* fingerprint,
                                           kvmix_sequence* sequence);

/* How a layer keeps a sequence's tokens. The caller sets struct_bytes. */
typedef struct kvmix_tail {
  size_t struct_bytes;
  int64_t sinks, sealed, recent;
} kvmix_tail;
KVMIX_API kvmix_status kvmix_sequence_tail(const kvmix_cache* cache, kvmix_sequence sequence, int32_t layer, kvmix_tail* tail);

/* Positions of the tokens that a KV head of a layer still holds, ascending: all of them without a token policy. Writes at most
 * `capacity` of them, and to *count how many there are; with capacity 0 positions may be null. */
KVMIX_API kvmix_status kvmix_sequence_kept(const kvmix_cache* cache, kvmix_sequence sequence, int32_t layer, int32_t kv_head,
                                           int64_t* positions, size_t capacity, size_t* count);

typedef struct kvmix_step_item {
  size_t struct_bytes;
  kvmix_sequence sequence;
  int32_t n_tokens;
  /* For plans with a token policy, which acts where prompts end and while decoding. A prompt is a step of several tokens. */
  int32_t more;    /* nonzero: further tokens of the same prompt follow */
  int32_t decoded; /* nonzero: several tokens that are no prompt but stand for as many decoded one by one */
} kvmix_step_item;

/* A step: begin; per layer append, a barrier over the threads, attend; end. KVMIX_OUT_OF_MEMORY from begin changes nothing. */
KVMIX_API kvmix_status kvmix_step_begin(kvmix_cache* cache, const kvmix_step_item* items, size_t item_count);
KVMIX_API kvmix_status kvmix_step_end(kvmix_cache* cache);
/* Undoes begin; rows appended since are discarded. */
KVMIX_API kvmix_status kvmix_step_abort(kvmix_cache* cache);

/* k, v: [rows][kv_heads][head_dim]; q, out: [rows][q_heads][head_dim]; rows of all items in order, strides in floats and at
 * least a row, keys after rotary embedding, out not overlapping q. Called by nth <= threads threads at once, each with its own
 * ith < nth. */
KVMIX_API kvmix_status kvmix_cache_append(kvmix_cache* cache, int32_t layer, const float* k, int64_t k_stride, const float* v,
                                          int64_t v_stride, int32_t ith, int32_t nth);
KVMIX_API kvmix_status kvmix_cache_attend(kvmix_cache* cache, int32_t layer, const float* q, int64_t q_stride, float* out,
                                          int64_t out_stride, int32_t ith, int32_t nth);

/* Real bytes, from the allocator; total is the sum of the others without scratch. The caller sets struct_bytes. */
typedef struct kvmix_memory {
  size_t struct_bytes;
  size_t sealed_bytes, open_bytes, sink_bytes, table_bytes, slack_bytes, scratch_bytes, total_bytes;
  int64_t tokens;
} kvmix_memory;

KVMIX_API kvmix_status kvmix_cache_memory(const kvmix_cache* cache, kvmix_memory* memory);
/* Bytes that one sequence of n_tokens takes in this cache, by formula. */
KVMIX_API kvmix_status kvmix_cache_predict_bytes(const kvmix_cache* cache, int64_t n_tokens, size_t* bytes);
/* Name of the attention kernel in use, e.g. "avx512-vnni"; the pointer lives until this thread's next call. */
KVMIX_API kvmix_status kvmix_cache_kernel(const kvmix_cache* cache, const char** name);

#ifdef __cplusplus
}
#endif

#endif /* KVMIX_KVMIX_H_ */
