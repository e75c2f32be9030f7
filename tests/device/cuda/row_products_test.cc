// Products of few rows (engine/cuda/row_products.h): numbers against double precision, and which nodes of models they take.
#include "engine/cuda/row_products.h"

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "engine/cuda/layer_nodes.h"
#include "engine/runner.h"
#include "support/devices.h"
#include "support/tiny_model.h"

namespace kvmix::cuda {
namespace {

struct Found {
  int products = 0, left = 0;                        // of matrices, and those that are left to others
  int launches = 0, norms = 0, sums = 0, gates = 0;  // launches in all, and with these
  int turned = 0, tables = 0;                        // likewise with rotations, and their tables
};

Found found_in(const testing::TinyModel& tiny, int64_t tokens) {
  testing::TemporaryFolder folder("kvmix-rows");
  testing::write_tiny_model(tiny, folder.file("model.gguf"));
  const GgufModel model(folder.file("model.gguf"));
  Markers markers;
  const StepGraph graph(model, model.stored_weights(), tokens, tokens, markers, ggml_backend_cpu_buffer_type());
  const RowNodes rows = find_row_products(graph.graph, layers_of(graph.graph));
  const int nodes = ggml_graph_n_nodes(graph.graph);
  Found found;
  found.tables = static_cast<int>(rows.turns.size());
  for (int i = 0; i < nodes; ++i) {
    if (ggml_graph_node(graph.graph, i)->op != GGML_OP_MUL_MAT) continue;
    ++found.products;
    found.left += rows.taken[static_cast<size_t>(i)] == 0 ? 1 : 0;
  }
  for (const auto& [at, product] : rows.launches) {
    ++found.launches;
    found.norms += product.norm != nullptr ? 1 : 0;
    found.gates += product.gate != Gate::kNone ? 1 : 0;
    found.turned += product.half > 0 ? 1 : 0;
    found.sums += product.matrices[0].added != nullptr ? 1 : 0;
  }
  return found;
}

testing::TinyModel with_matrices(testing::TinyModel tiny, const char* type) {
  tiny.matrices = type;
  return tiny;
}

// Of a layer: values with keys that are turned, queries that are, the output with the sum, both feed-forward matrices with the
// gate, the last with the sum; and the model's head.
TEST(RowProducts, TakeALayerInFiveLaunches) {
  for (const char* type : {"f16", "bf16"}) {
    for (const int64_t tokens : {1, 2}) {
      const Found f = found_in(with_matrices({.architecture = "llama", .output_head = true}, type), tokens);
      EXPECT_EQ(f.products, 3 * 7 + 1);
      EXPECT_EQ(f.left, 0);
      EXPECT_EQ(f.launches, 3 * 5 + 1);
      EXPECT_EQ(f.norms, 3 * 3 + 1);
      EXPECT_EQ(f.sums, 3 * 2);
      EXPECT_EQ(f.gates, 3);
      EXPECT_EQ(f.turned, 3 * 2);
      EXPECT_EQ(f.tables, 1);
    }
  }
  EXPECT_EQ(found_in(with_matrices({.architecture = "llama"}, "f16"), 3).launches, 0);
  EXPECT_EQ(found_in({.architecture = "llama"}, 1).launches, 0) << "fp32";
}

TEST(RowProducts, TakeEveryProductOfEveryArchitecture) {
  for (const testing::TinyModel& tiny : testing::tiny_models()) {
    const Found f = found_in(with_matrices(tiny, "f16"), 1);
    EXPECT_EQ(f.left, 0) << testing::tiny_name(tiny);
    EXPECT_GT(f.norms, f.products / 3) << testing::tiny_name(tiny);
    EXPECT_EQ(f.turned, tiny.qk_norm ? 0 : 2 * tiny.layers) << testing::tiny_name(tiny);  // norms stand between
    EXPECT_EQ(f.gates, tiny.ffn_bias ? 0 : tiny.layers) << testing::tiny_name(tiny);      // a bias stands between
  }
}

struct Case {
  int columns, rows, second, inputs;  // second: rows of a second matrix
  Gate gate = Gate::kNone;
  bool norm = false, added = false, one_added = false, bf16 = false;
  int half = 0;  // of heads that are turned, of the second matrix where there is one
  bool far = false, yarn = false;
};

class DeviceNumbers {
 public:
  explicit DeviceNumbers(const std::vector<float>& from) : DeviceNumbers(from.data(), from.size() * sizeof(float)) {}
  DeviceNumbers(const void* from, size_t bytes) {
    EXPECT_EQ(cudaMalloc(&data_, bytes), cudaSuccess);
    EXPECT_EQ(cudaMemcpy(data_, from, bytes, cudaMemcpyHostToDevice), cudaSuccess);
  }
  DeviceNumbers(const DeviceNumbers&) = delete;
  DeviceNumbers& operator=(const DeviceNumbers&) = delete;
  ~DeviceNumbers() { static_cast<void>(cudaFree(data_)); }
  float* get() const { return static_cast<float*>(data_); }
  std::vector<float> read(size_t n) const {
    std::vector<float> to(n);
    EXPECT_EQ(cudaMemcpy(to.data(), data_, n * sizeof(float), cudaMemcpyDeviceToHost), cudaSuccess);
    return to;
  }

