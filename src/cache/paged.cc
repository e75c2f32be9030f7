// Blocks of an engine's own scheduler as page lists for the backend: what a ledger does for a cache, their tables do here.
#include "kvmix/paged.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <unordered_map>
#include <utility>

#include "backend/backend.h"
#include "backend/cuda/layer_format.h"
#include "base/first_failure.h"
#include "base/team.h"
#include "cache/layout.h"
#include "kvmix/error.h"

namespace kvmix {
namespace {

constexpr size_t kNonceBytes = 64;  // of a block in the CPU's memory, behind its pages; keeps what follows aligned

[[noreturn]] void fail(Status status, const std::string& what) { throw Error(status, "paged attention: " + what); }

std::vector<float> heads_of(const std::vector<float>& all, int kv_heads, int first, int n) {
  const auto each = static_cast<ptrdiff_t>(all.size()) / kv_heads;
  return {all.begin() + each * first, all.begin() + each * (first + n)};
}

void refuse_latents(const LayerConfig& layer, size_t l) {
  if (!layer.latent()) return;
  fail(Status::kUnsupported,
       "layer " + std::to_string(l) + " stores latents, and blocks hold keys and values; take a plan without \"rank\"");
}

CacheConfig checked(const CacheConfig& config) {
  for (size_t l = 0; l < config.layers.size(); ++l) refuse_latents(config.layers[l], l);
  const Cache checks(config);  // what a cache refuses is refused here with the same words
  if (config.tokens || config.channels) {
    fail(Status::kUnsupported, "the plan has policy " + (config.tokens ? config.tokens : config.channels)->name +
                                   ", and blocks keep all tokens and channels; take a plan without policies");
  }
  if (config.device_rows && config.stream == nullptr)  // layers share working memory, in the order of one stream
    fail(Status::kInvalidArgument, "rows in device memory without the stream that they come by; set CacheConfig::stream");
  for (size_t l = 0; l < config.layers.size(); ++l) {
    const LayerConfig& layer = config.layers[l];
    const std::string where = "layer " + std::to_string(l) + " ";
    if (uses_ratio(layer)) {
      fail(Status::kUnsupported, where + "has a window that is a ratio of the length; take a plan with a fixed one");
    }
    if (layer.sinks > kPageTokens) {
      fail(Status::kUnsupported,
           where + "has " + std::to_string(layer.sinks) + " sinks; a block has room for " + std::to_string(kPageTokens));
    }
  }
  return config;
}

struct Beside {
  uint64_t nonce;
  std::vector<PageHandle> pages;  // by KV head
  uint64_t used;                  // the layer's last step that read or wrote it
};
using BesideMap = std::unordered_map<int32_t, Beside>;

struct Layer {
  Layer(const CacheConfig& all, size_t index, int most_sequences, const Backend* other) : config(all), device(on_cuda(all)) {
    config.layers = {all.layers[index]};
    LayerConfig& layer = config.layers[0];
    layout = layer_layout(layer, device);
    if (device && layer.sinks > 0) {  // whose kernels count pages from the end of the sinks
      layer.sinks = layout.seals ? kPageTokens : 0;
      layout = layer_layout(layer, true);
    }
    ids = {.sinks = formats.add(layout.sinks),
           .recent = formats.add(layout.recent),
           .sealed = formats.add(layout.sealed),
           .seals = layout.seals};
    backend = device ? make_cuda_backend(config, formats, {ids}, other) : make_cpu_backend(config, formats, {ids});
    const auto heads = static_cast<size_t>(layer.kv_heads);
    page_bytes = (layout.seals ? layout.sealed : layout.recent).bytes;
    block_bytes = heads * page_bytes + (device ? 0 : kNonceBytes);
    if (!layout.seals) return;
    sinks = layer.sinks;
    window = layer.window.tokens;
    open_bytes = heads * layout.recent.bytes;
    sink_bytes = sinks > 0 ? heads * layout.sinks.bytes : 0;
    reserve = static_cast<size_t>(most_sequences) * static_cast<size_t>(1 + (window + kPageTokens - 1) / kPageTokens);
  }

