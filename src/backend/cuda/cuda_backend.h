// Pages in device memory, attended to by the kernels of attention/cuda. All work is queued on one stream, but sealing, which
// others do beside the attention of the layers before, and with CacheConfig::append_beside the storing of rows. cuda_backend.cc
// holds pages and constants, work.cc cuts a step's attention, step.cc makes its tables and launches, stored.cc moves pages
// between the device and files.
//
// The kernels' page tables hold one id for all heads of a page; here each head has pages of its own, so a launch takes every
// (sequence, KV head) as a sequence with one KV head. Sequences with as many new tokens go together: decode is one launch,
// every length of chunks another.
//
// Where a token policy drops tokens of a layer, the heads' lists have lengths of their own. To the kernels such a list is a
// shorter sequence: the tokens that are left are its first ones, since keys were rotated before they were stored, and pages are
// full (wants_full_pages). policies.cc scores prompts for policies and makes the pages of what they keep.
//
// Where a channel policy leaves keys' channels out, a list's sealed pages are thin records from its choice on. A kernel takes
// pages of either kind, so such a layer's work list has runs of pages of one kind, two launches share its partial results, and
// the last of a list's pieces to finish adds them up. channels.cc knows the runs and brings the choice to the device.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <bit>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "attention/cuda/cut.h"
#include "backend/backend.h"
#include "backend/cuda/memory.h"
#include "backend/cuda/pool.h"
#include "backend/cuda/rows.h"
#include "backend/cuda/window.h"
#include "codec/cuda/seal.h"
#include "kvmix/kvmix_cuda.h"

namespace kvmix::cuda {

// The caller's stream, or one of its own; `urgent`: its thread blocks begin before those of other streams that wait.
class Stream {
 public:
  explicit Stream(void* given = nullptr, bool urgent = false);
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream();
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_;
  bool owned_;
};

class Event {
 public:
  Event();
  Event(Event&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  Event& operator=(Event&&) = delete;
  ~Event();
  void record(cudaStream_t on) const;
  // `flags` as of cudaStreamWaitEvent.
  void make_wait(cudaStream_t stream, unsigned flags = 0) const;
  void wait() const;

 private:
  cudaEvent_t event_ = nullptr;
};

class CudaBackend final : public Backend {
 public:
  CudaBackend(const CacheConfig& config, const FormatTable& formats, std::vector<LayerFormats> layers,
              const CudaBackend* beside = nullptr);
  ~CudaBackend() override;

  bool wants_full_pages() const override { return true; }
  PageHandle allocate(const PageFormat& format) override;
  void release(PageHandle page, const PageFormat& format) override;
  void trim() override;
  PoolBytes pool() const override { return {pool_.used_bytes(), pool_.taken_bytes()}; }
  size_t scratch_bytes() const override;
  void copy(PageHandle from, PageHandle to, const PageFormat& format) override;
  void transcode(const Transcode& job) override;
  void gather(std::span<const Gather> jobs) override;
  void read(const PageEntry& page, Side side, float* rows) const override;
  size_t saved_bytes(const PageFormat& format, int live) const override;
  void save(const PageEntry& page, std::string& to) const override;
  void load(const PageEntry& page, const char* from) override;
  void use_blocks(std::byte* blocks) override;
  PageHandle in_blocks(size_t offset) const override;
  void begin(const StepPlan& plan) override;
  // The first of the threads queues everything.
  void append(int layer, const float* k, int64_t k_stride, const float* v, int64_t v_stride, Worker worker) override;
  void attend(int layer, const float* q, int64_t q_stride, float* out, int64_t out_stride, Worker worker) override;
  uint64_t launch_key() override;
  Window window(SequenceId id, int layer, int kv_head) const override;
  std::span<const float> query_squares(SequenceId id, int layer, int kv_head) const override;
  std::vector<float> key_squares(int layer, std::span<const KeySquares> lists) override;
  Mass mass(SequenceId, int, int) override { return {nullptr, nullptr}; }
  void end() override;
  void forget(SequenceId id) override;
  void fork(SequenceId from, SequenceId to) override;
  void cut_queries(SequenceId id, int64_t n) override;
  void report(CacheStats& stats) const override;

