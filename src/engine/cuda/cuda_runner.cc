// A step on a CUDA device. The graph is cut at the nodes that stand for attention, and where a layer has its keys and values,
// which are stored while it computes its queries: ggml queues the runs of nodes between, the cache its own launches; products
// with 16-bit weights go to cuBLAS (products.h), of one or two rows to kernels of ours (row_products.h). Of a decode step all
// of it is captured in a CUDA graph, with the copies of tokens to the device and of logits from it, and launched again by each
// later step that launches the same (Cache::launch_key). The host waits once a step, for the logits.
#include <cuda_runtime.h>
#include <ggml-cuda.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "backend/cuda/device.h"
#include "backend/cuda/memory.h"
#include "base/cuda/launch.h"
#include "engine/cuda/device_weights.h"
#include "engine/cuda/finite.h"
#include "engine/cuda/ggml_inside.h"
#include "engine/cuda/layer_nodes.h"
#include "engine/cuda/products.h"
#include "engine/cuda/row_products.h"
#include "engine/library_call.h"
#include "engine/runner.h"
#include "kvmix/error.h"

namespace kvmix::cuda {
namespace {

constexpr size_t kCachedGraphs = 4;
constexpr size_t kCapturedSteps = 4;  // of a graph: work lists of other lengths, mostly
constexpr size_t kQueuedKeys = 4;

class Captured {
 public:
  Captured(uint64_t key, cudaGraphExec_t graph) : key_(key), graph_(graph) {}
  Captured(Captured&& other) noexcept : key_(other.key_), graph_(std::exchange(other.graph_, nullptr)) {}
  Captured& operator=(Captured&& other) noexcept {
    std::swap(key_, other.key_);
    std::swap(graph_, other.graph_);
    return *this;
  }
  ~Captured() {
    if (graph_ != nullptr) static_cast<void>(cudaGraphExecDestroy(graph_));
  }
  uint64_t key() const { return key_; }
  void launch(cudaStream_t stream) const { check_cuda(cudaGraphLaunch(graph_, stream), "launch of a captured step"); }
  // Becomes what was captured now; false where the two differ in more than numbers.
  bool update(uint64_t key, cudaGraph_t captured) {
    cudaGraphExecUpdateResultInfo info{};
    if (cudaGraphExecUpdate(graph_, captured, &info) != cudaSuccess) {
      static_cast<void>(cudaGetLastError());
      return false;
    }
    key_ = key;
    return true;
  }

 private:
  uint64_t key_;
  cudaGraphExec_t graph_;
};

struct CudaGraph : StepGraph {
  using StepGraph::StepGraph;
  std::vector<LayerNodes> layers = {};
  size_t product_bytes = 0;  // that rows of its products take (Products)
  RowNodes row_nodes = {};
  DeviceMemory turns = {};
  std::list<Captured> captured = {};  // most recently used first
  std::list<uint64_t> queued = {};    // keys of steps that were not captured, likewise
};

class CudaRunner final : public Runner {
 public:
  explicit CudaRunner(const GgufModel& model)
      : model_(model),
        device_(present_device()),
        backend_(make_cuda_backend()),
        stream_(stream_of(backend_.get())),
        products_(stream_),
        row_products_(has_row_products()),
        weights_(DeviceWeights::of(model)) {
    flag_.reserve(sizeof(int), "flag of a step");
  }
  ~CudaRunner() override { static_cast<void>(cudaStreamSynchronize(stream_)); }

  void configure(CacheConfig& config) const override {
    config.stream = stream_;
    config.device_rows = true;
    config.append_beside = true;
  }

  void prepare(int64_t tokens, int64_t wanted) override {
    const LibraryCall call;
    check_cuda(cudaSetDevice(device_), "device");
    graph_ = &recent_graph(graphs_, kCachedGraphs, tokens, wanted, [&](std::list<CudaGraph>& graphs) {
      Markers markers;
      graphs.emplace_front(model_, weights_->weights(), tokens, wanted, markers, ggml_backend_cuda_buffer_type(device_));
      look_at_nodes(graphs.front());
    });
    const bool moved = inputs_.reserve(static_cast<size_t>(2 * tokens + wanted) * sizeof(Token), "pinned memory of tokens") |
                       results_.reserve(sizeof(int) + logit_bytes(*graph_), "pinned memory of logits") |
                       products_.reserve(graph_->product_bytes);
    if (moved) {  // captured copies are of the memory before
      for (CudaGraph& graph : graphs_) graph.captured.clear();
    }
  }

