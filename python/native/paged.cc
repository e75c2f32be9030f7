// Attention over an engine's own blocks, for kvmix.vllm.
#include "kvmix/paged.h"

#include <nanobind/stl/string.h>

#include <mutex>

#include "arrays.h"
#include "kvmix/plan.h"
#include "module.h"

namespace kvmix::python {
namespace {

using namespace nb::literals;

using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const int32_t, nb::ndim<2>, nb::device::cpu>;
using Bytes = nb::ndarray<uint8_t>;

CacheConfig config_of(const Plan& plan, const ModelShape& shape, bool force, int threads, int part, int parts,
                      const std::string& device, uintptr_t stream) {
  check_plan(plan, shape, force);
  CacheConfig config = cache_config(plan, shape);
  config.threads = threads == 0 ? default_threads() : threads;
  set_device(config, device, stream);
  return part_of_heads(config, part, parts);
}

class PythonPaged {
 public:
  PythonPaged(const Plan& plan, const ModelShape& shape, bool force, int threads, int most_sequences, int part, int parts,
              const std::string& device, uintptr_t stream)
      : paged_(config_of(plan, shape, force, threads, part, parts, device, stream), most_sequences) {
    if (device == "cuda") place_.gpu = current_gpu();
  }

  size_t block_bytes(int layer) const {
    check_layer(layer);
    return paged_.block_bytes(layer);
  }

  void step(int layer, const Ints& row_begin, const Ints& lengths, const Table& table, bool spare, const Bytes& blocks,
            nb::handle q, nb::handle k, nb::handle v, nb::handle out) {
    check_layer(layer);
    const LayerConfig& config = paged_.config().layers[static_cast<size_t>(layer)];
    const auto sequences = static_cast<int64_t>(lengths.shape(0));
    if (static_cast<int64_t>(row_begin.shape(0)) != sequences + 1 || static_cast<int64_t>(table.shape(0)) != sequences) {
      refuse("row_begin, lengths and blocks are of " + std::to_string(row_begin.shape(0)) + ", " + std::to_string(sequences) +
             " and " + std::to_string(table.shape(0)) + " sequences; expected one more, and as many");
    }
    if (sequences > 0 && table.shape(1) > 1 && table.stride(1) != 1) refuse("rows of the table of blocks are not contiguous");
    if (blocks.ndim() < 2 || static_cast<size_t>(blocks.stride(0)) < paged_.block_bytes(layer))
      refuse("blocks have shape " + shape_text(nb::ndarray<>(blocks)) + "; expected uint8 [blocks, ...] of " +
             std::to_string(paged_.block_bytes(layer)) + " bytes each");
    const int device = place_.on_cpu() ? nb::device::cpu::value : nb::device::cuda::value;
    if (blocks.device_type() != device || (!place_.on_cpu() && blocks.device_id() != place_.gpu))
      refuse("blocks are not in the memory of the device that attends to them");
    for (int64_t s = 0; s < sequences; ++s) {
      if (row_begin.data()[s] == row_begin.data()[s + 1]) continue;
      const int32_t* row = table.data() + s * table.stride(0);
      const int64_t used = (int64_t{lengths.data()[s]} + kPageTokens - 1) / kPageTokens;
      if (used > static_cast<int64_t>(table.shape(1))) refuse("sequence " + std::to_string(s) + " is longer than its blocks");
      for (int64_t b = 0; b < used; ++b) {
        if (row[b] < 0 || static_cast<size_t>(row[b]) >= blocks.shape(0))
          refuse("sequence " + std::to_string(s) + " names block " + std::to_string(row[b]) + " of " +
                 std::to_string(blocks.shape(0)));
      }
    }
    const int64_t rows = sequences > 0 ? row_begin.data()[sequences] : 0;
    if (rows == 0) return;
    const Rows key = take_rows(k, "key", rows, config.kv_heads, config.head_dim, false, place_);
    const Rows value = take_rows(v, "value", rows, config.kv_heads, config.head_dim, false, place_);
    const Rows query = take_rows(q, "query", rows, config.q_heads, config.head_dim, false, place_);
    const Rows result = take_rows(out, "out", rows, config.q_heads, config.head_dim, true, place_);
    const PagedStep step{.sequences = static_cast<int>(sequences),
                         .row_begin = row_begin.data(),
                         .lengths = lengths.data(),
                         .blocks = table.data(),
                         .blocks_stride = sequences > 1 ? table.stride(0) : static_cast<int64_t>(table.shape(1)),
                         .spare = spare};
    const nb::gil_scoped_release unlocked;
    const std::lock_guard lock(mutex_);
    paged_.step(layer, step, reinterpret_cast<std::byte*>(blocks.data()), blocks.stride(0), key.data, key.stride, value.data,
                value.stride, query.data, query.stride, result.data, result.stride);
  }

  nb::dict memory() {
    const PagedMemory m = paged_.memory();
    nb::dict d;
    d["open_bytes"] = m.open_bytes;
    d["sink_bytes"] = m.sink_bytes;
    d["taken_bytes"] = m.taken_bytes;
    return d;
  }
  const PagedAttention& get() const { return paged_; }

 private:
  void check_layer(int layer) const {
    const size_t layers = paged_.config().layers.size();
    if (layer < 0 || static_cast<size_t>(layer) >= layers)
      refuse("layer is " + std::to_string(layer) + "; expected 0 to " + std::to_string(layers - 1));
  }

  PagedAttention paged_;
  Place place_;
  std::mutex mutex_;
};

}  // namespace

void bind_paged(nb::module_& m) {
  nb::class_<PythonPaged>(m, "NativePaged")
      .def(nb::init<const Plan&, const ModelShape&, bool, int, int, int, int, const std::string&, uintptr_t>(), "plan"_a,
           "shape"_a, "force"_a, "threads"_a, "most_sequences"_a, "part"_a, "parts"_a, "device"_a = "cpu", "stream"_a = 0)
      .def("block_bytes", &PythonPaged::block_bytes, "layer"_a)
      .def_prop_ro("beside_bytes", [](const PythonPaged& p) { return p.get().beside_bytes(); })
      .def_prop_ro("sink_bytes", [](const PythonPaged& p) { return p.get().sink_bytes(); })
      .def_prop_ro("kernel", [](const PythonPaged& p) { return p.get().kernel(); })
      .def_prop_ro("threads", [](const PythonPaged& p) { return p.get().config().threads; })
      .def("memory", &PythonPaged::memory)
      .def("step", &PythonPaged::step, "layer"_a, "row_begin"_a, "lengths"_a, "table"_a, "spare"_a, "blocks"_a, "query"_a,
           "key"_a, "value"_a, "out"_a);
}

}  // namespace kvmix::python
