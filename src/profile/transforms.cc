#include "profile/transforms.h"

#include <algorithm>
#include <cmath>

#include "base/fp16.h"
#include "base/parallel.h"
#include "plan/planner.h"
#include "rows/mpo.h"
#include "rows/row_map.h"

namespace kvmix {
namespace {

// Added to the diagonal, relative to its mean: directions that calibration saw little of are not for free.
constexpr double kRidge = 0.03;

using Matrix = std::vector<double>;  // [dim][dim]

// Adds x^T x over rows [n][dim].
void add_second_moment(const float* rows, int64_t n, int dim, Matrix& sum) {
  const auto d = static_cast<size_t>(dim);
  for (int64_t t = 0; t < n; ++t) {
    const float* x = rows + t * dim;
    for (size_t i = 0; i < d; ++i) {
      const double xi = static_cast<double>(x[i]);
      for (size_t j = 0; j <= i; ++j) sum[i * d + j] += xi * static_cast<double>(x[j]);
    }
  }
  for (size_t i = 0; i < d; ++i) {
    for (size_t j = 0; j < i; ++j) sum[j * d + i] = sum[i * d + j];
  }
}

// A M A^T for the linear map A that `apply` does to a row in place.
template <class Apply>
Matrix carried(const Matrix& m, int dim, const Apply& apply) {
  const auto d = static_cast<size_t>(dim);
  Matrix half(d * d), out(d * d);
  std::vector<float> row(d);
  for (size_t i = 0; i < d; ++i) {
    for (size_t j = 0; j < d; ++j) row[j] = static_cast<float>(m[i * d + j]);
    apply(row.data());
    for (size_t j = 0; j < d; ++j) half[j * d + i] = static_cast<double>(row[j]);
  }
  for (size_t i = 0; i < d; ++i) {
    for (size_t j = 0; j < d; ++j) row[j] = static_cast<float>(half[i * d + j]);
    apply(row.data());
    for (size_t j = 0; j < d; ++j) out[i * d + j] = static_cast<double>(row[j]);
  }
  return out;
}

// Weights of the errors of earlier channels: column k of U above its diagonal, for every k.
void append_feedback(Matrix m, int dim, std::vector<float>& feedback) {
  const auto d = static_cast<size_t>(dim);
  double trace = 0;
  for (size_t i = 0; i < d; ++i) trace += m[i * d + i];
  const double ridge = kRidge * trace / static_cast<double>(dim) + 1e-30;
  for (size_t i = 0; i < d; ++i) m[i * d + i] += ridge;
  // From the last channel on: what is left above and before column k is divided by its pivot.
  Matrix u(d * d, 0.0);
  for (size_t k = d; k-- > 0;) {
    const double pivot = m[k * d + k];
    for (size_t i = 0; i < k; ++i) u[i * d + k] = m[i * d + k] / pivot;
    for (size_t i = 0; i < k; ++i) {
      for (size_t j = 0; j < k; ++j) m[i * d + j] -= u[i * d + k] * u[j * d + k] * pivot;
    }
  }
  // As a file keeps it, so that what is measured is what will run.
  for (size_t k = 0; k < d; ++k) {
    for (size_t i = 0; i < k; ++i) feedback.push_back(f16_to_f32(f32_to_f16(static_cast<float>(u[i * d + k]))));
  }
}

float as_stored(double scale) { return f16_to_f32(f32_to_f16(static_cast<float>(std::clamp(scale, 1e-3, 1e3)))); }

// W_O^T W_O of the channels of one KV head, summed over its query heads.
void add_output_metric(const GgufModel& model, int layer, int kv_head, int group, int dim, Matrix& sum) {
  const ggml_tensor* w = model.original("blk." + std::to_string(layer) + ".attn_output.weight");
  std::vector<float> row(static_cast<size_t>(w->ne[0]));
  for (int64_t r = 0; r < w->ne[1]; ++r) {
    dequantise_row(w, static_cast<size_t>(r), row.data());
    add_second_moment(row.data() + static_cast<ptrdiff_t>(kv_head) * group * dim, group, dim, sum);
  }
}

}  // namespace

std::vector<float> mean_key(const ModelShape::Layer& shape, const LayerRows& rows, int sinks) {
  const int dim = shape.head_dim, heads = shape.kv_heads;
  const auto n = static_cast<int64_t>(rows.keys.size()) / (heads * dim);
  std::vector<float> mean;
  for (int head = 0; head < heads; ++head) {
    const float* x = rows.keys.data() + static_cast<ptrdiff_t>(head) * n * dim;
    for (int c = 0; c < dim; ++c) {
      double sum = 0;
      for (int64_t i = sinks; i < n; ++i) sum += static_cast<double>(x[i * dim + c]);
      mean.push_back(static_cast<float>(sum / static_cast<double>(n - sinks)));
    }
  }
  return mean;
}

std::vector<Profile::Transform> calibrated_transforms(const GgufModel& model, size_t layer, const LayerRows& rows, int sinks,
                                                      bool mpo, int threads) {
  const ModelShape::Layer& shape = model.shape().layers[layer];
  const int dim = shape.head_dim, group = shape.q_heads / shape.kv_heads;
  const auto n = static_cast<int64_t>(rows.keys.size()) / (shape.kv_heads * dim);
  std::vector<Profile::Transform> transforms;
  for (const Side side : {Side::kKey, Side::kValue}) {
    for (const char* name : {"feedback", "scaled-feedback"}) {
      transforms.push_back({name, static_cast<int>(layer), side, {}});
      transforms.back().spec.hadamard = true;
    }
  }
  take_off_bias(shape, transforms[0].spec);
  // Softmax does not see what all keys share, unless its scores are capped. Of recent rows it takes the room for the rest.
  if (shape.softcap == 0) {
    for (const float x : mean_key(shape, rows, sinks)) transforms[1].spec.center.push_back(f16_to_f32(f32_to_f16(x)));
  }
  std::vector<Matrix> metrics(static_cast<size_t>(2 * shape.kv_heads));
  parallel_for(threads, metrics.size(), [&](size_t at) {
    const auto head = static_cast<int>(at / 2);
    Matrix& metric = metrics[at];
    metric.assign(static_cast<size_t>(dim) * static_cast<size_t>(dim), 0.0);
    if (at % 2 == 1) return add_output_metric(model, static_cast<int>(layer), head, group, dim, metric);
    for (int h = head * group; h < (head + 1) * group; ++h)
      add_second_moment(rows.queries.data() + (static_cast<ptrdiff_t>(h) * n + sinks) * dim, n - sinks, dim, metric);
  });
  for (const Side side : {Side::kKey, Side::kValue}) {
    const bool key = side == Side::kKey;
    std::vector<float>& scales = transforms[key ? 1 : 3].spec.scales;
    for (int head = 0; head < shape.kv_heads; ++head) {
      const Matrix& metric = metrics[static_cast<size_t>(2 * head + (key ? 0 : 1))];
      const float* x = (key ? rows.keys : rows.values).data() + static_cast<ptrdiff_t>(head) * n * dim;
      for (int c = 0; c < dim; ++c) {
        double sum = 0, squares = 0;
        for (int64_t i = sinks; i < n; ++i) {
          const auto v = static_cast<double>(x[i * dim + c]);
          sum += v;
          squares += v * v;
        }
        const double mean = sum / static_cast<double>(n - sinks), energy = squares / static_cast<double>(n - sinks);
        const double weight = metric[static_cast<size_t>(c) * static_cast<size_t>(dim + 1)];
        scales.push_back(as_stored(key ? 1 / std::sqrt(std::max(energy - mean * mean, 1e-12))
                                       : std::pow(weight, 0.125) * std::pow(std::max(energy, 1e-12), -0.375)));
      }
    }
  }
  parallel_for(threads, transforms.size(), [&](size_t t) {
    TransformSpec& spec = transforms[t].spec;
    const RowMapChain maps(spec, {transforms[t].side, shape.kv_heads, dim, shape.softcap}, "calibrated transform");
    std::vector<float> feedback;
    for (int head = 0; head < shape.kv_heads; ++head) {
      // A stored error e' is e' H S^-1 outside, for keys and values: M becomes H S^-1 M S^-1 H, and H S^-1 is what queries go
      // through.
      const Matrix& metric = metrics[static_cast<size_t>(2 * head) + t / 2];
      append_feedback(carried(metric, dim, [&](float* row) { maps.query(head, row); }), dim, feedback);
    }
    spec.feedback = std::move(feedback);
  });
  for (const Side side : {Side::kKey, Side::kValue}) {
    if (!mpo) break;
    std::vector<float> small;
    for (int head = 0; head < shape.kv_heads; ++head) {
      const auto all = std::span(side == Side::kKey ? rows.keys : rows.values).subspan(static_cast<size_t>(head * n * dim));
      const auto behind =
          all.subspan(static_cast<size_t>(sinks) * static_cast<size_t>(dim), static_cast<size_t>((n - sinks) * dim));
      const MpoMatrix made = mpo_factors(std::vector<double>(behind.begin(), behind.end()), dim).small;
      small.insert(small.end(), made.begin(), made.end());
    }
    transforms.push_back({"mpo", static_cast<int>(layer), side, {}});
    transforms.back().spec.more.push_back({"mpo", std::move(small)});
  }
  return transforms;
}

}  // namespace kvmix
