// The cache: per (sequence, layer, KV head) a bag of pages, appended to in fp16 or 8 bits and sealed into packed pages.
//
// Token positions of a sequence: [0, sinks) live in the sink rows (fp16 for ever); after them come pages of kPageTokens.
// Page p is sealed, before the next token is appended, once `window` newer tokens exist behind its last slot. So between
// `window` and `window + kPageTokens` newest tokens are not sealed, whether they came one at a time or in page-aligned chunks.
// Their rows are fp16, or (`recent`) 8-bit codes, which take half the room and are sealed from.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kvmix/codec.h"
#include "kvmix/export.h"
#include "kvmix/policy.h"

namespace KVMIX_API kvmix {

// What a side of a layer does to a row before it is stored. Applied to sinks, window and pages alike, so that one
// transformed query (keys) or one inverse on the output (values) is all that attention needs.
struct TransformSpec {
  bool hadamard = false;              // orthonormal Hadamard over the largest power of two dividing head_dim, blockwise
  std::vector<float> scales;          // per [kv_heads * head_dim], not 0: multiplied before the Hadamard; empty: all 1
  std::vector<float> center;          // subtracted first, [kv_heads * head_dim]; keys only (softmax ignores it)
  std::vector<float> matrix;          // dense R per KV head [kv_heads][head_dim][head_dim], row vector x -> x R; exclusive
  std::vector<float> matrix_inverse;  // with hadamard; its inverse is stored beside it
  // Rounding with error feedback when a page is sealed; costs nothing to read. Per KV head the strictly lower triangle of a
  // matrix over the stored channels, row by row, head_dim (head_dim - 1) / 2 numbers: channel k is rounded after the errors
  // (exact - stored) of the channels i < k were added to it with weights [k][i]. Empty: each number by itself.
  std::vector<float> feedback;
  // Parameters of further row maps (src/rows/row_map.h), by the names of their fields.
  struct Field {
    std::string name;
    std::vector<float> values;
    friend bool operator==(const Field&, const Field&) = default;
  };
  std::vector<Field> more;

  bool identity() const { return !hadamard && center.empty() && matrix.empty() && more.empty(); }
  friend bool operator==(const TransformSpec&, const TransformSpec&) = default;
};

struct SideConfig {
  CodecSpec codec;
  TransformSpec transform;
  friend bool operator==(const SideConfig&, const SideConfig&) = default;
};

// How many newest tokens stay unsealed.
struct WindowRule {
  int tokens = 128;       // fixed window; used when ratio is 0
  float ratio_key = 0;    // > 0: the paper's rule (KVmix b.4): about ratio x the current fp16 tail stays; per side, the
  float ratio_value = 0;  // larger of the two decides since a page is sealed as a whole
  friend bool operator==(const WindowRule&, const WindowRule&) = default;
};

// What latents that are stored in place of keys and values stand for (low rank: docs/rank.md). A token's key latents z give
// head h the key up_h^T z[first, first + count) + bias, which is normed and rotated when a query meets it; value latents are
// attended to as they are, and up and bias applied to what softmax makes of them.
struct LatentFactors {
  struct Head {
    int first = 0, count = 0;  // of the side's latents
    std::vector<float> up;     // [count][head_dim]
  };
  std::vector<Head> key, value;             // by KV head
  std::vector<float> key_bias, value_bias;  // [kv_heads * head_dim], or empty
  std::vector<float> key_norm;              // [head_dim]: weights of an RMS norm of each key; empty: none
  float norm_epsilon = 0;
  // Rotation of channel pairs by `angles[i]` radians a position, (i, i + pairs) or, `neighbours`, (2i, 2i + 1), and scaled.
  std::vector<double> angles;
  bool neighbours = false;
  float magnitude = 1;
};

struct LayerConfig {
  int q_heads = 0, kv_heads = 0;  // q_heads is a multiple of kv_heads
  int head_dim = 0;               // 32..256, multiple of 16
  float scale = 0;                // softmax scale applied to q.k
  float softcap = 0;              // > 0: score = softcap * tanh(score / softcap)
  int sliding_window = 0;         // > 0: a query at position p sees keys in (p - sliding_window, p]; older pages are freed
  int sinks = 16;
  WindowRule window;
  // Rows that are not sealed yet, of sides that are not fp16 altogether: f16, or min-max codes of 8 bits scaled per token
  // ("int8.token.g64.minmax.zero").
  CodecSpec recent;
  SideConfig key, value;
  // Latents in place of keys and values: numbers a token, of all KV heads together; 0: none. Each is a multiple of
  // kLatentStep * lists(). Row maps and policies do not go with them, and the device "cuda" does not take them.
  int key_rank = 0, value_rank = 0;
  std::shared_ptr<const LatentFactors> factors = nullptr;  // what they are made by; formulas of sizes do without

