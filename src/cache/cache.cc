// Sequences, and the opening and closing of steps.
#include <algorithm>
#include <cstring>
#include <string>

#include "cache/state.h"
#include "codec/row.h"
#include "kvmix/error.h"
#include "rows/row_map.h"

namespace kvmix {
namespace {

constexpr size_t kSlackBytes = size_t{1} << 20;  // less is not worth a system call

void check_config(const CacheConfig& config) {
  const auto fail = [](const std::string& what) { throw Error(Status::kInvalidArgument, "cache: " + what); };
  if (config.layers.empty()) fail("no layers; describe at least one");
  if (config.threads < 1 || config.threads > 256) fail("threads is " + std::to_string(config.threads) + "; expected 1 to 256");
  for (size_t l = 0; l < config.layers.size(); ++l) {
    const LayerConfig& layer = config.layers[l];
    const std::string where = "cache: layer " + std::to_string(l);
    if (layer.kv_heads < 1 || layer.q_heads < layer.kv_heads || layer.q_heads % layer.kv_heads != 0) {
      throw Error(Status::kInvalidArgument, where + ": " + std::to_string(layer.q_heads) + " query heads over " +
                                                std::to_string(layer.kv_heads) +
                                                " KV heads; the first must be a multiple of the second");
    }
    check_codec(layer.key.codec, layer.head_dim);
    check_codec(layer.value.codec, layer.head_dim);
    if (!layer.recent.is_f16()) {
      check_codec(layer.recent, layer.head_dim);
      if (!takes_rows(layer.recent)) {
        throw Error(Status::kInvalidArgument,
                    where + ": recent rows cannot be " + to_string(layer.recent) + "; expected " + recent_codecs());
      }
    }
    if (layer.sinks < 0 || layer.sinks > 4096) throw Error(Status::kInvalidArgument, where + ": sinks must be 0 to 4096");
    if (layer.window.tokens < 0 || layer.window.tokens > (1 << 20)) {
      throw Error(Status::kInvalidArgument, where + ": the window must be 0 to 1048576 tokens");
    }
    for (const float r : {layer.window.ratio_key, layer.window.ratio_value}) {
      if (!(r >= 0.0f && r < 1.0f))
        throw Error(Status::kInvalidArgument, where + ": window ratios must be at least 0 and below 1");
    }
    if (layer.sliding_window < 0) throw Error(Status::kInvalidArgument, where + ": sliding_window must not be negative");
    if (!(layer.scale > 0.0f) || !(layer.softcap >= 0.0f)) {
      throw Error(Status::kInvalidArgument, where + ": scale must be positive and softcap not negative");
    }
    for (const Side side : {Side::kKey, Side::kValue}) {
      const bool key = side == Side::kKey;
      const RowMapChain maps((key ? layer.key : layer.value).transform, row_shape(layer, side),
                             where + (key ? " keys" : " values"));
      if (maps.width() != layer.head_dim) {
        throw Error(Status::kUnsupported, where + ": rows of " + std::to_string(maps.width()) + " stored channels of " +
                                              std::to_string(layer.head_dim) + " are not supported by this cache");
      }
    }
  }
}

bool uses_ratio(const LayerConfig& layer) { return layer.window.ratio_key > 0 || layer.window.ratio_value > 0; }

}  // namespace

Cache::Impl::Impl(CacheConfig c) : config(std::move(c)), pool(config.max_bytes) {
  check_config(config);
  for (const LayerConfig& layer : config.layers) {
    sizes.push_back(layer_sizes(layer));
    key_rows.emplace_back(layer.key.transform, row_shape(layer, Side::kKey), "keys");
    value_rows.emplace_back(layer.value.transform, row_shape(layer, Side::kValue), "values");
    std::vector<float>& columns = key_columns.emplace_back();
    if (layer.key.transform.feedback.empty() || sizes.back().open_key.spec.is_f16()) continue;
    const ptrdiff_t square = static_cast<ptrdiff_t>(layer.head_dim) * layer.head_dim;
    columns.resize(static_cast<size_t>(layer.kv_heads * square));
    for (int h = 0; h < layer.kv_heads; ++h) {
      feedback_columns(key_rows.back().feedback(h), layer.head_dim, columns.data() + h * square);
    }
  }
  steps.resize(config.layers.size());
  threads.resize(static_cast<size_t>(config.threads));
  kernels_used.resize(config.layers.size());
  bool known = config.kernel.empty();
  for (const AttentionKernel* kernel : attention_kernel_registry()) {
    if (!config.kernel.empty() && config.kernel != kernel->name) continue;
    known = true;
    if (kernel->available()) kernels.push_back(kernel);
  }
  if (!known) {
    std::string names;
    for (const AttentionKernel* kernel : attention_kernel_registry())
      names += std::string(names.empty() ? "" : ", ") + kernel->name;
    throw Error(Status::kInvalidArgument, "attention kernel \"" + config.kernel + "\" is unknown; expected one of " + names);
  }
  if (kernels.empty()) {
    throw Error(Status::kUnsupported,
                "attention kernel \"" + config.kernel + "\" cannot run on this processor; see kvmix list");
  }
  for (size_t l = 0; l < config.layers.size(); ++l) {
    const LayerConfig& layer = config.layers[l];
    AttendJob job{};
    job.key = sizes[l].key;
    job.value = sizes[l].value;
    job.softcap = layer.softcap;
    job.sliding_window = layer.sliding_window;
    job.exact = config.exact;
    job.rows = sizes[l].group;
    kernels_used[l] = pick_kernel(job).name;
  }
}

const AttentionKernel& Cache::Impl::pick_kernel(const AttendJob& job) const {
  for (const AttentionKernel* kernel : kernels) {
    if (kernel->supports(job)) return *kernel;
  }
  throw Error(Status::kUnsupported, "attention kernel \"" + config.kernel + "\" does not take keys " + to_string(job.key.spec) +
                                        ", values " + to_string(job.value.spec) + " at head_dim " +
                                        std::to_string(job.key.width) + "; leave the kernel to the library");
}

const float* Cache::Impl::recent_columns(size_t layer, int kv_head) const {
  const std::vector<float>& columns = key_columns[layer];
  const ptrdiff_t dim = config.layers[layer].head_dim;
  return columns.empty() ? nullptr : columns.data() + kv_head * dim * dim;
}

SequenceState& Cache::Impl::find(SequenceId id) {
  const auto it = sequences.find(id);
  if (it == sequences.end()) throw Error(Status::kNotFound, "the cache has no sequence " + std::to_string(id));
  return it->second;
}

void Cache::Impl::release_sequence(SequenceState& sequence) {
  for (size_t l = 0; l < sequence.layers.size(); ++l) {
    LayerState& state = sequence.layers[l];
    for (HeadState& head : state.heads) {
      if (head.sinks != nullptr) pool.release(head.sinks, sizes[l].sink_bytes);
      for (size_t p = 0; p < head.pages.size(); ++p) {
        if (head.pages[p] == nullptr) continue;
        pool.release(head.pages[p], static_cast<int64_t>(p) < state.sealed ? sizes[l].packed_bytes : sizes[l].open_bytes);
      }
    }
  }
}

int64_t Cache::Impl::seal_target(const LayerConfig& layer, const LayerState& state, int64_t length) const {
  if (!uses_ratio(layer)) return std::max(state.sealed, fixed_seal_target(layer, length));
  return state.sealed + ratio_surplus_pages(layer, length - layer.sinks - state.sealed * kPageTokens);
}

Cache::Cache(CacheConfig config) : impl_(std::make_unique<Impl>(std::move(config))) {}
Cache::~Cache() = default;
Cache::Cache(Cache&&) noexcept = default;
Cache& Cache::operator=(Cache&&) noexcept = default;

const CacheConfig& Cache::config() const { return impl_->config; }

SequenceId Cache::create() {
  SequenceState sequence;
  sequence.layers.resize(impl_->config.layers.size());
  for (size_t l = 0; l < sequence.layers.size(); ++l) {
    sequence.layers[l].heads.resize(static_cast<size_t>(impl_->config.layers[l].kv_heads));
  }
  const SequenceId id = impl_->next_id++;
  impl_->sequences.emplace(id, std::move(sequence));
  return id;
}

void Cache::remove(SequenceId id) {
  SequenceState& sequence = impl_->find(id);
  if (impl_->in_step) throw Error(Status::kInvalidArgument, "a sequence cannot be removed inside a step; end it first");
  impl_->release_sequence(sequence);
  impl_->sequences.erase(id);
  impl_->pool.trim();
}

SequenceId Cache::fork(SequenceId id) {
  if (impl_->in_step) throw Error(Status::kInvalidArgument, "a sequence cannot be forked inside a step; end it first");
  SequenceState copy = impl_->find(id);
  for (LayerState& state : copy.layers) {
    for (HeadState& head : state.heads) {
      if (head.sinks != nullptr) impl_->pool.add_reference(head.sinks);
      for (std::byte* page : head.pages) {
        if (page != nullptr) impl_->pool.add_reference(page);
      }
    }
  }
  const SequenceId fresh = impl_->next_id++;
  impl_->sequences.emplace(fresh, std::move(copy));
  return fresh;
}

void Cache::truncate(SequenceId id, int64_t n_tokens) {
  Impl& impl = *impl_;
  SequenceState& sequence = impl.find(id);
  if (impl.in_step) throw Error(Status::kInvalidArgument, "a sequence cannot be truncated inside a step; end it first");
  if (n_tokens < 0 || n_tokens > sequence.length) {
    throw Error(Status::kInvalidArgument, "cannot truncate sequence " + std::to_string(id) + " of " +
                                              std::to_string(sequence.length) + " tokens to " + std::to_string(n_tokens));
  }
  for (size_t l = 0; l < sequence.layers.size(); ++l) {
    const LayerConfig& layer = impl.config.layers[l];
    const int64_t first_needed = n_tokens + 1 - layer.sliding_window;
    if (sequence.layers[l].freed > 0 && first_needed < layer.sinks + sequence.layers[l].freed * kPageTokens && n_tokens > 0) {
      throw Error(Status::kUnsupported, "sequence " + std::to_string(id) + " cannot go back to " + std::to_string(n_tokens) +
                                            " tokens: layer " + std::to_string(l) +
                                            " has freed what its sliding window left behind");
    }
  }
  const auto cuts_sealed_page = [&](size_t l) {
    const int64_t keep = page_count(impl.config.layers[l], n_tokens);
    return keep > 0 && keep - 1 < sequence.layers[l].sealed &&
           live_slots(impl.config.layers[l], keep - 1, n_tokens) < kPageTokens;
  };
  // The open pages for cut ones come first: when there is no memory for them, nothing has changed.
  std::vector<std::pair<std::byte*, size_t>> fresh;
  try {
    for (size_t l = 0; l < sequence.layers.size(); ++l) {
      if (!cuts_sealed_page(l)) continue;
      for (size_t h = 0; h < sequence.layers[l].heads.size(); ++h) {
        fresh.emplace_back(nullptr, impl.sizes[l].open_bytes);
        fresh.back().first = impl.pool.allocate(impl.sizes[l].open_bytes);
      }
    }
  } catch (...) {
    for (const auto& [record, bytes] : fresh) {
      if (record != nullptr) impl.pool.release(record, bytes);
    }
    impl.pool.trim();
    throw;
  }
  size_t next_fresh = 0;
  std::vector<float> rows;
  for (size_t l = 0; l < sequence.layers.size(); ++l) {
    const LayerConfig& layer = impl.config.layers[l];
    const LayerSizes& sizes = impl.sizes[l];
    LayerState& state = sequence.layers[l];
    const int64_t keep = page_count(layer, n_tokens);
    const bool cuts_sealed = cuts_sealed_page(l);
    for (size_t h = 0; h < state.heads.size(); ++h) {
      HeadState& head = state.heads[h];
      if (n_tokens == 0 && head.sinks != nullptr) {
        impl.pool.release(head.sinks, sizes.sink_bytes);
        head.sinks = nullptr;
      }
      for (auto p = static_cast<int64_t>(head.pages.size()) - 1; p >= keep; --p) {
        std::byte* page = head.pages[static_cast<size_t>(p)];
        if (page != nullptr) impl.pool.release(page, p < state.sealed ? sizes.packed_bytes : sizes.open_bytes);
      }
      head.pages.resize(static_cast<size_t>(keep));
      if (!cuts_sealed) continue;
      // The cut page is appended to again, so it becomes open rows once more.
      std::byte*& slot = head.pages.back();
      std::byte* open = fresh[next_fresh++].first;
      rows.resize(static_cast<size_t>(kPageTokens) * static_cast<size_t>(layer.head_dim));
      const auto expand = [&](const TileFormat& from, const std::byte* tile, const TileFormat& to, const float* columns,
                              std::byte* out) {
        decode_tile(from.spec, from.side, layer.head_dim, tile, rows.data());
        for (int t = 0; t < kPageTokens; t += kRowsTogether) {
          store_open_rows(to, t, kRowsTogether, rows.data() + static_cast<ptrdiff_t>(t) * layer.head_dim, columns, out);
        }
      };
      expand(sizes.key, slot, sizes.open_key, impl.recent_columns(l, static_cast<int>(h)), open);
      expand(sizes.value, slot + sizes.key.bytes, sizes.open_value, nullptr, open + sizes.open_key.bytes);
      impl.pool.release(slot, sizes.packed_bytes);
      slot = open;
    }
    state.sealed = std::min(state.sealed, cuts_sealed ? keep - 1 : keep);
    state.freed = std::min(state.freed, keep);
  }
  sequence.length = n_tokens;
  impl.pool.trim();
}

int64_t Cache::length(SequenceId id) const { return impl_->find(id).length; }

std::vector<SequenceId> Cache::sequences() const {
  std::vector<SequenceId> ids;
  for (const auto& [id, sequence] : impl_->sequences) ids.push_back(id);
  return ids;
}

void Cache::begin_step(std::span<const StepItem> items) {
  Impl& impl = *impl_;
  if (impl.in_step) throw Error(Status::kInvalidArgument, "a step is already open; end or abort it first");
  if (items.empty()) throw Error(Status::kInvalidArgument, "a step needs at least one sequence");
  impl.entries.clear();
  impl.changes.clear();
  impl.old_sealed.clear();
  int64_t row = 0;
  for (const StepItem& item : items) {
    SequenceState& sequence = impl.find(item.sequence);
    if (item.n_tokens < 1) {
      throw Error(Status::kInvalidArgument, "a step of " + std::to_string(item.n_tokens) + " tokens; expected at least 1");
    }
    for (const StepEntry& entry : impl.entries) {
      if (entry.id == item.sequence) {
        throw Error(Status::kInvalidArgument, "sequence " + std::to_string(item.sequence) + " appears twice in a step");
      }
    }
    impl.entries.push_back({item.sequence, &sequence, sequence.length, item.n_tokens, row});
    row += item.n_tokens;
  }
  impl.in_step = true;
  for (LayerStep& step : impl.steps) step.seals.clear();
  try {
    for (size_t l = 0; l < impl.config.layers.size(); ++l) impl.plan_layer(l);
  } catch (...) {
    abort_step();
    throw;
  }
  impl.next_unit.reset(impl.config.layers.size(), 0);
  int merges = 0;
  for (const LayerStep& step : impl.steps) merges = std::max(merges, step.merges);
  impl.remaining.reset(static_cast<size_t>(merges), 0);
}

void Cache::end_step() {
  Impl& impl = *impl_;
  if (!impl.in_step) throw Error(Status::kInvalidArgument, "no step is open");
  bool trim = false;
  for (const SlotChange& change : impl.changes) {
    // Replaced: open pages that were sealed, and shared ones that were copied.
    if (change.old == nullptr) continue;
    impl.pool.release(change.old, change.old_bytes);
    trim = true;
  }
  for (const LayerStep& step : impl.steps) impl.sealed_pages += static_cast<int64_t>(step.seals.size());
  for (const StepEntry& entry : impl.entries) {
    entry.sequence->length += entry.n_tokens;
    for (size_t l = 0; l < impl.config.layers.size(); ++l) {
      const LayerConfig& layer = impl.config.layers[l];
      if (layer.sliding_window == 0) continue;
      LayerState& state = entry.sequence->layers[l];
      // A query at position `length` sees keys after length - sliding_window.
      const int64_t first_visible = entry.sequence->length - 1 - layer.sliding_window + 1;
      const int64_t gone = first_visible <= layer.sinks ? 0 : (first_visible - layer.sinks) / kPageTokens;
      for (; state.freed < gone; ++state.freed) {
        for (HeadState& head : state.heads) {
          std::byte*& slot = head.pages[static_cast<size_t>(state.freed)];
          impl.pool.release(slot, state.freed < state.sealed ? impl.sizes[l].packed_bytes : impl.sizes[l].open_bytes);
          slot = nullptr;
        }
        trim = true;
      }
      state.sealed = std::max(state.sealed, state.freed);
    }
  }
  impl.in_step = false;
  // A prompt's chunks need more open pages than the window; once decoding starts the system gets them back.
  const bool decoding = std::all_of(impl.entries.begin(), impl.entries.end(),
                                    [](const StepEntry& entry) { return entry.n_tokens < kPageTokens; });
  const size_t slack = impl.pool.taken_bytes() - impl.pool.used_bytes();
  if (trim || (decoding && slack > impl.pool.used_bytes() / 16 + kSlackBytes)) impl.pool.trim();
}

void Cache::abort_step() {
  Impl& impl = *impl_;
  if (!impl.in_step) throw Error(Status::kInvalidArgument, "no step is open");
  // Newest first, so that a slot changed twice ends as it was.
  for (auto it = impl.changes.rbegin(); it != impl.changes.rend(); ++it) {
    it->slot() = it->old;
    impl.pool.release(it->fresh, it->fresh_bytes);
  }
  for (auto it = impl.old_sealed.rbegin(); it != impl.old_sealed.rend(); ++it) *it->first = it->second;
  for (const StepEntry& entry : impl.entries) {
    for (size_t l = 0; l < impl.config.layers.size(); ++l) {
      for (HeadState& head : entry.sequence->layers[l].heads) {
        head.pages.resize(static_cast<size_t>(page_count(impl.config.layers[l], entry.start)));
      }
    }
  }
  impl.in_step = false;
  impl.pool.trim();
}

}  // namespace kvmix
