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

// Adds x^T x over rows [n][dim], one after the other, a few while a sum is at hand.
void add_second_moment(const float* rows, int64_t n, int dim, Matrix& sum) {
  constexpr size_t kTogether = 4;
  const auto d = static_cast<size_t>(dim), count = static_cast<size_t>(n);
  std::vector<double> x(kTogether * d);
  for (size_t t = 0; t < count; t += kTogether) {
    const size_t some = std::min(kTogether, count - t);
    std::copy_n(rows + t * d, some * d, x.begin());
    std::fill(x.begin() + static_cast<ptrdiff_t>(some * d), x.end(), 0.0);
    for (size_t i = 0; i < d; ++i) {
      for (size_t j = 0; j <= i; ++j) {
        double& s = sum[i * d + j];
        s = s + x[i] * x[j] + x[d + i] * x[d + j] + x[2 * d + i] * x[2 * d + j] + x[3 * d + i] * x[3 * d + j];
      }
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
void set_feedback(Matrix m, int dim, float* feedback) {
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
    for (size_t i = 0; i < k; ++i) *feedback++ = f16_to_f32(f32_to_f16(static_cast<float>(u[i * d + k])));
  }
}

float as_stored(double scale) { return f16_to_f32(f32_to_f16(static_cast<float>(std::clamp(scale, 1e-3, 1e3)))); }

// W_O^T W_O of the channels of one KV head, summed over its query heads.
void add_output_metric(const GgufModel& model, int layer, int kv_head, int group, int dim, Matrix& sum) {
  const ggml_tensor* w = model.original("blk." + std::to_string(layer) + ".attn_output.weight");
  const auto columns = static_cast<ptrdiff_t>(group) * dim;
  constexpr int64_t kTogether = 64;
  std::vector<float> part(static_cast<size_t>(kTogether * columns));
  for (int64_t first = 0; first < w->ne[1]; first += kTogether) {
    const int64_t rows = std::min(kTogether, w->ne[1] - first);
    for (int64_t r = 0; r < rows; ++r)
      dequantise_part(w, static_cast<size_t>(first + r), kv_head * columns, columns, part.data() + r * columns);
    add_second_moment(part.data(), rows * group, dim, sum);
  }
}

// Sums over rows [n][dim], and of their squares, channel by channel.
struct Sums {
  std::vector<double> all, squares;
};
Sums sums_of(const float* rows, int64_t n, int dim) {
  Sums sums{std::vector<double>(static_cast<size_t>(dim)), std::vector<double>(static_cast<size_t>(dim))};
  for (int64_t t = 0; t < n; ++t) {
    for (size_t c = 0; c < static_cast<size_t>(dim); ++c) {
      const auto v = static_cast<double>(rows[t * dim + static_cast<int64_t>(c)]);
      sums.all[c] += v;
      sums.squares[c] += v * v;
    }
  }
  return sums;
}

}  // namespace

std::vector<float> mean_key(const ModelShape::Layer& shape, const LayerRows& rows, int sinks, int threads) {
  const auto dim = static_cast<size_t>(shape.head_dim), heads = static_cast<size_t>(shape.kv_heads);
  const auto n = static_cast<int64_t>(rows.keys.size() / (heads * dim));
  std::vector<float> mean(heads * dim);
  parallel_for(threads, heads, [&](size_t head) {
    const float* keys = rows.keys.data() + (static_cast<ptrdiff_t>(head) * n + sinks) * shape.head_dim;
    const Sums sums = sums_of(keys, n - sinks, shape.head_dim);
    for (size_t c = 0; c < dim; ++c) mean[head * dim + c] = static_cast<float>(sums.all[c] / static_cast<double>(n - sinks));
  });
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
    for (const float x : mean_key(shape, rows, sinks, threads)) transforms[1].spec.center.push_back(f16_to_f32(f32_to_f16(x)));
  }
  const auto heads = static_cast<size_t>(shape.kv_heads), channels = static_cast<size_t>(dim);
  for (const size_t t : {1, 3}) transforms[t].spec.scales.resize(heads * channels);
  std::vector<Matrix> metrics(2 * heads);
  parallel_for(threads, metrics.size(), [&](size_t at) {
    const auto head = static_cast<int>(at / 2);
    const bool key = at % 2 == 0;
    Matrix& metric = metrics[at];
    metric.assign(channels * channels, 0.0);
    if (!key) add_output_metric(model, static_cast<int>(layer), head, group, dim, metric);
    for (int h = head * group; key && h < (head + 1) * group; ++h)
      add_second_moment(rows.queries.data() + (static_cast<ptrdiff_t>(h) * n + sinks) * dim, n - sinks, dim, metric);
    const float* x = (key ? rows.keys : rows.values).data() + (static_cast<ptrdiff_t>(head) * n + sinks) * dim;
    const Sums sums = sums_of(x, n - sinks, dim);
    for (size_t c = 0; c < channels; ++c) {
      const double mean = sums.all[c] / static_cast<double>(n - sinks),
                   energy = sums.squares[c] / static_cast<double>(n - sinks);
      const double weight = metric[c * (channels + 1)];
      transforms[key ? 1 : 3].spec.scales[at / 2 * channels + c] =
          as_stored(key ? 1 / std::sqrt(std::max(energy - mean * mean, 1e-12))
                        : std::pow(weight, 0.125) * std::pow(std::max(energy, 1e-12), -0.375));
    }
  });
  std::vector<RowMapChain> maps;
  for (const Profile::Transform& t : transforms)
    maps.emplace_back(t.spec, RowShape{t.side, shape.kv_heads, dim, shape.softcap}, "calibrated transform");
  const size_t weights = channels * (channels - 1) / 2;
  for (Profile::Transform& t : transforms) t.spec.feedback.resize(heads * weights);
  parallel_for(threads, transforms.size() * heads, [&](size_t at) {
    const size_t t = at / heads, head = at % heads;
    // A stored error e' is e' H S^-1 outside, for keys and values: M becomes H S^-1 M S^-1 H, and H S^-1 is what queries go
    // through.
    const auto query = [&](float* row) { maps[t].query(static_cast<int>(head), row); };
    set_feedback(carried(metrics[2 * head + t / 2], dim, query), dim, transforms[t].spec.feedback.data() + head * weights);
  });
  for (const Side side : {Side::kKey, Side::kValue}) {
    if (!mpo) break;
    constexpr size_t kSmall = MpoMatrix().size();
    std::vector<float> small(heads * kSmall);
    parallel_for(threads, heads, [&](size_t head) {
      const float* x = (side == Side::kKey ? rows.keys : rows.values).data() + (static_cast<ptrdiff_t>(head) * n + sinks) * dim;
      const MpoMatrix made = mpo_factors(std::vector<double>(x, x + (n - sinks) * dim), dim).small;
      std::copy(made.begin(), made.end(), small.begin() + static_cast<ptrdiff_t>(head * kSmall));
    });
    transforms.push_back({"mpo", static_cast<int>(layer), side, {}});
    transforms.back().spec.more.push_back({"mpo", std::move(small)});
  }
  return transforms;
}

}  // namespace kvmix