 private:
  // A launch of attention: sequences of as many new tokens.
  struct Launch {
    size_t first, entries;  // of the step's, by `order_`
    int tokens;
    int64_t before;  // rows of the entries before
    size_t runs;     // of page_runs_
    Pieces pieces{};
    size_t items = 0;       // of the work list, with those that are no work
    size_t work_items = 0;  // without
    size_t workspace_bytes = 0;
    size_t items_at = 0;
    bool shares_items = false;  // with a launch before
    // Of the pages of chosen key channels; none: a launch for all pages.
    size_t thin_items = 0, thin_work_items = 0, thin_items_at = 0;

    bool split() const { return thin_items > 0; }
    size_t all_items() const { return items + thin_items; }
  };
  // Places of a list, [begin, end) each, in order.
  using ThinRuns = std::vector<std::pair<int32_t, int32_t>>;
  // What layers that are cut alike have in common.
  struct Shape {
    kvmix_cuda_format format;
    int q_heads, kv_heads, sinks, sliding_window;
    int own_layer = -1;  // the one layer, whose lists have lengths or kinds of pages of their own
    std::vector<Launch> launches;
    std::vector<int32_t> lengths;  // of its lists, [entries of the step][kv_heads]

    bool cut_alike(const Shape& other) const;  // where a launch of both is cut into the same pieces
    bool same_cut(const Shape& other) const;   // they are
    bool operator==(const Shape& other) const;
  };
  struct Layer {
    const LayerConfig& config;
    LayerFormats ids;
    kvmix_cuda_format format;
    RecordShape open;  // of pages that are not sealed, but the sinks'
    size_t shape;
    RowOps key, value, query, output;
    kvmix_cuda_transform key_feedback{}, value_feedback{};
    const float* key_panels = nullptr;  // feedback of 8-bit keys as they come, as AppendRows
    bool keys_fitted, values_fitted, keys_unbiased, values_unbiased;
    // Of the step, places in its inputs.
    size_t open_ids_at = 0, record_ids_at = 0;
    int seals = 0;        // pages, of all heads each
    size_t table_at = 0;  // its page tables begin here
    // Of a governed layer: how far its lists are behind their sequences' lengths, [rows of the page tables][kv_heads]; and
    // where the inputs have it.
    std::vector<int32_t> dropped = {};
    size_t dropped_at = 0;
    size_t queries_at = 0;  // its own in a room of a prompt's
    // Of a layer that thins: its records of chosen key channels, which of its lists' places hold such, [rows of the page
    // tables][kv_heads], and where channels_ and the step's inputs have what is chosen and what is sealed so.
    ThinShape thin{};
    std::vector<ThinRuns> thin_runs = {};
    size_t channels_at = 0;
    int thin_seals = 0;  // as `seals`
    size_t thin_open_ids_at = 0, thin_record_ids_at = 0, thin_ids_at = 0, thin_chosen_at = 0;

    int heads_per_kv() const { return config.q_heads / config.kv_heads; }
    bool own_lists() const { return ids.governed || ids.thins; }
    size_t channel_bytes() const { return static_cast<size_t>(config.kv_heads * thin.key_width); }
  };

  // The last queries of a prompt that goes on, of all layers, in one of two rooms; the open step writes to the other.
  struct PromptQueries {
    std::array<DeviceMemory, 2> rooms;
    int turn = 0;
    int64_t begin = 0, end = 0;  // positions
  };
  // A prompt in the open step: the queries that will be kept, and, where it ends, of each layer what they score.
  struct PromptStep {
    size_t row;      // of the page tables
    int64_t before;  // rows of the entries before, in the order of the step
    bool ends;
    int64_t begin, end;  // positions
    struct Scored {
      size_t heads_at = 0;            // of WindowHead, in the inputs
      std::vector<WindowHead> heads;  // sums are those of window_sums_
      int64_t most_tokens = 0;
      size_t squares_at = 0;  // of query_squares_
    };
    std::vector<Scored> layers;
  };

