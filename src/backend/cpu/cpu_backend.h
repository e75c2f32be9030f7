// Pages in the machine's memory, attended to by the kernels of attention/cpu. append.cc stores and seals, cut.cc splits a
// step's attention over threads, attend.cc runs it. For token policies window.cc scores the last queries of prompts and mass.cc
// counts what every query pays.
#pragma once

#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "attention/cpu/kernel.h"
#include "backend/backend.h"
#include "backend/cpu/pool.h"
#include "base/parallel.h"
#include "rows/row_map.h"

namespace kvmix {

class CpuBackend final : public Backend {
 public:
  CpuBackend(const CacheConfig& config, const FormatTable& formats, std::vector<LayerFormats> layers);

  PageHandle allocate(const PageFormat& format) override;
  void release(PageHandle page, const PageFormat& format) override;
  void trim() override { pool_.trim(); }
  PoolBytes pool() const override { return {pool_.used_bytes(), pool_.taken_bytes()}; }
  size_t scratch_bytes() const override;
  void copy(PageHandle from, PageHandle to, const PageFormat& format) override;
  void transcode(const Transcode& job) override { transcode(job, threads_[0]); }
  void gather(std::span<const Gather> jobs) override;
  void read(const PageEntry& page, Side side, float* rows) const override;
  size_t saved_bytes(const PageFormat& format, int live) const override;
  void save(const PageEntry& page, std::string& to) const override;
  void load(const PageEntry& page, const char* from) override;
  void use_blocks(std::byte* blocks) override { blocks_ = blocks; }
  PageHandle in_blocks(size_t offset) const override {
    return static_cast<PageHandle>(reinterpret_cast<uintptr_t>(blocks_ + offset));
  }
  void begin(const StepPlan& plan) override;
  void append(int layer, const float* k, int64_t k_stride, const float* v, int64_t v_stride, Worker worker) override;
  void attend(int layer, const float* q, int64_t q_stride, float* out, int64_t out_stride, Worker worker) override;
  Window window(SequenceId id, int layer, int kv_head) const override;
  std::span<const float> query_squares(SequenceId id, int layer, int kv_head) const override;
  std::vector<float> key_squares(int layer, std::span<const KeySquares> lists) override;
  Mass mass(SequenceId id, int layer, int kv_head) override;
  void end() override;
  void forget(SequenceId id) override { queries_.erase(id); }
  void fork(SequenceId from, SequenceId to) override;
  void cut_queries(SequenceId id, int64_t n) override;
  void report(CacheStats& stats) const override;

 private:
  // A part of one layer's attention: queries of one entry and head over a range of its pages behind the sinks.
  struct Unit {
    int entry, head;
    int first_token, tokens;
    int part, parts;
    int page_begin, page_end;  // of HeadPages; part 0 also takes the sinks
    int merge;                 // counter of this (entry, head, query block)
    int part_slot;             // its first row in the partial results
    ptrdiff_t mass_slot = 0;   // the first row of these queries in weights_, where their mass is counted
  };
  struct LayerCut {
    std::vector<Unit> units;
    std::vector<int> windows;  // entries whose prompts' queries are wanted; units of their query heads follow
    std::vector<int> masses;   // entries whose prompts' mass is counted; units of their KV heads follow those
    int merges = 0, part_rows = 0;
    ptrdiff_t mass_rows = 0;
  };
  // The pages of a KV head that a query may see: the sinks, then those of the low tier, then the others.
  struct HeadPages {
    HeadPages(const LayerPages& layer, int head, FormatId sinks)
        : list(layer.heads[static_cast<size_t>(head)]),
          low(layer.low.empty() ? nullptr : &layer.low[static_cast<size_t>(head)]),
          body(!list.pages.empty() && list.pages[0].format == sinks ? 1 : 0) {}

    const PageList& list;
    const PageList* low;
    size_t body;  // index of the first page behind the sinks

