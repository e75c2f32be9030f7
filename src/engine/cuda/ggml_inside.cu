#include <cstdio>
#include <string>

#include "engine/cuda/ggml_inside.h"
#include "kvmix/error.h"

// ggml's own, of the release that the build is pinned to.
#include "ggml-backend-impl.h"
#include "ggml-cuda/common.cuh"
#include "ggml-impl.h"

namespace kvmix::cuda {

cudaStream_t stream_of(ggml_backend_t backend) { return static_cast<ggml_backend_cuda_context*>(backend->context)->stream(); }

void queue_nodes(ggml_backend_t backend, ggml_cgraph* graph, int begin, int end) {
  if (begin == end) return;
  static unsigned run = 0;  // one thread queues at a time, and a name that two runs share does no harm
  ggml_cgraph part = ggml_graph_view(graph, begin, end);
  std::snprintf(part.nodes[0]->name, sizeof part.nodes[0]->name, "run %u", ++run);
  const ggml_status status = ggml_backend_graph_compute_async(backend, &part);
  if (status != GGML_STATUS_SUCCESS)
    throw Error(Status::kInternal, std::string("a part of the graph failed on the device: ") + ggml_status_to_string(status));
}

}  // namespace kvmix::cuda
