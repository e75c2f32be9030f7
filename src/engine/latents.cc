#include "engine/latents.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "engine/factors_file.h"
#include "kvmix/error.h"
#include "rank/factors.h"

namespace kvmix {
namespace {

using Rows = Eigen::Map<const Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>;

std::vector<float> vector_of(const GgufModel& model, const std::string& name) {
  if (model.stored_weights().find(name) == nullptr) return {};
  const ggml_tensor* tensor = model.original(name);
  std::vector<float> out(static_cast<size_t>(tensor->ne[0]));
  dequantise_row(tensor, 0, out.data());
  return out;
}

// As ggml's rotation: linear scaling, YaRN between frequencies that turn often and those that hardly do.
void set_rotation(const GgufModel& model, size_t layer, LatentFactors& f) {
  const HyperParameters& p = model.parameters();
  const RopeOptions& r = p.is_local(static_cast<int64_t>(layer)) ? p.rope_local : p.rope;
  const std::vector<float> divisors = vector_of(model, "rope_freqs.weight");
  const double base = static_cast<double>(r.base), scale = static_cast<double>(r.scale),
               mixed = static_cast<double>(r.ext_factor);
  const auto turning = [&](float turns) {
    return r.dims * std::log(r.original_context / (static_cast<double>(turns) * 2 * std::numbers::pi)) / (2 * std::log(base));
  };
  const double low = std::max(0.0, std::floor(turning(r.beta_fast))),
               high = std::min(r.dims - 1.0, std::ceil(turning(r.beta_slow)));
  for (int i = 0; i < r.dims / 2; ++i) {
    const auto at = static_cast<size_t>(i);
    const double angle = std::pow(base, -2.0 * i / r.dims) / (at < divisors.size() ? static_cast<double>(divisors[at]) : 1.0);
    const double mix = mixed * (1 - std::clamp((i - low) / std::max(0.001, high - low), 0.0, 1.0));
    f.angles.push_back(mixed != 0 ? angle * (scale * (1 - mix) + mix) : angle * scale);
  }
  f.magnitude = r.attn_factor * (mixed != 0 ? 1 + 0.1f * std::log(1 / r.scale) : 1.0f);
  f.neighbours = r.mode != GGML_ROPE_TYPE_NEOX;
}

// The first `total` latents of a side, as many of each group; turned where codes share scales over a token's latents.
void cut(const SideFactors& s, int total, bool turns, const GgufModel& model, const std::string& where,
         std::vector<LatentFactors::Head>& heads, std::vector<float>& down) {
  if (total % s.groups != 0 || total / s.groups > s.rank) {
    throw Error(Status::kMismatch, where + " have rank " + std::to_string(total) + " in the plan; the factors hold " +
                                       std::to_string(s.groups) + " groups of up to " + std::to_string(s.rank) +
                                       ": make the plan again with kvmix plan --factors");
  }
  const HyperParameters& p = model.parameters();
  const int rank = total / s.groups;
  const auto dim = static_cast<Eigen::Index>(p.head_dim);
  const Rows all_down(s.down.data(), static_cast<Eigen::Index>(s.groups) * s.rank, p.model_dim);
  const Rows all_up(s.up.data(), p.kv_heads * dim, s.rank);
  // A seed for all: the same latents wherever the plan runs.
  const rank::Matrix q = turns ? rank::mixing_rotation(rank, 1) : rank::Matrix::Identity(rank, rank);
  down.resize(static_cast<size_t>(total) * static_cast<size_t>(p.model_dim));
  for (int g = 0; g < s.groups; ++g) {
    Eigen::Map<Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>(
        down.data() + static_cast<ptrdiff_t>(g) * rank * p.model_dim, rank, p.model_dim) =
        (q.transpose() * all_down.middleRows(static_cast<Eigen::Index>(g) * s.rank, rank).cast<double>()).cast<float>();
  }
  for (size_t h = 0; h < s.group_of.size(); ++h) {
    LatentFactors::Head& head = heads.emplace_back();
    head.first = s.group_of[h] * rank;
    head.count = rank;
    head.up.resize(static_cast<size_t>(rank * dim));
    Eigen::Map<Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>(head.up.data(), rank, dim) =
        (all_up.block(static_cast<Eigen::Index>(h) * dim, 0, dim, rank).cast<double>() * q).transpose().cast<float>();
  }
}

std::string block_name(size_t layer, Side side) {
  return "blk." + std::to_string(layer) + (side == Side::kKey ? ".attn_k" : ".attn_v");
}

}  // namespace

std::vector<float> projection_weights(const GgufModel& model, size_t layer, Side side) {
  const ggml_tensor* tensor = model.original(block_name(layer, side) + ".weight");
  const std::vector<float> scale = vector_of(model, block_name(layer, side) + ".scale");
  const auto columns = static_cast<size_t>(tensor->ne[0]), rows = static_cast<size_t>(tensor->ne[1]);
  std::vector<float> out(rows * columns);
  for (size_t r = 0; r < rows; ++r) dequantise_row(tensor, r, out.data() + r * columns);
  if (!scale.empty()) {
    for (float& x : out) x *= scale[0];
  }
  if (!all_finite(out)) model.refuse_not_finite(block_name(layer, side) + ".weight");
  return out;
}

std::vector<float> projection_bias(const GgufModel& model, size_t layer, Side side) {
  return vector_of(model, block_name(layer, side) + ".bias");
}

std::vector<LayerLatents> load_latents(const GgufModel& model, const Plan& plan, bool forced) {
  if (!plan.rank) return {};
  const std::string& path = plan.rank->factors;
  const Factors file = read_factors(path);
  check_factors(file, model, forced, path);
  if (file.checksum != plan.rank->checksum) {
    throw Error(Status::kMismatch, path + " holds other factors (checksum " + file.checksum +
                                       ") than the plan was made with (" + plan.rank->checksum +
                                       "): make the plan again with kvmix plan --factors");
  }
  std::vector<LayerLatents> layers;
  for (size_t l = 0; l < file.layers.size(); ++l) {
    const Plan::Layer& planned = plan.layers[l];
    LayerLatents& latents = layers.emplace_back();
    if (planned.key_rank == 0) continue;  // keys and values themselves
    auto f = std::make_shared<LatentFactors>();
    const auto turns = [](const CodecSpec& codec) { return !codec.is_f16() && codec.axis == Axis::kToken; };
    const std::string where = "layer " + std::to_string(l);
    cut(file.layers[l].key, planned.key_rank, turns(planned.key.codec), model, where + ": keys", f->key, latents.key_down);
    cut(file.layers[l].value, planned.value_rank, turns(planned.value.codec), model, where + ": values", f->value,
        latents.value_down);
    f->key_bias = projection_bias(model, l, Side::kKey);
    f->value_bias = projection_bias(model, l, Side::kValue);
    f->key_norm = vector_of(model, "blk." + std::to_string(l) + ".attn_k_norm.weight");
    f->norm_epsilon = model.parameters().norm_epsilon;
    set_rotation(model, l, *f);
    latents.factors = std::move(f);
  }
  return layers;
}

}  // namespace kvmix
