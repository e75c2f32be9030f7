// The public cache: a ledger that knows the pages and a backend that holds them.
#include <algorithm>
#include <string>

#include "cache/state.h"
#include "codec/row.h"
#include "kvmix/error.h"
#include "rows/row_map.h"

namespace kvmix {
namespace {

constexpr size_t kSlackBytes = size_t{1} << 20;  // less is not worth a system call

void check_device(const CacheConfig& config) {
  const auto fail = [](Status status, const std::string& what) { throw Error(status, "cache: " + what); };
  if (config.device == "cpu") {
    if (config.stream == nullptr && !config.device_rows) return;
    fail(Status::kInvalidArgument,
         "a stream or rows in device memory belong to the device \"cuda\"; set that or leave them out");
  }
  if (!on_cuda(config)) {
    fail(Status::kInvalidArgument, "device \"" + config.device + "\" is unknown; expected \"cpu\" or \"cuda\"");
  }
  if (config.tokens && counts_or_tiers(*config.tokens)) {
    fail(Status::kUnsupported, "token policy " + to_string(*config.tokens) +
                                   " counts what every query pays to each token, which the device \"cuda\" does not do; take "
                                   "another policy (kvmix list --device cuda), or the device \"cpu\"");
  }
  if (!config.kernel.empty()) {
    fail(Status::kInvalidArgument,
         "attention kernel \"" + config.kernel + "\" is the device \"cpu\"'s; leave the kernel out on \"cuda\"");
  }
}

void check_latents(const CacheConfig& config, const LayerConfig& layer, const std::string& where) {
  const auto unsupported = [&](const std::string& what) {
    throw Error(Status::kUnsupported, where + " stores latents: " + what);
  };
  if (on_cuda(config))
    unsupported("the device \"cuda\" has no code for them; take a plan without \"rank\", or the device \"cpu\"");
  for (const std::optional<PolicySpec>* policy : {&config.tokens, &config.channels}) {
    if (*policy) unsupported("policy " + (*policy)->name + " needs keys and values themselves; leave it or the ranks out");
  }
  if (!config.kernel.empty() && config.kernel != "portable")
    unsupported("attention kernel \"" + config.kernel + "\" cannot rebuild keys; leave the kernel to the library");
  check_ranks(layer, where);
  for (const Side side : {Side::kKey, Side::kValue}) {
    const bool key = side == Side::kKey;
    const std::string rows = key ? "keys" : "values";
    const int rank = key ? layer.key_rank : layer.value_rank;
    const TransformSpec& transform = (key ? layer.key : layer.value).transform;
    if (!transform.identity() || !transform.feedback.empty() || !transform.scales.empty())
      unsupported("row maps of " + rows + " do not go with them; make the plan without");
    if (layer.factors == nullptr)
      unsupported("the factors that make them are missing; give the plan's factors file to the engine");
    const std::vector<LatentFactors::Head>& heads = key ? layer.factors->key : layer.factors->value;
    bool fits = heads.size() == static_cast<size_t>(layer.kv_heads);
    for (const LatentFactors::Head& head : heads) {
      fits = fits && head.first >= 0 && head.count > 0 && head.first + head.count <= rank &&
             head.up.size() == static_cast<size_t>(head.count) * static_cast<size_t>(layer.head_dim);
    }
    if (!fits)
      throw Error(Status::kInvalidArgument,
                  where + ": factors of the " + rows + " do not fit its shape; factorise the model again");
  }
  const auto all = static_cast<size_t>(layer.kv_heads) * static_cast<size_t>(layer.head_dim),
             dim = static_cast<size_t>(layer.head_dim);
  const LatentFactors& f = *layer.factors;
  for (const auto& [name, size, wanted] : {std::tuple{"key_bias", f.key_bias.size(), all},
                                           {"value_bias", f.value_bias.size(), all},
                                           {"key_norm", f.key_norm.size(), dim}}) {
    if (size != 0 && size != wanted)
      throw Error(Status::kInvalidArgument, where + ": factors' " + name + " has " + std::to_string(size) +
                                                " numbers; expected " + std::to_string(wanted));
  }
  if (2 * f.angles.size() > dim)
    throw Error(Status::kInvalidArgument, where + ": factors rotate " + std::to_string(f.angles.size()) + " pairs of " +
                                              std::to_string(dim) + " channels");
}

void check_config(const CacheConfig& config) {
  const auto fail = [](const std::string& what) { throw Error(Status::kInvalidArgument, "cache: " + what); };
  if (config.layers.empty()) fail("no layers; describe at least one");
  if (config.threads < 1 || config.threads > 256) fail("threads is " + std::to_string(config.threads) + "; expected 1 to 256");
  check_device(config);
  for (size_t l = 0; l < config.layers.size(); ++l) {
    const LayerConfig& layer = config.layers[l];
    const std::string where = "cache: layer " + std::to_string(l);
    if (layer.kv_heads < 1 || layer.q_heads < layer.kv_heads || layer.q_heads % layer.kv_heads != 0) {
      throw Error(Status::kInvalidArgument, where + ": " + std::to_string(layer.q_heads) + " query heads over " +
                                                std::to_string(layer.kv_heads) +
                                                " KV heads; the first must be a multiple of the second");
    }
    if (layer.latent()) check_latents(config, layer, where);
    check_codec(layer.key.codec, layer.stored_width(Side::kKey));
    check_codec(layer.value.codec, layer.stored_width(Side::kValue));
    if (!layer.recent.is_f16()) {
      for (const Side side : {Side::kKey, Side::kValue}) check_codec(layer.recent, layer.stored_width(side));
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
      if (!layer.latent() && maps.width() != layer.head_dim) {
        throw Error(Status::kUnsupported, where + ": rows of " + std::to_string(maps.width()) + " stored channels of " +
                                              std::to_string(layer.head_dim) + " are not supported by this cache");
      }
    }
  }
}

CacheConfig checked(CacheConfig config) {
  check_config(config);
  return config;
}

}  // namespace

Cache::Impl::Impl(CacheConfig c)
    : governed(checked(std::move(c))), config(governed.config), ledger(config.layers, ids, formats) {
  for (size_t l = 0; l < config.layers.size(); ++l) {
    const LayerLayout layout = layer_layout(config, l);
    LayerFormats& f = ids.emplace_back(LayerFormats{.sinks = formats.add(layout.sinks),
                                                    .recent = formats.add(layout.recent),
                                                    .sealed = formats.add(layout.sealed),
                                                    .seals = layout.seals});
    if (governed.channels != nullptr && config.layers[l].sliding_window == 0) {
      f.channel_queries = governed.channels->window_queries();
      f.thins = governed.thins(l);
      if (f.thins) f.thin = formats.add(governed.thin[l]);
    }
    if (!governed.governs(l)) continue;
    const Needs needs = governed.policy->needs();
    f.governed = true;
    f.window_queries = needs.window_queries;
    f.low_tier = governed.policy->has_low_tier();
    if (f.low_tier) f.low = formats.add(governed.low[l]);
    f.mass = needs.mass != MassReduce::kNone;
    f.mass_of_prompts = f.mass && !needs.mass_from_window;
    f.mass_of_largest = needs.mass == MassReduce::kMax;
    f.mass_every = needs.mass_every;
  }
  if (on_cuda(config)) ledger.write_late();
  backend = on_cuda(config) ? make_cuda_backend(config, formats, ids) : make_cpu_backend(config, formats, ids);
  if (backend->wants_full_pages()) ledger.fill_pages();
}

void Cache::Impl::release(std::span<const FreedPage> pages) {
  for (const FreedPage& freed : pages) backend->release(freed.page, formats[freed.format]);
}

PageHandle Cache::Impl::allocate(FormatId format) {
  const auto kept = std::find_if(reserve.begin(), reserve.end(), [&](const FreedPage& page) { return page.format == format; });
  if (kept == reserve.end()) return backend->allocate(formats[format]);
  const PageHandle page = kept->page;
  *kept = reserve.back();
  reserve.pop_back();
  return page;
}

// Gives the new pages of the open change memory; without it the change is undone.
void Cache::Impl::allocate_changes() {
  try {
    const std::span<const PageChange> changes = ledger.changes();
    for (size_t i = 0; i < changes.size(); ++i) {
      fetch_ahead(changes, i);
      const PageChange& change = changes[i];
      PageEntry& entry = change.entry();
      const auto id = static_cast<FormatId>(entry.format);
      entry.handle = allocate(id);
      if (change.copies) backend->copy(change.before.handle, entry.handle, formats[id]);
    }
  } catch (...) {
    abort();
    throw;
  }
}

void Cache::Impl::abort() {
  release(ledger.abort());
  release_reserve();
  backend->trim();
}

Cache::Cache(CacheConfig config) : impl_(std::make_unique<Impl>(std::move(config))) {}
Cache::~Cache() = default;
Cache::Cache(Cache&&) noexcept = default;
Cache& Cache::operator=(Cache&&) noexcept = default;

const CacheConfig& Cache::config() const { return impl_->config; }

SequenceId Cache::create() { return impl_->ledger.create(); }

void Cache::remove(SequenceId id) {
  impl_->ledger.find(id);
  if (impl_->ledger.is_open())
    throw Error(Status::kInvalidArgument, "a sequence cannot be removed inside a step; end it first");
  impl_->release(impl_->ledger.remove(id));
  impl_->backend->forget(id);
  impl_->backend->trim();
}

SequenceId Cache::fork(SequenceId id) {
  if (impl_->ledger.is_open()) throw Error(Status::kInvalidArgument, "a sequence cannot be forked inside a step; end it first");
  const SequenceId copy = impl_->ledger.fork(id);
  impl_->backend->fork(id, copy);
  return copy;
}

SequenceId Cache::copy(SequenceId id) {
  Impl& impl = *impl_;
  const SequenceId made = fork(id);
  try {
    impl.ledger.open_unsharing(made);
    impl.allocate_changes();
  } catch (...) {
    remove(made);
    throw;
  }
  impl.release(impl.ledger.commit());
  return made;
}

void Cache::truncate(SequenceId id, int64_t n_tokens) {
  Impl& impl = *impl_;
  const StepPlan& plan = impl.ledger.open_truncation(id, n_tokens);
  impl.allocate_changes();
  for (const std::vector<Transcode>& layer : plan.transcodes) {
    for (const Transcode& job : layer) impl.backend->transcode(job);
  }
  impl.release(impl.ledger.commit());
  impl.backend->cut_queries(id, n_tokens);
  impl.backend->trim();
}

int64_t Cache::length(SequenceId id) const { return impl_->ledger.length(id); }

std::vector<SequenceId> Cache::sequences() const {
  std::vector<SequenceId> ids;
  for (const auto& [id, sequence] : impl_->ledger.sequences()) ids.push_back(id);
  return ids;
}

void Cache::begin_step(std::span<const StepItem> items) {
  Impl& impl = *impl_;
  impl.check_decoded(items);
  const StepPlan& plan = impl.ledger.open(items);
  impl.allocate_changes();
  try {
    impl.fill_reserve(items);
    impl.backend->begin(plan);
  } catch (...) {
    impl.abort();
    throw;
  }
}

size_t Cache::step_bytes(std::span<const StepItem> items) const {
  Impl& impl = *impl_;
  size_t bytes = impl.ledger.bytes_needed(items);
  if (impl.governed.policy == nullptr || impl.config.max_bytes == 0) return bytes;
  for (const StepItem& item : items) {
    const SequencePages& sequence = impl.ledger.find(item.sequence);
    const auto moment = impl.moment(sequence, Ledger::prompt_part(item, sequence), item.n_tokens);
    if (!moment) continue;
    const int64_t end = sequence.length + item.n_tokens;
    for (const FormatId id : impl.pages_to_reserve(sequence, *moment, end)) bytes += impl.formats[id].bytes;
  }
  return bytes;
}

void Cache::append(int layer, const float* k, int64_t k_stride, const float* v, int64_t v_stride, int ith, int nth) {
  impl_->backend->append(layer, k, k_stride, v, v_stride, {ith, nth});
}

void Cache::attend(int layer, const float* q, int64_t q_stride, float* out, int64_t out_stride, int ith, int nth) {
  impl_->backend->attend(layer, q, q_stride, out, out_stride, {ith, nth});
}

uint64_t Cache::launch_key() {
  if (!impl_->ledger.is_open()) throw Error(Status::kInvalidArgument, "no step is open");
  return impl_->backend->launch_key();
}

void Cache::end_step() {
  Impl& impl = *impl_;
  const StepPlan& plan = impl.ledger.plan();
  const bool decoding = plan.decoding();
  std::vector<std::pair<SequenceId, Moment>> decisions;
  for (const StepEntry& entry : plan.entries) {
    if (impl.governed.policy == nullptr && impl.governed.channels == nullptr) break;
    const auto moment = impl.moment(*entry.pages, {entry.prompt, entry.ends_prompt}, entry.n_tokens);
    if (moment) decisions.emplace_back(entry.id, *moment);
    if (impl.governed.counts()) impl.take_mass(entry);
  }
  const std::vector<FreedPage> freed = impl.ledger.commit();
  for (const std::vector<Transcode>& layer : plan.transcodes) impl.sealed_pages += static_cast<int64_t>(layer.size());
  impl.release(freed);
  try {
    for (const auto& [id, moment] : decisions) impl.decide(id, moment);
  } catch (...) {
    impl.release_reserve();
    impl.backend->end();
    throw;
  }
  impl.release_reserve();
  impl.backend->end();
  // A prompt's chunks need more open pages than the window; once decoding starts the system gets them back.
  const PoolBytes pool = impl.backend->pool();
  if (!freed.empty() || !decisions.empty() || (decoding && pool.taken - pool.used > pool.used / 16 + kSlackBytes))
    impl.backend->trim();
}

void Cache::abort_step() {
  if (!impl_->ledger.is_open()) throw Error(Status::kInvalidArgument, "no step is open");
  impl_->abort();
}

}  // namespace kvmix
