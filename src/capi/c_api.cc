// The C ABI over Cache: argument checks that C callers need, and exceptions turned into statuses.
#include <cmath>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "capi/guard.h"
#include "kvmix/cache.h"
#include "kvmix/error.h"
#include "kvmix/kvmix.h"
#include "kvmix/plan.h"

struct kvmix_cache {
  kvmix::Cache cache;
  bool in_step = false;
};

struct kvmix_plan {
  kvmix::Plan plan;
};

namespace kvmix {
namespace {

thread_local std::string last_error;
thread_local std::string kernel_name;

template <typename Body>
kvmix_status guarded(const Body& body) noexcept {
  return run_guarded(last_error, body);
}

constexpr kvmix_layer_config layer_defaults() {
  kvmix_layer_config layer = {};
  layer.struct_bytes = sizeof layer;
  layer.sinks = 16;
  layer.window = 128;
  layer.recent_codec = "f16";
  layer.key_codec = "int3.channel.g128.fitted.zero";
  layer.value_codec = "int3.token.g64.minmax.zero";
  return layer;
}
// What of a struct has no default: its size, and a layer's shape.
constexpr size_t kLeastOptions = sizeof(size_t), kLeastLayer = offsetof(kvmix_layer_config, softcap),
                 kLeastModelLayer = offsetof(kvmix_model_layer, scale), kLeastItem = offsetof(kvmix_step_item, more);

float usual_scale(float scale, int head_dim) {
  return scale == 0.0f && head_dim > 0 ? 1.0f / std::sqrt(static_cast<float>(head_dim)) : scale;
}

LayerConfig layer_config(const kvmix_layer_config& from) {
  need(from.key_codec, "key_codec");
  need(from.value_codec, "value_codec");
  LayerConfig layer;
  layer.q_heads = from.q_heads;
  layer.kv_heads = from.kv_heads;
  layer.head_dim = from.head_dim;
  layer.scale = usual_scale(from.scale, from.head_dim);
  layer.softcap = from.softcap;
  layer.sliding_window = from.sliding_window;
  layer.sinks = from.sinks;
  layer.window.tokens = from.window;
  if (from.recent_codec != nullptr) layer.recent = parse_codec(from.recent_codec);
  layer.key.codec = parse_codec(from.key_codec);
  layer.value.codec = parse_codec(from.value_codec);
  layer.key.transform.hadamard = from.key_hadamard != 0;
  layer.value.transform.hadamard = from.value_hadamard != 0;
  return layer;
}

ModelShape model_shape(const kvmix_model_shape* from) {
  const auto model = read_struct(from, kvmix_model_shape{}, sizeof(kvmix_model_shape), "kvmix_model_shape");
  if (model.layer_count > 0) need(model.layers, "kvmix_model_shape.layers");
  ModelShape shape;
  shape.name = model.name == nullptr ? "a model without a name" : model.name;
  shape.fingerprint = model.fingerprint == nullptr ? "" : model.fingerprint;
  read_array(model.layers, model.layer_count, kvmix_model_layer{}, kLeastModelLayer, "kvmix_model_layer",
             [&](const kvmix_model_layer& layer) {
               shape.layers.push_back({.q_heads = layer.q_heads,
                                       .kv_heads = layer.kv_heads,
                                       .head_dim = layer.head_dim,
                                       .sliding_window = layer.sliding_window,
                                       .scale = usual_scale(layer.scale, layer.head_dim),
                                       .softcap = layer.softcap});
             });
  return shape;
}

kvmix_cache* make_cache(CacheConfig config, const kvmix_cache_options* from) {
  kvmix_cache_options options = {};
  if (from != nullptr) options = read_struct(from, options, kLeastOptions, "kvmix_cache_options");
  config.threads = options.threads == 0 ? 1 : options.threads;
  config.max_bytes = options.max_bytes;
  if (options.kernel != nullptr) config.kernel = options.kernel;
  config.exact = options.exact != 0;
  if (options.device != nullptr && *options.device != '\0') config.device = options.device;
  config.stream = options.stream;
  config.device_rows = options.device_rows != 0;
  if (options.reserved != 0) throw Error(Status::kInvalidArgument, "kvmix_cache_options.reserved is not 0; set it to 0");
  return new kvmix_cache{Cache(std::move(config))};
}

const LayerConfig& find_layer(const kvmix_cache* cache, int32_t layer) {
  need(cache, "cache");
  const std::vector<LayerConfig>& layers = cache->cache.config().layers;
  if (layer < 0 || static_cast<size_t>(layer) >= layers.size()) {
    throw Error(Status::kInvalidArgument, "layer " + std::to_string(layer) + " does not exist; the cache has " +
                                              std::to_string(layers.size()) + ", counted from 0");
  }
  return layers[static_cast<size_t>(layer)];
}

// append and attend trust their arguments, which a C caller's may not deserve.
const LayerConfig& check_call(const kvmix_cache* cache, int32_t layer, int32_t ith, int32_t nth) {
  const LayerConfig& config = find_layer(cache, layer);
  if (!cache->in_step) throw Error(Status::kInvalidArgument, "no step is open; call kvmix_step_begin first");
  const int threads = cache->cache.config().threads;
  if (nth < 1 || nth > threads || ith < 0 || ith >= nth) {
    throw Error(Status::kInvalidArgument, "thread " + std::to_string(ith) + " of " + std::to_string(nth) +
                                              "; the cache was made for " + std::to_string(threads));
  }
  return config;
}

void check_rows(const void* rows, int64_t stride, int heads, int head_dim, const char* name) {
  need(rows, name);
  if (stride < static_cast<int64_t>(heads) * head_dim) {
    throw Error(Status::kInvalidArgument, std::string(name) + "_stride is " + std::to_string(stride) + "; a row has " +
                                              std::to_string(heads) + " heads of " + std::to_string(head_dim) + " floats");
  }
}

}  // namespace
}  // namespace kvmix

