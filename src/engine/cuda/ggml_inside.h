// What lies behind ggml's public headers and is needed to put kernels of ours between its own: the stream of its CUDA backend,
// and running a part of a graph at once. Tied to the release of ggml that is built with this engine.
#pragma once

#include <cuda_runtime.h>
#include <ggml-backend.h>
#include <ggml.h>

namespace kvmix::cuda {

// That `backend`, made by ggml_backend_cuda_init, queues on.
cudaStream_t stream_of(ggml_backend_t backend);

// Queues nodes [begin, end) of a graph. It may be called inside a capture: ggml takes the nodes for changed, since the first
// one gets a new name, and so makes no capture of its own. Throws kInternal.
void queue_nodes(ggml_backend_t backend, ggml_cgraph* graph, int begin, int end);

}  // namespace kvmix::cuda