    size_t low_size() const { return low == nullptr ? 0 : low->pages.size(); }
    int size() const { return static_cast<int>(low_size() + list.pages.size() - body); }  // without the sinks
    const PageEntry& operator[](size_t i) const { return i < low_size() ? low->pages[i] : list.pages[body + i - low_size()]; }
    int64_t low_tokens() const { return low == nullptr ? 0 : low->tokens(); }
    int64_t tokens() const { return low_tokens() + list.tokens(); }
    // Parts of at most kPageTokens slots: of the sinks, of all pages.
    int sink_pieces() const { return body == 0 ? 0 : (list.pages[0].live + kPageTokens - 1) / kPageTokens; }
    int pieces() const { return sink_pieces() + size(); }
  };
  // Partial softmax (AttendJob), and room for one: m and l [rows], acc [rows][head_dim].
  struct Partial {
    float *m, *l, *acc;
  };
  struct PartialRoom {
    std::vector<float> m, l, acc;
    Partial at_front() { return {m.data(), l.data(), acc.data()}; }
  };
  struct Scratch {  // of a thread
    std::vector<std::byte> kernel;
    std::vector<float> q, thin_q, rows;
    PartialRoom whole, apart;                         // of a unit, and of its pages in a further format
    std::vector<float> queries, scores, lanes, dots;  // of a window, or of a prompt's mass
    std::vector<float> paid;                          // mass of a KV head's tokens
    std::vector<float> references, factors;           // of a unit's rows: what weights were taken against, and what scales them
    std::vector<uint16_t> half, thin_half;            // a page's rows on their way from one format to another
    std::vector<int64_t> positions;
    std::vector<PageRef> pages;
    double append_seconds = 0, seal_seconds = 0, attend_seconds = 0;
  };
  // The last queries of a prompt, transformed: positions [begin, end), of each layer [capacity][q_heads][head_dim], a ring.
  struct Queries {
    int64_t begin = 0, end = 0;
    std::vector<std::vector<float>> layers;
  };
  // What a step makes of a prompt: the queries to keep if it goes on, the sums over them if it ends.
  struct PromptStep {
    Queries next;
    std::vector<std::vector<float>> sums;      // by layer, [q_heads][tokens], heads of one KV head together
    std::vector<std::vector<float>> squares;   // by layer, [q_heads][head_dim]: query_squares
    std::vector<std::vector<int64_t>> tokens;  // by layer and KV head
    bool ends = false;
  };
  struct Layer {
    Layer(const LayerConfig& layer, const LayerFormats& formats)
        : config(layer),
          ids(formats),
          key_maps(layer.key.transform, row_shape(layer, Side::kKey), "keys"),
          value_maps(layer.value.transform, row_shape(layer, Side::kValue), "values") {}

    const LayerConfig& config;
    LayerFormats ids;
    RowMapChain key_maps, value_maps;
    int heads_per_kv = config.q_heads / config.kv_heads;
    // Formats of tiles that pages of this layer can have, the sealed one of all channels first; fp16 rows go with that one.
    std::vector<FormatId> tiles;
    // Feedback of recent keys, [kv_heads][head_dim][head_dim] (feedback_columns), or empty. Values do not need it: their errors
    // are not put through a softmax.
    std::vector<float> key_columns;

    // Of an unnormalised output: head_dim, or the most value latents that a head is made of.
    int sum_width() const {
      int width = config.latent() ? 0 : config.head_dim;
      if (config.latent()) {
        for (const LatentFactors::Head& head : config.factors->value) width = std::max(width, head.count);
      }
      return width;
    }
    const float* columns(int kv_head) const {
      const ptrdiff_t dim = config.head_dim;
      return key_columns.empty() ? nullptr : key_columns.data() + kv_head * dim * dim;
    }
  };