using kvmix::guarded;
using kvmix::need;
using kvmix::read_array;
using kvmix::write_struct;

extern "C" {

const char* kvmix_version(void) { return KVMIX_VERSION; }
int32_t kvmix_version_number(void) { return KVMIX_VERSION_NUMBER; }
const char* kvmix_status_name(kvmix_status status) { return kvmix::status_name(static_cast<kvmix::Status>(status)); }
const char* kvmix_last_error(void) { return kvmix::last_error.c_str(); }

kvmix_status kvmix_layer_defaults(kvmix_layer_config* layer) {
  return guarded([&] {
    need(layer, "layer");
    write_struct(kvmix::layer_defaults(), layer, kvmix::kLeastLayer, "kvmix_layer_config");
  });
}

kvmix_status kvmix_cache_create(const kvmix_layer_config* layers, size_t layer_count, const kvmix_cache_options* options,
                                kvmix_cache** cache) {
  return guarded([&] {
    need(cache, "cache");
    if (layer_count > 0) need(layers, "layers");
    kvmix::CacheConfig config;
    read_array(layers, layer_count, kvmix::layer_defaults(), kvmix::kLeastLayer, "kvmix_layer_config",
               [&](const kvmix_layer_config& layer) { config.layers.push_back(kvmix::layer_config(layer)); });
    *cache = kvmix::make_cache(std::move(config), options);
  });
}

kvmix_status kvmix_plan_read(const char* path, kvmix_plan** plan) {
  return guarded([&] {
    need(path, "path");
    need(plan, "plan");
    *plan = new kvmix_plan{kvmix::read_plan(path)};
  });
}

kvmix_status kvmix_plan_parse(const char* json, kvmix_plan** plan) {
  return guarded([&] {
    need(json, "json");
    need(plan, "plan");
    *plan = new kvmix_plan{kvmix::parse_plan(json, "the plan's text")};
  });
}

void kvmix_plan_destroy(kvmix_plan* plan) { delete plan; }

kvmix_status kvmix_cache_create_from_plan(const kvmix_plan* plan, const kvmix_model_shape* model,
                                          const kvmix_cache_options* options, kvmix_cache** cache) {
  return guarded([&] {
    need(plan, "plan");
    need(model, "model");
    need(cache, "cache");
    const kvmix::ModelShape shape = kvmix::model_shape(model);
    kvmix::check_plan(plan->plan, shape, shape.fingerprint.empty());
    *cache = kvmix::make_cache(kvmix::cache_config(plan->plan, shape), options);
  });
}

void kvmix_cache_destroy(kvmix_cache* cache) { delete cache; }

kvmix_status kvmix_sequence_create(kvmix_cache* cache, kvmix_sequence* sequence) {
  return guarded([&] {
    need(cache, "cache");
    need(sequence, "sequence");
    *sequence = cache->cache.create();
  });
}

kvmix_status kvmix_sequence_remove(kvmix_cache* cache, kvmix_sequence sequence) {
  return guarded([&] {
    need(cache, "cache");
    cache->cache.remove(sequence);
  });
}

kvmix_status kvmix_sequence_fork(kvmix_cache* cache, kvmix_sequence sequence, kvmix_sequence* copy) {
  return guarded([&] {
    need(cache, "cache");
    need(copy, "copy");
    *copy = cache->cache.fork(sequence);
  });
}

kvmix_status kvmix_sequence_truncate(kvmix_cache* cache, kvmix_sequence sequence, int64_t n_tokens) {
  return guarded([&] {
    need(cache, "cache");
    cache->cache.truncate(sequence, n_tokens);
  });
}

kvmix_status kvmix_sequence_length(const kvmix_cache* cache, kvmix_sequence sequence, int64_t* n_tokens) {
  return guarded([&] {
    need(cache, "cache");
    need(n_tokens, "n_tokens");
    *n_tokens = cache->cache.length(sequence);
  });
}

kvmix_status kvmix_sequence_save(const kvmix_cache* cache, kvmix_sequence sequence, const char* path, const char* fingerprint) {
  return guarded([&] {
    need(cache, "cache");
    need(path, "path");
    need(fingerprint, "fingerprint");
    cache->cache.save(sequence, path, fingerprint);
  });
}

kvmix_status kvmix_sequence_load(kvmix_cache* cache, const char* path, const char* fingerprint, kvmix_sequence* sequence) {
  return guarded([&] {
    need(cache, "cache");
    need(path, "path");
    need(fingerprint, "fingerprint");
    need(sequence, "sequence");
    *sequence = cache->cache.load(path, fingerprint);
  });
}

kvmix_status kvmix_sequence_tail(const kvmix_cache* cache, kvmix_sequence sequence, int32_t layer, kvmix_tail* tail) {
  return guarded([&] {
    kvmix::find_layer(cache, layer);
    need(tail, "tail");
    const kvmix::Cache::TailReport t = cache->cache.tail(sequence, layer);
    const kvmix_tail made = {.struct_bytes = sizeof(kvmix_tail), .sinks = t.sinks, .sealed = t.sealed, .recent = t.window};
    write_struct(made, tail, sizeof(kvmix_tail), "kvmix_tail");
  });
}

kvmix_status kvmix_sequence_kept(const kvmix_cache* cache, kvmix_sequence sequence, int32_t layer, int32_t kv_head,
                                 int64_t* positions, size_t capacity, size_t* count) {
  return guarded([&] {
    const kvmix::LayerConfig& config = kvmix::find_layer(cache, layer);
    need(count, "count");
    if (capacity > 0) need(positions, "positions");
    if (kv_head < 0 || kv_head >= config.kv_heads) {
      throw kvmix::Error(kvmix::Status::kInvalidArgument, "KV head " + std::to_string(kv_head) + " does not exist; layer " +
                                                              std::to_string(layer) + " has " +
                                                              std::to_string(config.kv_heads) + ", counted from 0");
    }
    const std::vector<int64_t> kept = cache->cache.kept(sequence, layer)[static_cast<size_t>(kv_head)];
    std::copy_n(kept.begin(), std::min(capacity, kept.size()), positions);
    *count = kept.size();
  });
}

kvmix_status kvmix_step_begin(kvmix_cache* cache, const kvmix_step_item* items, size_t item_count) {
  return guarded([&] {
    need(cache, "cache");
    need(items, "items");
    std::vector<kvmix::StepItem> list;
    read_array(items, item_count, kvmix_step_item{}, kvmix::kLeastItem, "kvmix_step_item", [&](const kvmix_step_item& item) {
      list.push_back({item.sequence, item.n_tokens, item.more != 0, item.decoded != 0});
    });
    cache->cache.begin_step(list);
    cache->in_step = true;
  });
}

kvmix_status kvmix_step_end(kvmix_cache* cache) {
  return guarded([&] {
    need(cache, "cache");
    cache->cache.end_step();
    cache->in_step = false;
  });
}

kvmix_status kvmix_step_abort(kvmix_cache* cache) {
  return guarded([&] {
    need(cache, "cache");
    cache->cache.abort_step();
    cache->in_step = false;
  });
}

kvmix_status kvmix_cache_append(kvmix_cache* cache, int32_t layer, const float* k, int64_t k_stride, const float* v,
                                int64_t v_stride, int32_t ith, int32_t nth) {
  return guarded([&] {
    const kvmix::LayerConfig& config = kvmix::check_call(cache, layer, ith, nth);
    kvmix::check_rows(k, k_stride, config.kv_heads, config.head_dim, "k");
    kvmix::check_rows(v, v_stride, config.kv_heads, config.head_dim, "v");
    cache->cache.append(layer, k, k_stride, v, v_stride, ith, nth);
  });
}

kvmix_status kvmix_cache_attend(kvmix_cache* cache, int32_t layer, const float* q, int64_t q_stride, float* out,
                                int64_t out_stride, int32_t ith, int32_t nth) {
  return guarded([&] {
    const kvmix::LayerConfig& config = kvmix::check_call(cache, layer, ith, nth);
    kvmix::check_rows(q, q_stride, config.q_heads, config.head_dim, "q");
    kvmix::check_rows(out, out_stride, config.q_heads, config.head_dim, "out");
    cache->cache.attend(layer, q, q_stride, out, out_stride, ith, nth);
  });
}

kvmix_status kvmix_cache_memory(const kvmix_cache* cache, kvmix_memory* memory) {
  return guarded([&] {
    need(cache, "cache");
    need(memory, "memory");
    const kvmix::MemoryReport m = cache->cache.memory();
    const kvmix_memory made = {.struct_bytes = sizeof(kvmix_memory),
                               .sealed_bytes = m.sealed_bytes,
                               .open_bytes = m.open_bytes,
                               .sink_bytes = m.sink_bytes,
                               .table_bytes = m.table_bytes,
                               .slack_bytes = m.slack_bytes,
                               .scratch_bytes = m.scratch_bytes,
                               .total_bytes = m.total_bytes,
                               .tokens = m.tokens};
    write_struct(made, memory, sizeof(kvmix_memory), "kvmix_memory");
  });
}

kvmix_status kvmix_cache_predict_bytes(const kvmix_cache* cache, int64_t n_tokens, size_t* bytes) {
  return guarded([&] {
    need(cache, "cache");
    need(bytes, "bytes");
    constexpr int64_t kMostTokens = int64_t{1} << 40;
    if (n_tokens < 0 || n_tokens > kMostTokens) {
      throw kvmix::Error(kvmix::Status::kInvalidArgument,
                         "n_tokens is " + std::to_string(n_tokens) + "; expected 0 to " + std::to_string(kMostTokens));
    }
    *bytes = kvmix::predict_bytes(cache->cache.config(), n_tokens);
  });
}

kvmix_status kvmix_cache_kernel(const kvmix_cache* cache, const char** name) {
  return guarded([&] {
    need(cache, "cache");
    need(name, "name");
    kvmix::kernel_name = cache->cache.stats().kernel;
    *name = kvmix::kernel_name.c_str();
  });
}

}  // extern "C"