  bool latent() const { return key_rank > 0 || value_rank > 0; }
  // Page lists that a token's rows are cut into: one a KV head, or as few as hold all latents.
  int lists() const { return latent() ? (kv_heads * head_dim + kMostLatents - 1) / kMostLatents : kv_heads; }
  // Stored numbers of a token in one of them.
  int stored_width(Side side) const { return latent() ? (side == Side::kKey ? key_rank : value_rank) / lists() : head_dim; }
  static constexpr int kMostLatents = 256, kLatentStep = 16;
};

// How rows of a side with this codec are kept until they are sealed: one that stays fp16 has nothing to gain from codes.
inline CodecSpec open_codec(const CodecSpec& recent, const CodecSpec& codec) { return codec.is_f16() ? codec : recent; }

struct CacheConfig {
  std::vector<LayerConfig> layers;
  int threads = 1;       // threads that will call append/attend together (1..256)
  size_t max_bytes = 0;  // pool limit; 0: none. Exceeding it throws kOutOfMemory and leaves the cache as it was
  std::string kernel;    // "" best available, or a name from attention_kernels(); one that cannot run throws kUnsupported
  bool exact = false;    // attention arithmetic at least bf16-exact also where int8 would do
  // Where pages are and attention is computed: "cpu", or "cuda", the calling thread's current CUDA device. There token policies
  // are refused, and `threads`, `kernel` and `exact` are the device's own matter: threads of one call but the first have
  // nothing to do.
  std::string device = "cpu";
  // Of "cuda". `stream`: a cudaStream_t that all work is queued on; null: one of the cache's own. `device_rows`: k, v, q and
  // out are device memory, and append and attend only queue; otherwise they are copied, and attend waits.
  void* stream = nullptr;
  bool device_rows = false;
  // Of "cuda". append stores rows beside what the stream is given after it, until attend of the same layer, which must follow:
  // for engines that can still compute queries then. k and v must stay what they are until attend was called.
  bool append_beside = false;
  // Which tokens stay; all of them without one. Widths that the policy asks for replace those of `layers`.
  std::optional<PolicySpec> tokens;
  // Which channels of keys sealed pages hold; all of them without one, in layers with a sliding window, and in pages that were
  // sealed before a prompt had ended.
  std::optional<PolicySpec> channels;
};

// Threads that can compute at once without sharing a core, as affinity and quotas leave them: 1 to 256.
int default_threads();

using SequenceId = int32_t;

struct StepItem {
  SequenceId sequence;
  int n_tokens;  // new tokens of this step, >= 1
  // Token policies act where prompts end: with a step of several tokens, or the one that completes steps marked `more`.
  bool more = false;     // further tokens of the same prompt follow
  bool decoded = false;  // several tokens that are not a prompt's but stand for as many decoded one by one
};

// Real bytes, from the allocator. `total` is what the pool has taken from the system for these sequences.
struct MemoryReport {
  size_t sealed_bytes = 0;   // packed pages in use (codes, scales, padding)
  size_t open_bytes = 0;     // pages not sealed: window and the page being filled, unused slots included
  size_t sink_bytes = 0;     // fp16 sink rows
  size_t table_bytes = 0;    // page tables and per-sequence state
  size_t slack_bytes = 0;    // taken from the system, not in use by any page
  size_t scratch_bytes = 0;  // attention work space (constant once warm)
  size_t total_bytes = 0;    // sum of the above without scratch
  int64_t tokens = 0;        // live tokens over all sequences
};

struct CacheStats {
  std::string kernel;        // decode kernel that ran, e.g. "avx512-vnni"; per-layer mixes are joined with '+'
  int64_t sealed_pages = 0;  // since creation
  double seal_seconds = 0, append_seconds = 0, attend_seconds = 0;  // summed over threads
};

// Thread safety: create/remove/fork/truncate/begin_step/end_step/save/load from one thread at a time; append and attend of
// one layer from `threads` threads at once with ith = 0..nth-1, nth <= config.threads; the caller puts a barrier between
// append and attend of a layer. No allocation in append or attend.
class Cache {
 public:
  explicit Cache(CacheConfig config);
  ~Cache();
  Cache(Cache&&) noexcept;
  Cache& operator=(Cache&&) noexcept;