  std::span<const float> run(Cache& cache, const StepRows& rows) override {
    const LibraryCall call;
    check_cuda(cudaSetDevice(device_), "device");
    Token* to = std::copy(rows.tokens.begin(), rows.tokens.end(), inputs_.data<Token>());
    to = std::copy(rows.positions.begin(), rows.positions.end(), to);
    std::copy(rows.wanted.begin(), rows.wanted.end(), to);

    const uint64_t key = cache.launch_key();
    if (key == 0 || is_new(key)) {
      queue(cache);
    } else {
      captured(cache, key).launch(stream_);
    }
    const auto queued = std::chrono::steady_clock::now();
    check_cuda(cudaStreamSynchronize(stream_), "a step on the device");
    wait_seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - queued).count();
    if (const int mark = *results_.data<int>(); mark != 0) {
      throw NotFinite{mark == 1 ? "the keys of layer " + std::to_string(model_.parameters().layers - 1) : "the logits"};
    }
    if (graph_->logits == nullptr) return {};
    return {results_.data<float>() + 1, logit_bytes(*graph_) / sizeof(float)};
  }

  double wait_seconds() const override { return wait_seconds_; }

 private:
  static int present_device() {
    check_device();
    return current_device();
  }

  static size_t logit_bytes(const StepGraph& graph) { return graph.logits == nullptr ? 0 : ggml_nbytes(graph.logits); }

  void look_at_nodes(CudaGraph& graph) const {
    ggml_backend_dev_t device = ggml_backend_get_device(backend_.get());
    for (int i = 0; i < ggml_graph_n_nodes(graph.graph); ++i) {
      const ggml_tensor* node = ggml_graph_node(graph.graph, i);
      graph.product_bytes = std::max(graph.product_bytes, Products::input_bytes(node));
      if (node->op == GGML_OP_CUSTOM || ggml_backend_dev_supports_op(device, node)) continue;
      std::string weight;
      if (node->src[0] != nullptr)
        weight = std::string(" with ") + ggml_get_name(node->src[0]) + " of type " + ggml_type_name(node->src[0]->type);
      throw Error(Status::kUnsupported, model_.path() + ": ggml has no CUDA code for " + ggml_op_desc(node) + weight +
                                            "; convert the model to another type, or take the device \"cpu\"");
    }
    graph.layers = layers_of(graph.graph);
    graph.row_nodes.taken.resize(static_cast<size_t>(ggml_graph_n_nodes(graph.graph)));
    if (!row_products_) return;
    graph.row_nodes = find_row_products(graph.graph, graph.layers);
    graph.turns.reserve(graph.row_nodes.table_bytes(), "rotations of heads");
    graph.row_nodes.place_tables(graph.turns.data());
  }

  // Everything of a step, on the stream.
  void queue(Cache& cache) {
    const CudaGraph& g = *graph_;
    const Token* from = inputs_.data<Token>();
    for (ggml_tensor* input : {g.inputs.tokens, g.inputs.positions, g.inputs.rows}) {
      if (input == nullptr) continue;
      check_cuda(cudaMemcpyAsync(input->data, from, ggml_nbytes(input), cudaMemcpyHostToDevice, stream_), "tokens of a step");
      from += ggml_nelements(input);
    }
    int* const flag = reinterpret_cast<int*>(flag_.data());
    check_cuda(cudaMemsetAsync(flag, 0, sizeof(int), stream_), "flag of a step");
    for (const Turns& turns : g.row_nodes.turns) queue_turns(turns, stream_);
    const int nodes = ggml_graph_n_nodes(g.graph);
    products_.begin();
    const auto numbers = [](const ggml_tensor* t) { return static_cast<const float*>(t->data); };
    const auto row = [](const ggml_tensor* t) { return t->ne[0] * t->ne[1]; };
    auto layer = g.layers.begin();
    int begin = 0;
    for (int i = 0; i < nodes; ++i) {
      const ggml_tensor* node = ggml_graph_node(g.graph, i);
      const bool row_product = g.row_nodes.taken[static_cast<size_t>(i)] != 0;
      const bool product = !row_product && Products::input_bytes(node) > 0, attends = node->op == GGML_OP_CUSTOM;
      const bool stores = layer != g.layers.end() && i == layer->stored_at;
      if (!product && !row_product && !attends && !stores) continue;
      const bool ours = product || row_product || attends;
      queue_nodes(backend_.get(), g.graph, begin, ours ? i : i + 1);
      begin = i + 1;
      if (product) products_.queue(node);
      if (const auto launch = g.row_nodes.launches.find(i); launch != g.row_nodes.launches.end()) {
        queue_row_product(launch->second, stream_);
      }
      if (!stores && !attends) continue;
      const int l = static_cast<int>(layer - g.layers.begin());
      const ggml_tensor *k = layer->keys(), *v = layer->values(), *q = layer->queries();
      if (stores) cache.append(l, numbers(k), row(k), numbers(v), row(v), 0, 1);
      if (!attends) continue;
      cache.attend(l, numbers(q), row(q), static_cast<float*>(node->data), node->ne[0], 0, 1);
      // What is not finite in a layer makes all that follows so: the last one shows it.
      if (++layer == g.layers.end()) mark_not_finite(numbers(k), static_cast<size_t>(ggml_nelements(k)), 1, flag, stream_);
    }
    queue_nodes(backend_.get(), g.graph, begin, nodes);
    if (g.logits != nullptr) {
      const auto n = static_cast<size_t>(ggml_nelements(g.logits));
      mark_not_finite(static_cast<const float*>(g.logits->data), n, 2, flag, stream_);
      check_cuda(
          cudaMemcpyAsync(results_.data<float>() + 1, g.logits->data, n * sizeof(float), cudaMemcpyDeviceToHost, stream_),
          "logits of a step");
    }
    check_cuda(cudaMemcpyAsync(results_.data<int>(), flag, sizeof(int), cudaMemcpyDeviceToHost, stream_), "flag of a step");
  }

