// Products of up to four rows with weights of 16 bits, with the norm before and the sum or gate behind in the same launch. A
// decode step of few sequences waits for little else than its weights, which a launch asks for before the one before it has
// ended.
#pragma once

#include <cuda_runtime.h>
#include <ggml.h>

#include <map>
#include <vector>

namespace kvmix::cuda {

// At most: rows of x, their columns, which are a multiple of 8, and both together, columns counted in whole units.
constexpr int kRowProductInputs = 4, kRowProductColumns = 16384, kRowProductUnit = 4096, kRowProductNumbers = 32768;

enum class Gate { kNone, kSilu, kGelu };

// `out` [inputs, rows] = x [inputs, columns] `weights`^T [columns, rows] + `added`, numbers of fp32 but for the weights.
struct RowMatrix {
  const void* weights = nullptr;
  const float* added = nullptr;  // [inputs, rows], or [rows] for all inputs; or null; may be `out`
  float* out = nullptr;
  int rows = 0;
  bool one_added = false;  // for all inputs
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
};

// The nodes of a graph that row products take.
struct RowNodes {
  std::vector<char> taken;             // by node: not ggml's to compute
  std::map<int, RowProduct> launches;  // by the node in whose place
};

// Whether the current device can: compute capability 9.0.
bool has_row_products();
// Those of a graph whose memory is allocated. `ends`: nodes behind which others than ggml read what is there, in order.
RowNodes find_row_products(const ggml_cgraph* graph, const std::vector<int>& ends);
void queue_row_product(const RowProduct& product, cudaStream_t stream);

}  // namespace kvmix::cuda