  void use_device() const;
  const float* constant(std::span<const float> numbers);
  kvmix_cuda_attend_params attend_params(const Shape& shape) const;
  void cut_shapes();
  void part(Shape& shape);
  void cut(Shape& shape);
  std::span<const int32_t> lengths(const Shape& shape, size_t first, size_t entries) const;
  void read_lengths(Shape& shape) const;
  void read_dropped(Layer& layer, size_t l, size_t row, const StepEntry& entry) const;
  void begin_prompts();
  void score_prompts(const Layer& layer, size_t l);
  // All layers that want a prompt's last queries keep as many.
  int queries_kept(const Layer& layer) const {
    return (layer.ids.governed && layer.ids.window_queries > 0) || layer.ids.thins ? most_kept_ : 0;
  }
  // channels.cc
  void begin_channels();
  bool is_thin(const Layer& layer, const PageEntry& page) const { return layer.ids.thins && page.format == layer.ids.thin; }
  int count_seals(const Layer& layer, size_t l, bool thin);
  void gather(const Layer& layer, std::span<const Gather* const> open, std::span<const std::vector<const Gather*>> sealed,
              bool thin);
  void open_thin(const Layer& layer, const Transcode& job);
  size_t whole_together(const Layer& layer) const;  // pages of every head
  void write_thin_seals(const Layer& layer, size_t l, std::byte* to);
  static void write_columns(const Layer& layer, const PageList& list, uint8_t* to);
  void seal_thin(const Layer& layer, size_t group);  // what the step seals so
  void seal_thin(const Layer& layer, kvmix_cuda_seal_params p, const RecordShape& open, const int32_t* ids,
                 const uint8_t* chosen, DeviceMemory& whole);
  bool has_thin(const Shape& shape, size_t entry) const;
  void cut_runs(const Shape& shape, Launch& launch, const kvmix_cuda_attend_params& p) const;
  void write_runs(const Shape& shape, const Launch& launch, std::byte* to) const;
  template <class Visit>
  void each_piece(const Shape& shape, const Launch& launch, const Visit& visit) const;
  bool same_runs(const Shape& a, const Shape& b) const;
  size_t query_bytes(const Layer& layer) const;
  void write_work(const Shape& shape, const Launch& launch, std::byte* to);
  void write_tables();
  void find_patches();
  void write_table(const Layer& layer, size_t l, const StepEntry& entry, int32_t* table) const;
  void write_seals(const Layer& layer, size_t l, int32_t* open_ids, int32_t* record_ids);
  // What the step seals of a layer; other pages, whose rows are `open`.
  SealJob seal_job(const Layer& layer, cudaStream_t stream) const;
  SealJob seal_job(const Layer& layer, kvmix_cuda_seal_params p, const RecordShape& open) const;
  void seal_all();
  // Makes what is queued from here on wait for sealing, also of a step that was aborted.
  void join() const;
  void attend(const Layer& layer, const Launch& launch);
  const PageFormat& format(const PageEntry& page) const { return formats_[static_cast<FormatId>(page.format)]; }
  ThinShape shape_of(const PageFormat& format) const;
  // fp16 rows next to each other, keys before values.
  static bool is_rows(const PageFormat& f) { return f.rows || f.role == PageRole::kSinks; }
  static int32_t id_of(PageHandle page) { return static_cast<int32_t>(page - 1); }
  // What tables say of a page, and at which of a head's places.
  int32_t table_id(const PageEntry& page) const {
    return format(page).role == PageRole::kSealed ? id_of(page.handle) : ~id_of(page.handle);
  }
  static int64_t table_place(const Layer& layer, const PageEntry& page) {
    if (page.format == layer.ids.sinks) return 0;
    return (page.first - layer.config.sinks) / kPageTokens + (layer.config.sinks > 0 ? 1 : 0);
  }
  std::byte* memory(PageHandle page) const { return pool_.base() + (page - 1) * kPageUnit; }
  std::vector<std::byte> host_copy(const PageEntry& page) const;
  template <class T>
  const T* input(size_t at) const {
    return reinterpret_cast<const T*>(inputs_.device() + at);
  }