  // The first block that a query at this position sees unpacked.
  int64_t open_from(int64_t position) const { return position <= window ? 0 : (position - window) / kPageTokens; }
  // Whether the sliding window of a query at this position has left the tokens before `end`.
  bool left_behind(int64_t end, int64_t position) const {
    const int span = config.layers[0].sliding_window;
    return span > 0 && end <= position - span + 1;
  }
  // Where a step's rows [start, end) are cut: what one piece sees unpacked is the same for all of it, and pieces of prompts
  // that begin at different blocks are the same.
  int64_t piece_end(int64_t start, int64_t end) const {
    const auto behind = [start](int64_t offset) {
      return start + kPageTokens - (start - offset % kPageTokens + kPageTokens) % kPageTokens;
    };
    return std::min(end, layout.seals ? std::min(behind(0), behind(window)) : behind(0));
  }

  // Whose a block is: written into it, or, where that would have to wait for a device, beside it.
  uint64_t nonce_of(int32_t id, const std::byte* block) const {
    uint64_t nonce = 0;
    if (device) {
      const auto at = owners.find(id);
      return at == owners.end() ? nonce : at->second;
    }
    std::memcpy(&nonce, block + block_bytes - kNonceBytes, sizeof nonce);
    return nonce;
  }
  void own(int32_t id, std::byte* block, uint64_t nonce) {
    if (device) {
      owners[id] = nonce;
    } else {
      std::memcpy(block + block_bytes - kNonceBytes, &nonce, sizeof nonce);
    }
  }

  CacheConfig config;
  bool device;  // blocks and what lies beside them are in the memory of a GPU
  FormatTable formats;
  LayerFormats ids{};
  LayerLayout layout{};
  std::unique_ptr<Backend> backend;
  int64_t sinks = 0, window = 0;
  size_t page_bytes, block_bytes, open_bytes = 0, sink_bytes = 0, reserve = 0;
  BesideMap open, first;  // by block: rows not packed, sinks
  std::unordered_map<int32_t, uint64_t> owners;
  uint64_t clock = 0, last_spare = 0;
};

struct TeamJob {
  Backend& backend;
  const float *k, *v, *q;
  float* out;
  int64_t k_stride, v_stride, q_stride, out_stride;
  bool stores, attends;
  FirstFailure failure = {};

  void work() {
    const Worker worker{Team::member(), Team::members()};
    if (stores) failure.guard([&] { backend.append(0, k, k_stride, v, v_stride, worker); });
    if (stores && attends) Team::barrier();
    if (attends && !failure.failed()) failure.guard([&] { backend.attend(0, q, q_stride, out, out_stride, worker); });
  }
};

PageEntry entry_of(PageHandle handle, FormatId format, int64_t first, int64_t live) {
  PageEntry page;
  page.handle = handle;
  page.format = format;
  page.first = static_cast<int32_t>(first);
  page.live = static_cast<int32_t>(live);
  return page;
}

}  // namespace

CacheConfig part_of_heads(const CacheConfig& config, int part, int parts) {
  if (parts < 1 || part < 0 || part >= parts) {
    fail(Status::kInvalidArgument, "part " + std::to_string(part) + " of " + std::to_string(parts) + " is none");
  }
  CacheConfig result = config;
  for (size_t l = 0; parts > 1 && l < result.layers.size(); ++l) {
    LayerConfig& layer = result.layers[l];
    const std::string where = "layer " + std::to_string(l) + " ";
    const int heads = layer.kv_heads;
    refuse_latents(layer, l);
    if (layer.q_heads % parts != 0 || (heads % parts != 0 && parts % heads != 0)) {
      fail(Status::kUnsupported, where + "has " + std::to_string(layer.q_heads) + " query and " + std::to_string(heads) +
                                     " KV heads, which do not divide into " + std::to_string(parts) + " parts");
    }
    const int n = std::max(1, heads / parts), first = heads >= parts ? part * n : part / (parts / heads);
    for (SideConfig* side : {&layer.key, &layer.value}) {
      TransformSpec& t = side->transform;
      if (!t.more.empty()) {
        fail(Status::kUnsupported, where + "has the transform " + t.more.front().name +
                                       ", which is not cut by heads; take a plan without it, or one part");
      }
      for (std::vector<float>* numbers : {&t.scales, &t.center, &t.matrix, &t.matrix_inverse, &t.feedback}) {
        if (!numbers->empty()) *numbers = heads_of(*numbers, heads, first, n);
      }
    }
    layer.q_heads /= parts;
    layer.kv_heads = n;
  }
  return result;
}

struct PagedAttention::Impl {
  Impl(const CacheConfig& given, int most) : config(checked(given)), max_bytes(given.max_bytes) {
    if (most < 1) fail(Status::kInvalidArgument, "most_sequences is " + std::to_string(most) + "; expected at least 1");
    config.max_bytes = 0;
    for (size_t l = 0; l < config.layers.size(); ++l)
      layers.push_back(std::make_unique<Layer>(config, l, most, l == 0 ? nullptr : layers[0]->backend.get()));
    for (const auto& layer : layers) {
      beside_bytes += layer->open_bytes * layer->reserve + layer->sink_bytes * static_cast<size_t>(most);
    }
    // Threads are hired on the cores that the caller may use now.
    if (on_cuda(config)) config.threads = 1;
    team.run(
        config.threads, [](void*) {}, nullptr);
  }