  // Capturing costs as much as a few steps, so a step that is like none before is queued: those that seal may come once a page,
  // and libraries have then what they allocate at first.
  bool is_new(uint64_t key) {
    std::list<uint64_t>& queued = graph_->queued;
    if (std::erase(queued, key) > 0) return false;
    if (std::any_of(graph_->captured.begin(), graph_->captured.end(), [&](const Captured& c) { return c.key() == key; }))
      return false;
    queued.push_front(key);
    if (queued.size() > kQueuedKeys) queued.pop_back();
    return true;
  }

  const Captured& captured(Cache& cache, uint64_t key) {
    std::list<Captured>& steps = graph_->captured;
    const auto known = std::find_if(steps.begin(), steps.end(), [&](const Captured& c) { return c.key() == key; });
    if (known != steps.end()) {
      steps.splice(steps.begin(), steps, known);
      return steps.front();
    }
    struct Graph {
      cudaGraph_t graph = nullptr;
      ~Graph() {
        if (graph != nullptr) static_cast<void>(cudaGraphDestroy(graph));
      }
    } made;
    check_cuda(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeRelaxed), "capture of a step");
    try {
      queue(cache);
    } catch (...) {
      static_cast<void>(cudaStreamEndCapture(stream_, &made.graph));
      throw;
    }
    check_cuda(cudaStreamEndCapture(stream_, &made.graph), "capture of a step");
    if (steps.size() == kCapturedSteps) {
      steps.splice(steps.begin(), steps, std::prev(steps.end()));
      if (steps.front().update(key, made.graph)) return steps.front();
      steps.pop_front();
    }
    cudaGraphExec_t graph = nullptr;
    // Rows are stored first where the device has too much to do: else queries would be done before it begins.
    check_cuda(cudaGraphInstantiate(&graph, made.graph, cudaGraphInstantiateFlagUseNodePriority), "a captured step");
    steps.emplace_front(key, graph);
    return steps.front();
  }

  const GgufModel& model_;
  int device_;
  GgmlBackend backend_;
  cudaStream_t stream_;
  Products products_;
  bool row_products_;
  std::shared_ptr<const DeviceWeights> weights_;
  DeviceMemory flag_;
  PinnedMemory inputs_, results_;  // results: the flag, then logits
  std::list<CudaGraph> graphs_;
  CudaGraph* graph_ = nullptr;  // the prepared one
  double wait_seconds_ = 0;
};

}  // namespace
}  // namespace kvmix::cuda

namespace kvmix {

std::unique_ptr<Runner> make_cuda_runner(const GgufModel& model) { return std::make_unique<cuda::CudaRunner>(model); }

GgmlBackend make_cuda_backend() {
  cuda::check_device();
  const LibraryCall call;
  GgmlBackend backend(ggml_backend_cuda_init(cuda::current_device()));
  if (backend == nullptr)
    throw Error(Status::kUnsupported, "device \"cuda\": " + call.reason("ggml gives no reason; free device memory"));
  return backend;
}

}  // namespace kvmix