  const CacheConfig& config() const;

  SequenceId create();
  void remove(SequenceId sequence);
  // A copy that shares sealed and other full pages (reference-counted); the page being filled is copied on write.
  SequenceId fork(SequenceId sequence);
  // A copy that shares nothing. Throws kOutOfMemory and leaves the cache as it was.
  SequenceId copy(SequenceId sequence);
  // Keeps the first n_tokens. Cutting inside a sealed page makes it an open page again (its loss stays).
  void truncate(SequenceId sequence, int64_t n_tokens);
  int64_t length(SequenceId sequence) const;
  std::vector<SequenceId> sequences() const;

  // Opens a step: reserves memory, decides what is sealed. Rows of all items are laid out one after the other in the
  // order given; q, k, v and out below follow it. Throws kOutOfMemory before anything changed.
  void begin_step(std::span<const StepItem> items);
  // Bytes of the pages that such a step would take, those it gives back at its end not subtracted.
  size_t step_bytes(std::span<const StepItem> items) const;
  // Seals what left the window, then stores the step's rows. k, v: float [n_rows][kv_heads][head_dim], row strides in
  // floats. Keys are post-RoPE. Of layers with latents [n_rows][key_rank] and [n_rows][value_rank].
  void append(int layer, const float* k, int64_t k_stride, const float* v, int64_t v_stride, int ith, int nth);
  // Causal attention of the step's queries over everything stored, this step's rows included.
  // q, out: float [n_rows][q_heads][head_dim], row strides in floats; out must not alias q.
  void attend(int layer, const float* q, int64_t q_stride, float* out, int64_t out_stride, int ith, int nth);
  // Both for one layer, by config.threads threads that the cache keeps: for callers who have no threads of their own.
  void step_layer(int layer, const float* k, int64_t k_stride, const float* v, int64_t v_stride, const float* q,
                  int64_t q_stride, float* out, int64_t out_stride);
  // On the device "cuda", between begin_step and the first append: steps with equal keys queue the same launches, so what was
  // captured of one (cudaStreamBeginCapture, in relaxed mode) may be launched in another in place of append and attend. 0: a
  // step that must be queued, as those with prompts are.
  uint64_t launch_key();
  // Closes the step: lengths grow, freed pages return to the pool, and where a prompt ended the token policy's decision is
  // carried out (memory for it was reserved). abort_step undoes a begin_step (rows are discarded).
  void end_step();
  void abort_step();

  MemoryReport memory() const;
  // Sealed and unsealed token counts of a sequence in a layer: how long the window really is.
  struct TailReport {
    int64_t sinks, sealed, window;
  };
  TailReport tail(SequenceId sequence, int layer) const;
  CacheStats stats() const;
  // Positions of the tokens that each KV head of a layer holds, ascending. `length` counts dropped ones too.
  std::vector<std::vector<int64_t>> kept(SequenceId sequence, int layer) const;
  // Those of them that a policy has moved to its low tier; empty for a policy without one.
  std::vector<std::vector<int64_t>> low_tier(SequenceId sequence, int layer) const;
  // Of the stored channels of a layer's keys those that pages sealed from now on hold, by KV head, ascending; all where empty.
  std::vector<std::vector<int>> channels(SequenceId sequence, int layer) const;
  // The length at which the next step seals a page, if only single tokens come: up to there chunks of decoded tokens store and
  // see what one by one would. INT64_MAX if none is near.
  int64_t next_seal(SequenceId sequence) const;

