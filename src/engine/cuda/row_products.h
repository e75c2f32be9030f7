// Products of one or two rows with weights of 16 bits, with the norm before and the sum, gate or rotation (RoPE) behind in the
// same launch. A decode step of few sequences waits for little else than its weights, which a launch asks for before the one
// before it has ended.
#pragma once

#include <cuda_runtime.h>
#include <ggml.h>

#include <map>
#include <vector>

namespace kvmix::cuda {

struct LayerNodes;

// At most: rows of x, and their columns, which are a multiple of 8. (Four rows take longer than cuBLAS, three as long.)
constexpr int kRowProductInputs = 2, kRowProductColumns = 16384;

enum class Gate { kNone, kSilu, kGelu };

// `out` [inputs, rows] = x [inputs, columns] `weights`^T [columns, rows] + `added`, numbers of fp32 but for the weights.
struct RowMatrix {
  const void* weights = nullptr;
  const float* added = nullptr;  // [inputs, rows], or [rows] for all inputs; or null; may be `out`
  float* out = nullptr;
  int rows = 0;
  bool one_added = false;  // for all inputs
  // Null, or cosine and sine of every pair of a head [inputs, half]: the sum is turned by them.
  const float2* turns = nullptr;
  int table = -1;  // `turns` before it has its memory: of RowNodes
};

// How heads are turned: RoPE with YaRN (arXiv 2309.00071), and where the cosines and sines are to be.
struct Turns {
  const int* positions = nullptr;  // [inputs]
  const float* factors = nullptr;  // [half], or null: what divides an angle
  float2* table = nullptr;         // [inputs, half]
  int inputs = 0, half = 0;
  float base = 0, scale = 1;         // of angles
  float extrapolated = 0, size = 1;  // the share of angles that are not scaled; what multiplies the numbers
  float low = 0, high = 0;           // pairs from which and up to which that share falls
  bool operator==(const Turns&) const = default;
};

// A row of x is one of `in`, divided by its root mean square and times `norm` where that is not null. With a gate there are two
// matrices of as many rows, and the first one's out = gate(first) * second.
struct RowProduct {
  RowMatrix matrices[2] = {};
  int count = 0, columns = 0, inputs = 1;
  Gate gate = Gate::kNone;
  bool bf16 = false;
  const float *in = nullptr, *norm = nullptr;
  float epsilon = 0;
  int half = 0;      // of heads that are turned: pairs
  bool far = false;  // a pair is `half` apart, else side by side
};

// The nodes of a graph that row products take.
struct RowNodes {
  std::vector<char> taken;             // by node: not ggml's to compute
  std::map<int, RowProduct> launches;  // by the node in whose place
  std::vector<Turns> turns;

  size_t table_bytes() const;
  void place_tables(void* memory);  // of so many bytes
};

// Whether the current device can: compute capability 9.0.
bool has_row_products();
// Those of a graph whose memory is allocated. Where a layer's keys and values are complete they are stored beside what follows.
RowNodes find_row_products(ggml_cgraph* graph, const std::vector<LayerNodes>& layers);
// Fills a table for the positions of a step; before the products.
void queue_turns(const Turns& turns, cudaStream_t stream);
void queue_row_product(const RowProduct& product, cudaStream_t stream);

}  // namespace kvmix::cuda
