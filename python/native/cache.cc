// The cache, for engines and studies in Python.
#include "kvmix/cache.h"

#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <mutex>
#include <optional>
#include <tuple>

#include "arrays.h"
#include "kvmix/plan.h"
#include "module.h"
#ifdef KVMIX_CUDA
#include <cuda_runtime.h>
#endif

namespace kvmix::python {
namespace {

using namespace nb::literals;

// CUDA's name for the stream that frameworks number 0 and start with.
constexpr uintptr_t kDefaultStream = 1;

CacheConfig config_of(const Plan& plan, const ModelShape& shape, bool force, int threads, size_t max_bytes,
                      const std::string& kernel, bool exact, const std::string& device, uintptr_t stream) {
  check_plan(plan, shape, force);
  CacheConfig config = cache_config(plan, shape);
  config.threads = threads == 0 ? default_threads() : threads;
  config.max_bytes = max_bytes;
  config.kernel = kernel;
  config.exact = exact;
  set_device(config, device, stream);
  return config;
}

}  // namespace

void set_device(CacheConfig& config, const std::string& device, uintptr_t stream) {
  config.device = device;
  if (device == "cuda") {
    config.threads = 1;
    config.device_rows = true;
    config.stream = reinterpret_cast<void*>(stream == 0 ? kDefaultStream : stream);
  } else if (stream != 0) {
    refuse("a stream belongs to the device \"cuda\"; leave it out on the device \"" + device + "\"");
  }
}

int current_gpu() {
  int gpu = 0;
#ifdef KVMIX_CUDA
  if (const cudaError_t status = cudaGetDevice(&gpu); status != cudaSuccess)
    throw Error(Status::kInternal, std::string("device \"cuda\": ") + cudaGetErrorString(status));
#endif
  return gpu;
}

namespace {

// Calls from several Python threads come one after the other; a step's layers are attended to in order.
class PythonCache {
 public:
  PythonCache(const Plan& plan, const ModelShape& shape, bool force, int threads, size_t max_bytes, const std::string& kernel,
              bool exact, const std::string& device, uintptr_t stream, const std::string& fingerprint)
      : fingerprint_(fingerprint), cache_(config_of(plan, shape, force, threads, max_bytes, kernel, exact, device, stream)) {
    if (device == "cuda") place_.gpu = current_gpu();
  }

  // Without the interpreter's lock.
  template <typename Body>
  auto call(const Body& body) {
    const nb::gil_scoped_release unlocked;
    const std::lock_guard lock(mutex_);
    return body(cache_);
  }

  void begin_step(const std::vector<std::tuple<SequenceId, int>>& items, bool more, bool decoded) {
    std::vector<StepItem> list;
    int64_t rows = 0;
    for (const auto& [sequence, tokens] : items) {
      list.push_back({sequence, tokens, more, decoded});
      rows += tokens;
    }
    if (list.empty()) refuse("a step has no sequences; name at least one with its number of new tokens");
    call([&](Cache& cache) { cache.begin_step(list); });
    rows_ = rows;
    next_layer_ = 0;
  }

  void attend(int layer, nb::handle q, nb::handle k, nb::handle v, nb::handle out) {
    const auto layers = static_cast<int>(cache_.config().layers.size());
    if (!rows_) refuse("no step is open; call begin_step first, or use `with cache.step(...)`");
    if (layer < 0 || layer >= layers)
      refuse("layer is " + std::to_string(layer) + "; expected 0 to " + std::to_string(layers - 1));
    if (layer != next_layer_)
      refuse("layer " + std::to_string(layer) + " came where layer " + std::to_string(next_layer_) +
             " is next: each layer of a step is attended to once, in order");
    const LayerConfig& config = cache_.config().layers[static_cast<size_t>(layer)];
    const Rows key = take_rows(k, "key", *rows_, config.kv_heads, config.head_dim, false, place_);
    const Rows value = take_rows(v, "value", *rows_, config.kv_heads, config.head_dim, false, place_);
    const Rows query = take_rows(q, "query", *rows_, config.q_heads, config.head_dim, false, place_);
    const Rows result = take_rows(out, "out", *rows_, config.q_heads, config.head_dim, true, place_);
    const int64_t last = (*rows_ - 1) * query.stride + int64_t{config.q_heads} * config.head_dim;
    const int64_t end = (*rows_ - 1) * result.stride + int64_t{config.q_heads} * config.head_dim;
    if (result.data < query.data + last && query.data < result.data + end)
      refuse("out shares memory with query: give it an array of its own");
    call([&](Cache& cache) {
      if (!place_.on_cpu()) {  // the device's threads are its own matter
        cache.append(layer, key.data, key.stride, value.data, value.stride, 0, 1);
        cache.attend(layer, query.data, query.stride, result.data, result.stride, 0, 1);
        return;
      }
      cache.step_layer(layer, key.data, key.stride, value.data, value.stride, query.data, query.stride, result.data,
                       result.stride);
    });
    ++next_layer_;
  }

