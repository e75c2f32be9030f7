// The contract between the cache and the device that holds its pages. A backend owns memory and does arithmetic; which page
// exists, in which format, and what a step changes is the ledger's to say. One folder per backend.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "backend/page.h"
#include "backend/step_plan.h"
#include "kvmix/cache.h"

namespace kvmix {

// The formats of one layer.
struct LayerFormats {
  FormatId sinks, recent, sealed;
  bool seals;  // false where both sides stay fp16
  // A token policy drops tokens of this layer. Its prompts are sealed when they have ended, and that many of their last queries
  // are scored.
  bool governed = false;
  int window_queries = 0;
  FormatId low = 0;  // tokens of the policy's low tier, if it has one
  bool low_tier = false;
  // PageList::mass is kept: of each decoded query, and of a prompt's unless that is the window's, the mean, or the largest, of
  // the softmax weights of a KV head's query heads.
  bool mass = false, mass_of_prompts = false, mass_of_largest = false;
  int mass_every = 1;  // of decoded tokens those at multiples of this position pay, each that many times
  // Sealed pages of lists that have chosen channels of keys (PageList::channels), by the squares of that many last queries of a
  // prompt, which are wanted of every layer that could.
  FormatId thin = 0;
  bool thins = false;
  int channel_queries = 0;

  // Nothing is sealed inside a prompt: at its end tokens or channels are chosen.
  bool waits() const { return governed || thins; }
  int kept_queries() const { return std::max(window_queries, channel_queries); }
  bool seals_in(const PageList& list) const { return seals || (thins && !list.channels.empty()); }
  FormatId sealed_in(const PageList& list) const { return thins && !list.channels.empty() ? thin : sealed; }
};

// A thread's part of a call that several make together.
struct Worker {
  int ith = 0, nth = 1;
};

struct PoolBytes {
  size_t used, taken;  // by pages; from the system
};

class Backend {
 public:
  virtual ~Backend() = default;

  // Whether all pages of a list but its last one must be full.
  virtual bool wants_full_pages() const { return false; }

  // Pages. allocate throws kOutOfMemory and changes nothing then.
  virtual PageHandle allocate(const PageFormat& format) = 0;
  virtual void release(PageHandle page, const PageFormat& format) = 0;
  // Gives the system back what no page uses.
  virtual void trim() = 0;
  virtual PoolBytes pool() const = 0;
  virtual size_t scratch_bytes() const = 0;

  // Whole pages, from one thread outside append and attend.
  virtual void copy(PageHandle from, PageHandle to, const PageFormat& format) = 0;
  virtual void transcode(const Transcode& job) = 0;
  // Pages of one layer.
  virtual void gather(std::span<const Gather> jobs) = 0;
  // The live rows of a side as stored, float [live][the side's width in the page's format].
  virtual void read(const PageEntry& page, Side side, float* rows) const = 0;
  // The live rows of a page as a file holds them: for tiles filled token by token a record per token, else the bytes.
  virtual size_t saved_bytes(const PageFormat& format, int live) const = 0;
  virtual void save(const PageEntry& page, std::string& to) const = 0;
  virtual void load(const PageEntry& page, const char* from) = 0;

  // Pages in memory of somebody else: those that rows of a layer end in, sealed or, where nothing is sealed, open. `blocks`
  // holds until the next call; only a backend of one layer has them. Handles are by place, multiples of the block's alignment.
  virtual void use_blocks(std::byte* blocks) = 0;
  virtual PageHandle in_blocks(size_t offset) const = 0;

  // A step: begin sees the plan with all its pages in place and readies everything that append and attend write to. The plan
  // stays as it is until the step's last call. append and attend as in Cache.
  virtual void begin(const StepPlan& plan) = 0;
  virtual void append(int layer, const float* k, int64_t k_stride, const float* v, int64_t v_stride, Worker worker) = 0;
  virtual void attend(int layer, const float* q, int64_t q_stride, float* out, int64_t out_stride, Worker worker) = 0;

  // As in Cache; 0 for a backend whose steps cannot be captured.
  virtual uint64_t launch_key() { return 0; }

  // Of a sequence whose prompt the open step ends, once a layer was attended to: the softmax weights of the prompt's last
  // queries, summed in their order, [heads_per_kv][tokens], first those of the head's low tier, then its others
  // (attention/scores.h).
  struct Window {
    std::span<const float> sums;
    int queries;
  };
  virtual Window window(SequenceId id, int layer, int kv_head) const = 0;
  // Of the same: the mean over the last LayerFormats::channel_queries queries of their squares, as they meet stored keys,
  // [heads_per_kv][head_dim].
  virtual std::span<const float> query_squares(SequenceId id, int layer, int kv_head) const = 0;
  // Of a layer's lists, outside of append and attend: the means by channel of the squares of keys, as they are stored, over the
  // tokens that are not among `dropped` (ascending places). [lists][head_dim]. No page of them is of chosen channels.
  struct KeySquares {
    const PageList* list;
    std::span<const int32_t> dropped;
  };
  virtual std::vector<float> key_squares(int layer, std::span<const KeySquares> lists) = 0;
  // What the lists' mass becomes with the open step's queries, once the layer was attended to: of the head's low tier and of
  // its others. Empty where the step adds none. The caller may exchange the vectors for others.
  struct Mass {
    std::vector<float>*low, *tokens;
  };
  virtual Mass mass(SequenceId id, int layer, int kv_head) = 0;
  // Closes a step that was not aborted; queries of a prompt that goes on are kept.
  virtual void end() = 0;
  // Such queries follow their sequence: one that is gone, one that shares it, one that was cut to n tokens.
  virtual void forget(SequenceId id) = 0;
  virtual void fork(SequenceId from, SequenceId to) = 0;
  virtual void cut_queries(SequenceId id, int64_t n) = 0;

  // Kernel by layer, and seconds summed over threads (CacheStats).
  virtual void report(CacheStats& stats) const = 0;
};

// `config` and `formats` outlive the backend and stay as they are. Throws kInvalidArgument for an unknown kernel, kUnsupported
// for one that cannot run.
std::unique_ptr<Backend> make_cpu_backend(const CacheConfig& config, const FormatTable& formats,
                                          std::vector<LayerFormats> layers);

// Of the calling thread's current CUDA device. `beside`: another on the same stream, whose working memory it uses too. Throws
// kUnsupported where there is no device, and for what it has no code for.
std::unique_ptr<Backend> make_cuda_backend(const CacheConfig& config, const FormatTable& formats,
                                           std::vector<LayerFormats> layers, const Backend* beside = nullptr);

}  // namespace kvmix