  // A page for each KV head.
  std::vector<PageHandle> take(Layer& layer, const PageFormat& format) {
    const size_t heads = static_cast<size_t>(layer.config.layers[0].kv_heads), bytes = heads * format.bytes;
    if (max_bytes > 0 && beside_used + bytes > max_bytes)
      fail(Status::kOutOfMemory, "rows beside the blocks take more than " + std::to_string(max_bytes) + " bytes");
    std::vector<PageHandle> pages;
    try {
      while (pages.size() < heads) pages.push_back(layer.backend->allocate(format));
    } catch (...) {
      for (const PageHandle page : pages) layer.backend->release(page, format);
      throw;
    }
    beside_used += bytes;
    return pages;
  }
  void drop(Layer& layer, BesideMap& map, BesideMap::iterator at) {
    const PageFormat& format = &map == &layer.open ? layer.layout.recent : layer.layout.sinks;
    for (const PageHandle page : at->second.pages) layer.backend->release(page, format);
    beside_used -= at->second.pages.size() * format.bytes;
    map.erase(at);
  }
  void drop(Layer& layer, BesideMap& map, int32_t block) {
    if (const auto at = map.find(block); at != map.end()) drop(layer, map, at);
  }
  // Rows of a block that belongs to whoever wrote its nonce.
  const Beside& find(Layer& layer, BesideMap& map, int32_t id, const std::byte* block, const char* what) const {
    const auto at = map.find(id);
    if (at == map.end() || at->second.nonce != layer.nonce_of(id, block)) {
      fail(Status::kInternal, std::string(what) + " of block " + std::to_string(id) +
                                  " of a layer were given up while a sequence " +
                                  "reads them; hold more sequences (most_sequences)");
    }
    at->second.used = layer.clock;
    return at->second;
  }
  // Makes a block the writer's own.
  void begin_block(Layer& layer, int32_t id, std::byte* block, bool is_first) {
    drop(layer, layer.first, id);
    drop(layer, layer.open, id);
    if (layer.open.size() >= layer.reserve) {
      // Whose sequence was left out of a step that had room for it has none any more.
      const auto oldest = std::min_element(layer.open.begin(), layer.open.end(),
                                           [](const auto& a, const auto& b) { return a.second.used < b.second.used; });
      if (oldest != layer.open.end() && oldest->second.used < layer.last_spare) drop(layer, layer.open, oldest);
    }
    const uint64_t nonce = ++nonces;
    layer.own(id, block, nonce);
    layer.open[id] = {nonce, take(layer, layer.layout.recent), layer.clock};
    if (is_first && layer.sinks > 0) layer.first[id] = {nonce, take(layer, layer.layout.sinks), layer.clock};
  }