  // One sequence to / from a file: versioned, checksummed, canonical layout; written to a temporary and renamed.
  // `fingerprint` ties the file to a model and plan; load throws kMismatch on another one, kCorrupt on damage.
  void save(SequenceId sequence, const std::string& path, const std::string& fingerprint) const;
  SequenceId load(const std::string& path, const std::string& fingerprint);

  // Reads the stored rows back as float [length][head_dim] (transforms undone when `original_space`), for tests and
  // analysis. Positions freed by a sliding window or dropped by a policy are NaN. Of a layer with latents those of a page list
  // in place of a KV head's rows, [length][stored_width], as stored only.
  void read(SequenceId sequence, int layer, int kv_head, Side side, bool original_space, float* rows) const;

 private:
  struct KVMIX_HIDDEN Impl;
  std::unique_ptr<Impl> impl_;
};

// Of the calling thread's current CUDA device. Throws kUnsupported where there is none.
struct DeviceSpace {
  size_t free_bytes, total_bytes;
};
DeviceSpace cuda_space();

// What the device "cuda" takes in this build; throws kUnsupported in one without CUDA.
struct CudaSupport {
  std::string architectures;            // as CMake was given them: "80-real;90a-real"
  std::string bits, groups, head_dims;  // lists: "1, 2, 4"; 16 bits are fp16
  std::string trellis_bits;             // of trellis codes, likewise
};
CudaSupport cuda_support();

// The GPUs of this machine; throws kUnsupported where there is none, as cuda_space does.
struct CudaDevice {
  std::string name;
  int capability = 0;  // major * 10 + minor
  size_t total_bytes = 0;
  std::vector<int> head_dims;   // that its shared memory has room for
  bool prefill_kernel = false;  // compute capability 9.0, and compiled for it
};
std::vector<CudaDevice> cuda_devices();

// What a saved cache says of itself, after its checksum was verified, without a model.
struct SavedCacheInfo {
  int version;
  std::string fingerprint;
  int64_t tokens;
  int layers;
  size_t file_bytes;
  std::vector<std::string> key_codecs, value_codecs;
};
SavedCacheInfo inspect_saved_cache(const std::string& path);

struct AttentionKernelInfo {
  std::string name;  // "portable", "avx2", "avx512-vnni", "avx512-bf16"
  std::string description;
  bool available;  // runs on this machine
};
std::vector<AttentionKernelInfo> attention_kernels();

// What a side can do to rows before they are stored (TransformSpec), in the order in which it is done.
struct RowMapListing {
  std::string name;
  std::string description;
  bool keys, values;                // sides that take it
  std::vector<std::string> fields;  // of a plan's side
};
std::vector<RowMapListing> row_maps();

// Bytes that a sequence of n_tokens takes under this config, by formula (pages, sinks, open pages at their worst or
// expected fill, tables). `expected` averages the window's fill; otherwise the exact value for this n_tokens.
// With a token policy: after a prompt of prompt_tokens (n_tokens, if negative) and n_tokens in all. Exact where every KV head
// keeps as many tokens as the policy's budget says and drops them at prompts' ends or, after a prompt beyond the budget, the
// oldest first; within a page per head where heads share a layer's or drop others while decoding; where the text decides how
// many are kept, as if nothing were dropped.
size_t predict_bytes(const CacheConfig& config, int64_t n_tokens, int64_t prompt_tokens = -1);
// What the allocator takes from the system beyond that for `sequences` of n_tokens, fed token by token, at the most: it takes
// whole system pages for each size of record.
size_t predict_slack_bytes(const CacheConfig& config, int64_t n_tokens, int sequences = 1);
// Elements of K and V that attention still needs after n_tokens: all tokens of a layer, or its sliding window's newest.
double live_elements(const CacheConfig& config, int64_t n_tokens);
// Bits per live element, all bytes included: predict_bytes * 8 / live_elements.
double predict_bits_per_element(const CacheConfig& config, int64_t n_tokens);
// Bits per element of pages once they are sealed, their scales included: without sinks, rows that are not sealed, tables and
// slack. Layers count by their live elements after n_tokens. Of what a token policy keeps, in the first tier's codecs; of
// latents and chosen channels by the elements that they stand for.
double predict_body_bits(const CacheConfig& config, int64_t n_tokens);

}  // namespace kvmix
