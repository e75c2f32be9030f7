// The C ABI over Cache: argument checks that C callers need, and exceptions turned into statuses.
#include <cmath>
#include <new>
#include <string>

#include "kvmix/cache.h"
#include "kvmix/error.h"
#include "kvmix/kvmix.h"

struct kvmix_cache {
  kvmix::Cache cache;
  bool in_step = false;
};

namespace kvmix {
namespace {

thread_local std::string last_error;
thread_local std::string kernel_name;

kvmix_status failed(Status status, const char* message) noexcept {
  try {
    last_error = message;
  } catch (...) {
    last_error.clear();
  }
  return static_cast<kvmix_status>(status);
}

template <typename Body>
kvmix_status guarded(Body body) noexcept {
  try {
    body();
    return KVMIX_OK;
  } catch (const Error& e) {
    return failed(e.status(), e.what());
  } catch (const std::bad_alloc&) {
    return failed(Status::kOutOfMemory, "the system has no memory left; free some and try again");
  } catch (const std::exception& e) {
    return failed(Status::kInternal, e.what());
  }
}

void need(const void* pointer, const char* name) {
  if (pointer == nullptr) throw Error(Status::kInvalidArgument, std::string(name) + " is null; pass a valid pointer");
}

LayerConfig layer_config(const kvmix_layer_config& from) {
  need(from.key_codec, "key_codec");
  need(from.value_codec, "value_codec");
  LayerConfig layer;
  layer.q_heads = from.q_heads;
  layer.kv_heads = from.kv_heads;
  layer.head_dim = from.head_dim;
  layer.scale = from.scale == 0.0f && from.head_dim > 0 ? 1.0f / std::sqrt(static_cast<float>(from.head_dim)) : from.scale;
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

// append and attend trust their arguments, which a C caller's may not deserve.
void check_call(const kvmix_cache* cache, int32_t layer, int32_t ith, int32_t nth) {
  need(cache, "cache");
  const CacheConfig& config = cache->cache.config();
  if (!cache->in_step) throw Error(Status::kInvalidArgument, "no step is open; call kvmix_step_begin first");
  if (layer < 0 || static_cast<size_t>(layer) >= config.layers.size()) {
    throw Error(Status::kInvalidArgument,
                "layer " + std::to_string(layer) + " of " + std::to_string(config.layers.size()) + " does not exist");
  }
  if (nth < 1 || nth > config.threads || ith < 0 || ith >= nth) {
    throw Error(Status::kInvalidArgument, "thread " + std::to_string(ith) + " of " + std::to_string(nth) +
                                              "; the cache was made for " + std::to_string(config.threads));
  }
}

}  // namespace
}  // namespace kvmix

using kvmix::guarded;
using kvmix::need;

extern "C" {

const char* kvmix_version(void) { return KVMIX_VERSION; }
const char* kvmix_status_name(kvmix_status status) { return kvmix::status_name(static_cast<kvmix::Status>(status)); }
const char* kvmix_last_error(void) { return kvmix::last_error.c_str(); }

void kvmix_layer_defaults(kvmix_layer_config* layer) {
  if (layer == nullptr) return;
  *layer = {};
  layer->sinks = 16;
  layer->window = 128;
  layer->recent_codec = "f16";
  layer->key_codec = "int3.channel.g128.fitted.zero";
  layer->value_codec = "int3.token.g64.minmax.zero";
}

kvmix_status kvmix_cache_create(const kvmix_cache_config* config, kvmix_cache** cache) {
  return guarded([&] {
    need(config, "config");
    need(cache, "cache");
    if (config->layer_count > 0) need(config->layers, "layers");
    kvmix::CacheConfig made;
    for (size_t l = 0; l < config->layer_count; ++l) made.layers.push_back(kvmix::layer_config(config->layers[l]));
    made.threads = config->threads;
    made.max_bytes = config->max_bytes;
    if (config->kernel != nullptr) made.kernel = config->kernel;
    made.exact = config->exact != 0;
    *cache = new kvmix_cache{kvmix::Cache(std::move(made))};
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

kvmix_status kvmix_step_begin(kvmix_cache* cache, const kvmix_step_item* items, size_t item_count) {
  return guarded([&] {
    need(cache, "cache");
    need(items, "items");
    std::vector<kvmix::StepItem> list;
    for (size_t i = 0; i < item_count; ++i) list.push_back({items[i].sequence, items[i].n_tokens});
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
    kvmix::check_call(cache, layer, ith, nth);
    need(k, "k");
    need(v, "v");
    cache->cache.append(layer, k, k_stride, v, v_stride, ith, nth);
  });
}

kvmix_status kvmix_cache_attend(kvmix_cache* cache, int32_t layer, const float* q, int64_t q_stride, float* out,
                                int64_t out_stride, int32_t ith, int32_t nth) {
  return guarded([&] {
    kvmix::check_call(cache, layer, ith, nth);
    need(q, "q");
    need(out, "out");
    cache->cache.attend(layer, q, q_stride, out, out_stride, ith, nth);
  });
}

kvmix_status kvmix_cache_memory(const kvmix_cache* cache, kvmix_memory* memory) {
  return guarded([&] {
    need(cache, "cache");
    need(memory, "memory");
    const kvmix::MemoryReport m = cache->cache.memory();
    *memory = {m.sealed_bytes, m.open_bytes,    m.sink_bytes,  m.table_bytes,
               m.slack_bytes,  m.scratch_bytes, m.total_bytes, m.tokens};
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
