#include "engine/graph_device.h"

#include <ggml-cpu.h>

#include "engine/library_call.h"
#include "kvmix/error.h"

namespace kvmix {

GraphDevice::GraphDevice(const std::string& device, int threads, size_t nodes) : cpu_(ggml_backend_cpu_init()) {
  ggml_backend_cpu_set_n_threads(cpu_.get(), threads);
  if (device == "cuda") {
    cuda_ = make_cuda_backend();
  } else if (device != "cpu") {
    throw Error(Status::kInvalidArgument, "device \"" + device + "\" is unknown; expected cpu or cuda");
  }
  std::vector<ggml_backend_t> backends;
  if (cuda_ != nullptr) backends.push_back(cuda_.get());
  backends.push_back(cpu_.get());
  scheduler_.reset(ggml_backend_sched_new(backends.data(), nullptr, static_cast<int>(backends.size()), nodes, false, false));
}

// A device reads weights as the file has them.
const Weights& GraphDevice::weights(const GgufModel& model) const {
  return cuda_ != nullptr ? model.stored_weights() : model.weights();
}

bool GraphDevice::allocate(ggml_cgraph* graph) {
  const LibraryCall call;
  ggml_backend_sched_reset(scheduler_.get());
  for (int i = 0; cuda_ != nullptr && i < ggml_graph_n_nodes(graph); ++i) {
    ggml_tensor* node = ggml_graph_node(graph, i);
    if (node->view_src != nullptr) continue;
    // Rows of an embedding are a small part of what would have to be copied.
    const bool there = node->op != GGML_OP_GET_ROWS && ggml_backend_supports_op(cuda_.get(), node);
    ggml_backend_sched_set_tensor_backend(scheduler_.get(), node, there ? cuda_.get() : cpu_.get());
  }
  return ggml_backend_sched_alloc_graph(scheduler_.get(), graph);
}

void GraphDevice::compute(ggml_cgraph* graph, const char* what) {
  const LibraryCall call;
  if (ggml_backend_sched_graph_compute(scheduler_.get(), graph) != GGML_STATUS_SUCCESS)
    throw Error(Status::kInternal, std::string(what) + " failed: " + call.reason("ggml gives no reason"));
}

void fill(ggml_tensor* t, std::span<const float> values) { ggml_backend_tensor_set(t, values.data(), 0, values.size_bytes()); }

std::vector<float> copied(const ggml_tensor* t) {
  std::vector<float> values(static_cast<size_t>(ggml_nelements(t)));
  ggml_backend_tensor_get(t, values.data(), 0, ggml_nbytes(t));
  return values;
}

}  // namespace kvmix