  // Of a step that has attended to nothing yet; 0: it cannot be captured.
  uint64_t launch_key() {
    if (!rows_ || next_layer_ != 0) refuse("launch_key is asked between begin_step and the first layer");
    if (place_.on_cpu()) refuse("launch_key is for the device \"cuda\"; this cache is on the device \"cpu\"");
    return call([](Cache& cache) { return cache.launch_key(); });
  }

  // What was captured stands for all layers of this step.
  void launched() {
    if (!rows_ || place_.on_cpu()) refuse("launched is for an open step on the device \"cuda\"");
    next_layer_ = static_cast<int>(cache_.config().layers.size());
  }

  void end_step() {
    if (!rows_) refuse("no step is open; call begin_step first");
    const auto layers = static_cast<int>(cache_.config().layers.size());
    if (next_layer_ != layers) {
      refuse("the step has attended to " + std::to_string(next_layer_) + " of " + std::to_string(layers) +
             " layers; attend to all of them, or abort_step");
    }
    rows_.reset();
    call([](Cache& cache) { cache.end_step(); });
  }

  void abort_step() {
    rows_.reset();
    call([](Cache& cache) { cache.abort_step(); });
  }

  std::optional<int> gpu() const { return place_.on_cpu() ? std::nullopt : std::optional(place_.gpu); }
  bool in_step() const { return rows_.has_value(); }
  const Cache& cache() const { return cache_; }
  const std::string& fingerprint() const { return fingerprint_; }

