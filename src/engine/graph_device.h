// Runs ggml graphs that are no steps of an engine: on the CPU, or on a CUDA device what ggml has code for there and the rest on
// the CPU, with weights where the file has them, copied when a node reads them. So a device needs memory for one layer's work.
#pragma once

#include <ggml-backend.h>

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "engine/runner.h"

namespace kvmix {

class GraphDevice {
 public:
  // "cpu", on so many threads, or "cuda", the calling thread's current device; for graphs of at most `nodes`. Throws
  // kUnsupported where there is no such device.
  GraphDevice(const std::string& device, int threads, size_t nodes);

  // The weights that graphs are to be built of.
  const Weights& weights(const GgufModel& model) const;
  // Memory for a graph's tensors, which is the most that any graph took; inputs are to be filled then. False if there is none.
  bool allocate(ggml_cgraph* graph);
  // Runs what was allocated. Throws kInternal naming `what` if it fails.
  void compute(ggml_cgraph* graph, const char* what);

 private:
  GgmlBackend cuda_, cpu_;
  std::unique_ptr<ggml_backend_sched, Freer<ggml_backend_sched_free>> scheduler_;
};

// A tensor's floats, wherever they are.
void fill(ggml_tensor* t, std::span<const float> values);
std::vector<float> copied(const ggml_tensor* t);

}  // namespace kvmix