 private:
  void* data_ = nullptr;
};

class Numbers {
 public:
  std::vector<float> draw(size_t n, float scale) {
    std::vector<float> to(n);
    for (float& x : to) x = scale * normal_(random_);
    return to;
  }

 private:
  std::mt19937 random_{11};
  std::normal_distribution<float> normal_;
};

double gated(Gate gate, double x) {
  if (gate == Gate::kSilu) return x / (1 + std::exp(-x));
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * x * (1 + 0.044715 * x * x)));
}

// Angle and size of a pair, by the formula of YaRN (arXiv 2309.00071, section 3) as ggml has it.
std::pair<double, double> turn_of(const Turns& t, int position, float factor, int pair) {
  const double whole =
      position * std::pow(static_cast<double>(t.base), -static_cast<double>(pair) / t.half) / static_cast<double>(factor);
  const double scaled = static_cast<double>(t.scale) * whole;
  if (t.extrapolated == 0) return {scaled, t.size};
  const double along = (pair - static_cast<double>(t.low)) / static_cast<double>(t.high - t.low);
  const double share = (1 - std::clamp(along, 0.0, 1.0)) * static_cast<double>(t.extrapolated);
  return {scaled * (1 - share) + whole * share,
          static_cast<double>(t.size) * (1 + 0.1 * std::log(1 / static_cast<double>(t.scale)))};
}