 private:
  std::string fingerprint_;
  Cache cache_;
  Place place_;
  std::mutex mutex_;
  std::optional<int64_t> rows_;  // of the open step
  int next_layer_ = 0;
};

nb::dict memory_of(PythonCache& c) {
  const MemoryReport r = c.call([](Cache& cache) { return cache.memory(); });
  nb::dict d;
  d["sealed_bytes"] = r.sealed_bytes;
  d["open_bytes"] = r.open_bytes;
  d["sink_bytes"] = r.sink_bytes;
  d["table_bytes"] = r.table_bytes;
  d["slack_bytes"] = r.slack_bytes;
  d["scratch_bytes"] = r.scratch_bytes;
  d["total_bytes"] = r.total_bytes;
  d["tokens"] = r.tokens;
  return d;
}

nb::ndarray<nb::numpy, float> read_rows(PythonCache& c, SequenceId sequence, int layer, int kv_head, const std::string& side,
                                        bool original_space) {
  if (side != "key" && side != "value") refuse("side is '" + side + "'; expected 'key' or 'value'");
  const auto& layers = c.cache().config().layers;
  if (layer < 0 || layer >= static_cast<int>(layers.size()))
    refuse("layer is " + std::to_string(layer) + "; expected 0 to " + std::to_string(layers.size() - 1));
  const LayerConfig& config = layers[static_cast<size_t>(layer)];
  if (kv_head < 0 || kv_head >= config.kv_heads)
    refuse("kv_head is " + std::to_string(kv_head) + "; expected 0 to " + std::to_string(config.kv_heads - 1));
  std::vector<float> rows;
  size_t length = 0;
  c.call([&](Cache& cache) {
    length = static_cast<size_t>(cache.length(sequence));
    rows.resize(length * static_cast<size_t>(config.head_dim));
    cache.read(sequence, layer, kv_head, side == "key" ? Side::kKey : Side::kValue, original_space, rows.data());
  });
  return as_numpy(std::move(rows), {length, static_cast<size_t>(config.head_dim)});
}

void need_layer(PythonCache& c, int layer) {
  const size_t layers = c.cache().config().layers.size();
  if (layer < 0 || static_cast<size_t>(layer) >= layers)
    refuse("layer is " + std::to_string(layer) + "; expected 0 to " + std::to_string(layers - 1));
}

}  // namespace

void bind_cache(nb::module_& m) {
  nb::class_<PythonCache>(m, "NativeCache")
      .def(nb::init<const Plan&, const ModelShape&, bool, int, size_t, const std::string&, bool, const std::string&, uintptr_t,
                    const std::string&>(),
           "plan"_a, "shape"_a, "force"_a, "threads"_a, "max_bytes"_a, "kernel"_a, "exact"_a, "device"_a, "stream"_a,
           "fingerprint"_a)
      .def("create", [](PythonCache& c) { return c.call([](Cache& cache) { return cache.create(); }); })
      .def(
          "remove", [](PythonCache& c, SequenceId s) { c.call([s](Cache& cache) { cache.remove(s); }); }, "sequence"_a)
      .def(
          "fork", [](PythonCache& c, SequenceId s) { return c.call([s](Cache& cache) { return cache.fork(s); }); },
          "sequence"_a)
      .def(
          "copy", [](PythonCache& c, SequenceId s) { return c.call([s](Cache& cache) { return cache.copy(s); }); },
          "sequence"_a)
      .def(
          "truncate", [](PythonCache& c, SequenceId s, int64_t n) { c.call([s, n](Cache& cache) { cache.truncate(s, n); }); },
          "sequence"_a, "tokens"_a)
      .def(
          "length", [](PythonCache& c, SequenceId s) { return c.call([s](Cache& cache) { return cache.length(s); }); },
          "sequence"_a)
      .def_prop_ro("sequences", [](PythonCache& c) { return c.call([](Cache& cache) { return cache.sequences(); }); })
      .def("begin_step", &PythonCache::begin_step, "items"_a, "more"_a, "decoded"_a)
      .def("attend", &PythonCache::attend, "layer"_a, "query"_a, "key"_a, "value"_a, "out"_a)
      .def("end_step", &PythonCache::end_step)
      .def("abort_step", &PythonCache::abort_step)
      .def("launch_key", &PythonCache::launch_key)
      .def("launched", &PythonCache::launched)
      .def_prop_ro("in_step", &PythonCache::in_step)
      .def("memory", &memory_of)
      .def(
          "tail",
          [](PythonCache& c, SequenceId s, int layer) {
            need_layer(c, layer);
            const Cache::TailReport t = c.call([&](Cache& cache) { return cache.tail(s, layer); });
            return std::tuple(t.sinks, t.sealed, t.window);
          },
          "sequence"_a, "layer"_a)
      .def(
          "kept",
          [](PythonCache& c, SequenceId s, int layer) {
            need_layer(c, layer);
            return c.call([&](Cache& cache) { return cache.kept(s, layer); });
          },
          "sequence"_a, "layer"_a)
      .def(
          "next_seal", [](PythonCache& c, SequenceId s) { return c.call([s](Cache& cache) { return cache.next_seal(s); }); },
          "sequence"_a)
      .def_prop_ro("kernel", [](PythonCache& c) { return c.call([](Cache& cache) { return cache.stats().kernel; }); })
      .def_prop_ro("sealed_pages",
                   [](PythonCache& c) { return c.call([](Cache& cache) { return cache.stats().sealed_pages; }); })
      .def_prop_ro("gpu", &PythonCache::gpu)
      .def_prop_ro("threads", [](PythonCache& c) { return c.cache().config().threads; })
      .def("read", &read_rows, "sequence"_a, "layer"_a, "kv_head"_a, "side"_a, "original_space"_a)
      .def(
          "save",
          [](PythonCache& c, SequenceId s, const std::string& path) {
            c.call([&](Cache& cache) { cache.save(s, path, c.fingerprint()); });
          },
          "sequence"_a, "path"_a)
      .def(
          "load",
          [](PythonCache& c, const std::string& path) {
            return c.call([&](Cache& cache) { return cache.load(path, c.fingerprint()); });
          },
          "path"_a);
  m.def(
      "cuda_space",
      [] {
        const DeviceSpace space = cuda_space();
        return std::pair(space.free_bytes, space.total_bytes);
      },
      "Free and all bytes of the calling thread's current GPU. Raises UnsupportedError where there is none, or no CUDA in "
      "this\n"
      "build.");
  m.def(
      "cuda_architectures", [] { return cuda_support().architectures; },
      "The GPUs that this build has code for, in CMake's words; asks no device. Raises UnsupportedError in a build without "
      "CUDA.");
  m.def(
      "attention_kernels",
      [] {
        std::vector<std::tuple<std::string, std::string, bool>> list;
        for (const AttentionKernelInfo& info : attention_kernels())
          list.emplace_back(info.name, info.description, info.available);
        return list;
      },
      "Attention kernels of the CPU: name, description, whether this machine runs it.");
}

}  // namespace kvmix::python