  void gather(const Gather& job, Side side, Scratch& scratch) const;
  void begin_window(size_t layer, size_t entry);
  // A query head of a prompt: keeps its queries, or scores the stored keys with them.
  void attend_window(size_t layer, size_t entry, int q_head, const float* q, int64_t q_stride, Scratch& scratch);
  void score(const Layer& layer, const HeadPages& pages, std::span<const float> queries, std::span<float> sums,
             Scratch& scratch);
  // scratch.scores[rows][tokens]: dots of the queries and the first `tokens` tokens.
  void dots(const HeadPages& pages, std::span<const float> queries, size_t dim, size_t tokens, Scratch& scratch);
  bool counts_mass(const Layer& layer, const StepEntry& entry) const {
    if (!layer.ids.mass || (entry.prompt && !layer.ids.mass_of_prompts)) return false;
    const int64_t every = layer.ids.mass_every;
    return entry.prompt || (entry.start + every - 1) / every * every < entry.end();
  }
  void begin_mass(size_t layer, size_t entry);
  // A KV head of a prompt: what the step's queries pay to all tokens, query by query.
  void attend_mass(size_t layer, size_t entry, int kv_head, const float* q, int64_t q_stride, Scratch& scratch);
  // The same of decoded tokens, from the weights that kernels gave out and the rows' final softmax.
  void add_mass(const Layer& layer, const Unit& unit, const Partial& softmax, Scratch& scratch);
  void key_lanes(const PageEntry& page, const PageList& list, int dim, int first, int n, Scratch& scratch) const;
  // Slots [first, first + n) of a page's side as floats [n][width], as stored. `tile`: room for kPageTokens rows, may be `rows`
  // where that holds as many and `first` is 0.
  void slot_rows(const PageEntry& page, Side side, int first, int n, float* rows, float* tile) const;
  static std::byte* memory(PageHandle page) { return reinterpret_cast<std::byte*>(static_cast<uintptr_t>(page)); }
  const PageFormat& format(const PageEntry& entry) const { return formats_[static_cast<FormatId>(entry.format)]; }
  const AttentionKernel& pick_kernel(const AttendJob& job) const;
  AttendJob layer_job(const LayerConfig& layer) const;
  void transcode(const Transcode& job, Scratch& scratch);
  void cut(size_t layer);
  void attend_unit(const Layer& layer, const Unit& unit, const float* q, int64_t q_stride, const Partial& partial,
                   Scratch& scratch);
  // The same of a layer with latents, for one KV head over pages that all heads share (latents.cc).
  void attend_latents(const Layer& layer, const Unit& unit, const float* q, int64_t q_stride, const Partial& partial,
                      Scratch& scratch) const;
  // The latents of a head that slots [first, first + n) of a page hold over all lists, [n][head.count]; `tile`: room for one
  // list's rows.
  void latent_rows(const LayerPages& lists, size_t page, Side side, const LatentFactors::Head& head, int first, int n,
                   float* tile, float* out) const;
  // A head's output from its summed value latents.
  void latent_output(const Layer& layer, int kv_head, const float* acc, float norm, float* out) const;
  static size_t latent_scratch_floats(const Layer& layer, int rows);
  static std::byte* aligned(std::byte* p) { return p + (64 - reinterpret_cast<uintptr_t>(p) % 64) % 64; }
  void merge_parts(const Layer& layer, const Unit& unit, int row, float* acc, float& top, float& sum) const;

  const FormatTable& formats_;
  std::vector<Layer> layers_;
  PagePool pool_;
  std::byte* blocks_ = nullptr;
  bool exact_;
  std::string forced_kernel_;
  std::vector<const AttentionKernel*> kernels_;  // candidates, best first
  std::vector<std::string> kernels_used_;        // by layer

  std::map<SequenceId, Queries> queries_;  // of prompts that go on

  // The step in progress.
  const StepPlan* plan_ = nullptr;
  std::vector<LayerCut> cuts_;  // by layer
  AtomicCounters next_unit_;    // by layer
  AtomicCounters remaining_;    // by merge of the layer in progress
  std::map<SequenceId, PromptStep> prompts_;
  PartialRoom parts_;
  // Softmax weights of decoded queries, by unit, piece of a page and row, and what they are relative to (PageRef).
  std::vector<float> weights_, references_;
  struct HeadMass {
    std::vector<float> low, tokens;
  };
  std::vector<std::vector<std::vector<HeadMass>>> mass_;  // by entry, layer, KV head: the lists' mass after the step
  std::vector<Scratch> threads_;
};

}  // namespace kvmix