  const FormatTable& formats_;
  int device_;
  bool device_rows_;
  Stream stream_;
  // Sealing a few pages takes long for what it does, and launches and events time of the host. So layers are sealed in groups,
  // the first of which are small as attention waits for them, each twice as many layers as the one before: by one launch for
  // each kernel that its layers take, on a stream of its own.
  static constexpr size_t kSealGroups = 8;
  static size_t seal_group(size_t layer) { return std::min<size_t>(std::bit_width(layer + 1) - 1, kSealGroups - 1); }
  static bool begins_group(size_t layer) { return layer == 0 || seal_group(layer) != seal_group(layer - 1); }
  struct SealGroup {
    Stream stream;
    Event sealed;
    bool can_seal = false;  // it has layers that ever do
    bool seals = false;     // in the step
  };
  std::array<SealGroup, kSealGroups> sealing_;
  std::vector<SealJob> seal_jobs_;
  Event planned_, sealed_;
  bool seals_ = false;  // the step does
  // Where rows are stored beside what stream_ does meanwhile; none: on stream_.
  std::optional<Stream> beside_;
  Event projected_, appended_;
  bool appends_ = false;  // there, what stream_ does not wait for yet
  DevicePool pool_;
  // What handles of pages count from: the pool's memory, or somebody else's (use_blocks).
  std::byte *records_, *open_pages_;
  std::vector<DeviceMemory> constants_;
  std::vector<Layer> layers_;
  std::vector<Shape> shapes_;
  std::vector<std::string> kernels_used_;  // by layer

  // The step in progress.
  const StepPlan* plan_ = nullptr;
  std::vector<size_t> order_;     // entries of the plan, by new tokens
  std::vector<int32_t> lengths_;  // of its entries in that order
  std::vector<PageRuns> page_runs_;
  int rows_ = 0;
  bool keyed_ = false;  // launch_key was called: append and attend may be captured
  StepInputs inputs_;
  // Page tables stay on the device from step to step: of each layer [entries of a step][kv_heads][stride]. A row is written
  // again where another sequence comes to stand in it or its pages have changed, but by a step alone: then only what changed.
  PageTables tables_;
  std::vector<TablePatch> patches_;
  std::vector<int32_t> patched_row_;  // by entry of the plan; -1: not patched
  std::vector<int> sealed_of_head_;
  // By sequence; and those of the open step. What one prompt leaves the next takes.
  std::map<SequenceId, PromptQueries> prompt_queries_;
  std::map<SequenceId, PromptStep> prompts_;
  std::vector<DeviceMemory> spare_rooms_;
  size_t room_bytes_ = 0;  // of a prompt's queries
  int most_kept_ = 0;
  DeviceMemory window_scores_, window_sums_, staged_, query_squares_, key_squares_;
  PinnedMemory host_sums_, host_squares_;
  Event scored_;
  StepInputs moves_;  // of gather
  // What lists have chosen, of each layer that thins [rows of the page tables][kv_heads][channels], as the host knows it too,
  // and the revision of the pages that a row is of.
  DeviceMemory channels_;
  std::vector<uint8_t> channels_written_;
  std::vector<uint64_t> channel_revisions_;
  // Records of all channels on their way to such of chosen ones, by the group that seals them; the last is stream_'s.
  std::array<DeviceMemory, kSealGroups + 1> whole_records_;

  // Working memory of one layer's calls.
  struct Scratch {
    DeviceMemory queries, outputs, workspace;
    size_t clean_bytes = 0;                         // of the workspace, from its beginning: they are zero
    DeviceMemory host_q, host_k, host_v, host_out;  // of rows that come from the host
  };
  std::shared_ptr<Scratch> scratch_;
};

}  // namespace kvmix::cuda