void expect_numbers(const Case& c) {
  Numbers numbers;
  const auto columns = static_cast<size_t>(c.columns);
  const float small = 1.0f / std::sqrt(static_cast<float>(c.columns));
  const ggml_type type = c.bf16 ? GGML_TYPE_BF16 : GGML_TYPE_F16;
  const std::vector<float> x = numbers.draw(columns * static_cast<size_t>(c.inputs), 3), norm = numbers.draw(columns, 1);
  RowProduct product;
  product.columns = c.columns, product.inputs = c.inputs, product.gate = c.gate, product.bf16 = c.bf16;
  product.count = c.second > 0 ? 2 : 1, product.epsilon = 1e-5f;
  const DeviceNumbers device_x(x), device_norm(norm);
  product.in = device_x.get();
  if (c.norm) product.norm = device_norm.get();
  std::vector<std::unique_ptr<DeviceNumbers>> weights, added, out;
  const int positions[] = {1234, 3};
  std::vector<float> factors = numbers.draw(static_cast<size_t>(std::max(c.half, 1)), 0.1f);
  for (float& f : factors) f += 2;
  const DeviceNumbers device_positions(positions, sizeof positions), device_factors(factors);
  const DeviceNumbers table(std::vector<float>(static_cast<size_t>(4 * std::max(c.half, 1)), NAN));
  Turns turns;
  turns.positions = reinterpret_cast<const int*>(device_positions.get()), turns.factors = device_factors.get();
  turns.table = reinterpret_cast<float2*>(table.get()), turns.inputs = c.inputs, turns.half = c.half, turns.base = 20000;
  if (c.yarn) turns.scale = 0.25f, turns.extrapolated = 0.8f, turns.size = 1.1f, turns.low = 3, turns.high = 17;
  product.half = c.half, product.far = c.far;
  std::vector<std::vector<double>> expected(2);
  for (int m = 0; m < product.count; ++m) {
    const auto rows = static_cast<size_t>(m == 0 ? c.rows : c.second), n = static_cast<size_t>(c.inputs) * rows;
    const std::vector<float> exact = numbers.draw(rows * columns, small), sum = numbers.draw(n, 1);
    std::vector<uint16_t> halves(exact.size());
    std::vector<float> rounded(exact.size());
    ggml_get_type_traits(type)->from_float_ref(exact.data(), halves.data(), static_cast<int64_t>(exact.size()));
    ggml_get_type_traits(type)->to_float(halves.data(), rounded.data(), static_cast<int64_t>(exact.size()));
    weights.push_back(std::make_unique<DeviceNumbers>(halves.data(), halves.size() * sizeof(uint16_t)));
    added.push_back(std::make_unique<DeviceNumbers>(sum));
    out.push_back(std::make_unique<DeviceNumbers>(std::vector<float>(n, NAN)));
    product.matrices[m] = {weights.back()->get(), c.added ? added.back()->get() : nullptr, out.back()->get(),
                           static_cast<int>(rows), c.one_added};
    const bool turned = c.half > 0 && m == product.count - 1;
    if (turned) product.matrices[m].turns = turns.table;
    for (size_t i = 0; i < static_cast<size_t>(c.inputs); ++i) {
      double energy = 0;
      for (size_t k = 0; k < columns; ++k) energy += std::pow(static_cast<double>(x[i * columns + k]), 2);
      const double by = c.norm ? 1 / std::sqrt(energy / c.columns + 1e-5) : 1;
      for (size_t r = 0; r < rows; ++r) {
        double y = 0;
        for (size_t k = 0; k < columns; ++k) {
          y += static_cast<double>(rounded[r * columns + k]) * static_cast<double>(x[i * columns + k]) *
               (c.norm ? static_cast<double>(norm[k]) : 1.0);
        }
        const double more = c.added ? static_cast<double>(sum[c.one_added ? r : i * rows + r]) : 0.0;
        expected[static_cast<size_t>(m)].push_back(y * by + more);
      }
      if (!turned) continue;
      const auto half = static_cast<size_t>(c.half);
      for (size_t head = i * rows; head < (i + 1) * rows; head += 2 * half) {
        for (size_t pair = 0; pair < half; ++pair) {
          double& a = expected[static_cast<size_t>(m)][head + (c.far ? pair : 2 * pair)];
          double& b = expected[static_cast<size_t>(m)][head + (c.far ? half + pair : 2 * pair + 1)];
          const auto [angle, size] = turn_of(turns, positions[i], factors[pair], static_cast<int>(pair));
          const double x0 = a * size, x1 = b * size;
          a = x0 * std::cos(angle) - x1 * std::sin(angle), b = x0 * std::sin(angle) + x1 * std::cos(angle);
        }
      }
    }
  }
  if (c.half > 0) queue_turns(turns, nullptr);
  queue_row_product(product, nullptr);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  const std::string what = std::to_string(c.columns) + " columns, " + std::to_string(c.inputs) + " inputs";
  for (int m = 0; m < (c.gate == Gate::kNone ? product.count : 1); ++m) {
    const auto& right = expected[static_cast<size_t>(m)];
    const std::vector<float> got = out[static_cast<size_t>(m)]->read(right.size());
    for (size_t i = 0; i < right.size(); ++i) {
      const double y = c.gate == Gate::kNone ? right[i] : gated(c.gate, right[i]) * expected[1][i];
      // An angle of fp32 is off by a ten-thousandth where positions are large.
      const double most = (c.half > 0 ? 1e-3 : 2e-5) * (1 + std::abs(y));
      ASSERT_NEAR(static_cast<double>(got[i]), y, most) << what << ", matrix " << m << ", number " << i;
    }
  }
}

TEST(RowProducts, AreWhatDoublePrecisionSays) {
  if (!testing::has_device("cuda")) return;
  if (!has_row_products()) GTEST_SKIP() << "compute capability below 9.0";
  for (const int columns : {8, 72, 128, 576, 4096, 4104, 8192, 8200, 11008, 16384}) {
    for (const int inputs : {1, 2}) {
      const int many = columns <= 576 ? 6000 : 600;
      expect_numbers({columns, 1, 0, inputs});
      expect_numbers({columns, 1000, 700, inputs, Gate::kNone, true});
      expect_numbers({columns, 300, 0, inputs, Gate::kNone, false, true});
      expect_numbers({columns, 131, 133, inputs, Gate::kNone, true, true, true, true});
      expect_numbers({columns, many, many, inputs, Gate::kSilu, true});
      expect_numbers({columns, 77, 77, inputs, Gate::kGelu, true, false, false, true});
      expect_numbers({columns, 256, 0, inputs, Gate::kNone, true, false, false, false, 64, true});
      expect_numbers({columns, 130, 640, inputs, Gate::kNone, true, true, true, true, 32, false, true});
      expect_numbers({columns, 96, 288, inputs, Gate::kNone, true, true, true, false, 48, true, true});
    }
  }
}

}  // namespace
}  // namespace kvmix::cuda