  CacheConfig config;
  Team team{false};
  size_t max_bytes, beside_used = 0;
  std::vector<std::unique_ptr<Layer>> layers;
  size_t beside_bytes = 0;
  uint64_t nonces = 0;
  uint64_t revisions = 0;  // of pieces' pages: no two steps have one of them
  // The step in progress.
  std::deque<SequencePages> pieces;
  StepPlan plan, sealing;
  std::vector<PageList> sealed;  // by KV head
};

PagedAttention::PagedAttention(const CacheConfig& config, int most_sequences)
    : impl_(std::make_unique<Impl>(config, most_sequences)) {}
PagedAttention::~PagedAttention() = default;

const CacheConfig& PagedAttention::config() const { return impl_->config; }

size_t PagedAttention::block_bytes(int layer) const { return impl_->layers.at(static_cast<size_t>(layer))->block_bytes; }

size_t PagedAttention::beside_bytes() const { return impl_->beside_bytes; }

size_t PagedAttention::sink_bytes() const {
  size_t bytes = 0;
  for (const auto& layer : impl_->layers) bytes += layer->sink_bytes;
  return bytes;
}

PagedMemory PagedAttention::memory() const {
  PagedMemory m;
  for (const auto& layer : impl_->layers) {
    m.open_bytes += layer->open.size() * layer->open_bytes;
    m.sink_bytes += layer->first.size() * layer->sink_bytes;
  }
  for (const auto& layer : impl_->layers) m.taken_bytes += layer->backend->pool().taken;
  return m;
}

std::string PagedAttention::kernel() const {
  CacheStats stats;
  for (const auto& layer : impl_->layers) layer->backend->report(stats);
  return stats.kernel;
}

void PagedAttention::step(int layer_index, const PagedStep& step, std::byte* blocks, int64_t block_stride, const float* k,
                          int64_t k_stride, const float* v, int64_t v_stride, const float* q, int64_t q_stride, float* out,
                          int64_t out_stride) {
  Impl& impl = *impl_;
  if (layer_index < 0 || layer_index >= static_cast<int>(impl.layers.size())) {
    fail(Status::kInvalidArgument, "layer " + std::to_string(layer_index) + " of " + std::to_string(impl.layers.size()));
  }
  Layer& layer = *impl.layers[static_cast<size_t>(layer_index)];
  const int heads = layer.config.layers[0].kv_heads;
  const size_t unit = layer.device ? cuda::kPageUnit : 64;
  if (reinterpret_cast<uintptr_t>(blocks) % unit != 0 || static_cast<size_t>(block_stride) % unit != 0 ||
      block_stride < static_cast<int64_t>(layer.block_bytes)) {
    fail(Status::kInvalidArgument, "blocks of layer " + std::to_string(layer_index) + " are " + std::to_string(block_stride) +
                                       " bytes apart; expected at least " + std::to_string(layer.block_bytes) +
                                       " and, as their address, a multiple of " + std::to_string(unit));
  }
  layer.backend->use_blocks(blocks);
  const auto memory = [&](int32_t id) { return blocks + id * block_stride; };
  const auto page_of = [&](int32_t id, int h) {
    return layer.backend->in_blocks(static_cast<size_t>(id * block_stride) + static_cast<size_t>(h) * layer.page_bytes);
  };
  struct Rows {
    const int32_t* table;
    int64_t start, end, row;
  };
  std::vector<Rows> sequences;
  for (int s = 0; s < step.sequences; ++s) {
    const int64_t n = step.row_begin[s + 1] - step.row_begin[s], end = step.lengths[s];
    if (n == 0) continue;
    if (n < 0 || end < n || (end + kPageTokens - 1) / kPageTokens > step.blocks_stride) {
      fail(Status::kInvalidArgument, "sequence " + std::to_string(s) + " of " + std::to_string(end) + " tokens has " +
                                         std::to_string(n) + " new ones and " + std::to_string(step.blocks_stride) + " blocks");
    }
    sequences.push_back({step.blocks + s * step.blocks_stride, end - n, end, step.row_begin[s]});
  }
  if (sequences.empty()) return;

  // Who owns which rows: what goes on first, so that nothing of it is taken for what begins.
  ++layer.clock;
  if (layer.layout.seals) {
    const auto each = [&](const auto& visit) {
      for (const Rows& rows : sequences) {
        for (int64_t b = layer.open_from(rows.start); b * kPageTokens < rows.end; ++b) {
          if (!layer.left_behind((b + 1) * kPageTokens, rows.start)) visit(rows, b, rows.table[b]);
        }
      }
    };
    each([&](const Rows& rows, int64_t b, int32_t id) {
      if (b * kPageTokens < rows.start) impl.find(layer, layer.open, id, memory(id), "rows");
    });
    if (step.spare) layer.last_spare = layer.clock;
    each([&](const Rows& rows, int64_t b, int32_t id) {
      if (b * kPageTokens >= rows.start) impl.begin_block(layer, id, memory(id), b == 0);
    });
  }

  StepPlan &plan = impl.plan, &sealing = impl.sealing;
  plan.entries.clear();
  plan.transcodes.assign(1, {});
  plan.seals_after_append = layer.device;
  sealing.entries.clear();
  sealing.transcodes.assign(1, {});
  impl.pieces.clear();
  impl.sealed.assign(static_cast<size_t>(heads), {});
  const auto first_slot = [&](int64_t b) { return b == 0 ? layer.sinks : b * kPageTokens; };
  for (const Rows& rows : sequences) {
    for (int64_t a = rows.start, e = 0; a < rows.end; a = e) {
      e = layer.piece_end(a, rows.end);
      SequencePages& pages = impl.pieces.emplace_back();
      pages.length = e;
      pages.revision = ++impl.revisions;
      pages.layers.resize(1);
      pages.layers[0].heads.resize(static_cast<size_t>(heads));
      const auto add = [&](int h, PageHandle at, FormatId format, int64_t first, int64_t live) {
        if (live > 0) pages.layers[0].heads[static_cast<size_t>(h)].pages.push_back(entry_of(at, format, first, live));
      };
      if (layer.sinks > 0 && !layer.left_behind(layer.sinks, a)) {
        const int32_t id = rows.table[0];
        const std::vector<PageHandle>& sinks = impl.find(layer, layer.first, id, memory(id), "sinks").pages;
        for (int h = 0; h < heads; ++h) add(h, sinks[static_cast<size_t>(h)], layer.ids.sinks, 0, std::min(layer.sinks, e));
      }
      const int64_t open = layer.open_from(a);
      for (int64_t b = 0; b * kPageTokens < e; ++b) {
        if (layer.left_behind((b + 1) * kPageTokens, a)) continue;
        const int32_t id = rows.table[b];
        const int64_t first = first_slot(b), live = std::min(e, (b + 1) * kPageTokens) - first;
        const bool beside = layer.layout.seals && b >= open;
        const auto* own = beside ? &impl.find(layer, layer.open, id, memory(id), "rows").pages : nullptr;
        for (int h = 0; h < heads; ++h) {
          if (beside) {
            add(h, (*own)[static_cast<size_t>(h)], layer.ids.recent, first, live);
          } else {
            add(h, page_of(id, h), layer.layout.seals ? layer.ids.sealed : layer.ids.recent, first, live);
          }
        }
      }
      plan.entries.push_back({.id = static_cast<SequenceId>(plan.entries.size()),
                              .pages = &pages,
                              .start = a,
                              .n_tokens = static_cast<int>(e - a),
                              .row = rows.row + a - rows.start,
                              .prompt = false,
                              .ends_prompt = false,
                              .prompt_start = 0,
                              .revision = pages.revision});
    }
    // Blocks that are now full are packed at once: they may be shared from here on.
    for (int64_t b = rows.start / kPageTokens; layer.layout.seals && (b + 1) * kPageTokens <= rows.end; ++b) {
      const int32_t id = rows.table[b];
      const int64_t first = first_slot(b), live = (b + 1) * kPageTokens - first;
      if (live == 0 || layer.left_behind((b + 1) * kPageTokens, rows.start)) continue;
      const std::vector<PageHandle>& own = impl.find(layer, layer.open, id, memory(id), "rows").pages;
      for (int h = 0; h < heads; ++h) {
        PageList& list = impl.sealed[static_cast<size_t>(h)];
        list.pages.push_back(entry_of(page_of(id, h), layer.ids.sealed, first, live));
        sealing.transcodes[0].push_back(
            {0, h, entry_of(own[static_cast<size_t>(h)], layer.ids.recent, first, live), &list, list.pages.size() - 1});
      }
    }
  }

  const auto run = [&](const StepPlan& what, bool stores, bool attends) {
    layer.backend->begin(what);
    TeamJob job{*layer.backend, k, v, q, out, k_stride, v_stride, q_stride, out_stride, stores, attends};
    impl.team.run(
        impl.config.threads, [](void* data) { static_cast<TeamJob*>(data)->work(); }, &job);
    job.failure.rethrow();
  };
  if (layer.device || sealing.transcodes[0].empty()) {
    plan.transcodes.swap(sealing.transcodes);
    run(plan, true, true);
  } else {
    run(plan, true, false);
    run(sealing, true, false);
    run(plan, false, true);
  }
  layer.backend->end();

  for (const Rows& rows : sequences) {
    for (int64_t b = layer.open_from(rows.start); layer.layout.seals && b < layer.open_from(rows.end); ++b) {
      const auto at = layer.open.find(rows.table[b]);
      if (at != layer.open.end() && at->second.nonce == layer.nonce_of(rows.table[b], memory(rows.table[b])))
        impl.drop(layer, layer.open, at);
    }
  }
}

}  // namespace kvmix
