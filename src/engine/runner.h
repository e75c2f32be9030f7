// What runs a step's graph on one device: the weights there, its memory, and the cache's operations between the model's. One
// file per device: cpu_runner.cc, cuda/cuda_runner.cc.
#pragma once

#include <ggml-alloc.h>

#include <cstddef>
#include <iterator>
#include <list>
#include <memory>
#include <span>

#include "engine/latents.h"
#include "engine/model.h"

namespace kvmix {

// The rows of a step, all sequences one after the other.
struct StepRows {
  std::span<const Token> tokens, positions;
  std::span<const Token> wanted;  // rows whose logits are wanted
};

// Numbers came up that are NaN or infinite: `where` in the model.
struct NotFinite {
  std::string where;
};

class Runner {
 public:
  virtual ~Runner() = default;
  // Sets what the cache must know of the device.
  virtual void configure(CacheConfig& config) const = 0;
  // Makes room for a step. Throws kOutOfMemory.
  virtual void prepare(int64_t tokens, int64_t wanted) = 0;
  // Runs the step that is open in the cache and was prepared; logits of the wanted rows [wanted][vocab], valid until the next
  // step. Throws NotFinite.
  virtual std::span<const float> run(Cache& cache, const StepRows& rows) = 0;
  // How long the host waited for the device, of all runs.
  virtual double wait_seconds() const { return 0; }
};

// `latents`: by layer, of a plan that stores such; else empty.
std::unique_ptr<Runner> make_cpu_runner(const GgufModel& model, int threads, const std::vector<LayerLatents>& latents);
// On the calling thread's current CUDA device. Throws kUnsupported where there is none, kOutOfMemory where the weights do not
// fit.
std::unique_ptr<Runner> make_cuda_runner(const GgufModel& model);

// ggml's own backend on the calling thread's current CUDA device. Throws kUnsupported where there is none.
using GgmlBackend = std::unique_ptr<ggml_backend, Freer<ggml_backend_free>>;
GgmlBackend make_cuda_backend();

// A graph for a number of tokens and logit rows.
struct StepGraph {
  using Allocator = std::unique_ptr<ggml_gallocr, Freer<ggml_gallocr_free>>;

  // Of a step with these weights, in memory of this type. Throws kOutOfMemory.
  StepGraph(const GgufModel& model, const Weights& weights, int64_t tokens, int64_t wanted, GraphHooks& hooks,
            ggml_backend_buffer_type_t memory);

  int64_t tokens_n, wanted_n;
  GgmlContext context;
  Allocator allocator;
  ggml_cgraph* graph = nullptr;
  GraphInputs inputs{};
  ggml_tensor* logits = nullptr;  // null when none are wanted
};

// The graph of that shape, from those kept or made; the least recently used one beyond `most` goes.
template <class Graph, class Make>
Graph& recent_graph(std::list<Graph>& graphs, size_t most, int64_t tokens, int64_t wanted, const Make& make) {
  for (auto it = graphs.begin(); it != graphs.end(); ++it) {
    if (it->tokens_n == tokens && it->wanted_n == wanted) {
      graphs.splice(graphs.begin(), graphs, it);
      return graphs.front();
    }
  }
  if (graphs.size() == most) graphs.pop_back();
  make(graphs);
  return graphs.front();
}

}  // namespace kvmix
