// Low-rank factors of a model's key and value projections, by one of three methods.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>

#include "base/machine.h"
#include "engine/factors_file.h"
#include "engine/latents.h"
#include "kvmix/error.h"
#include "kvmix/measure.h"
#include "rank/factors.h"
#include "score/layerwise.h"

namespace kvmix {
namespace {

using rank::Matrix;
using RowMajor = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Groups = std::vector<std::vector<int>>;

struct Sides {
  std::vector<double> key, value;
};

int largest_divisor(int n, int most) {
  for (int d = std::min(n, most); d > 1; --d) {
    if (n % d == 0) return d;
  }
  return 1;
}

Groups natural_groups(int heads, int size) {
  Groups groups(static_cast<size_t>(heads / size));
  for (int h = 0; h < heads; ++h) groups[static_cast<size_t>(h / size)].push_back(h);
  return groups;
}

class Factoriser {
 public:
  Factoriser(const GgufModel& model, const FactoriseOptions& options, const Progress& progress)
      : model_(model), options_(options), progress_(progress) {
    const std::vector<FactorisationInfo> known = factorisations();
    if (std::none_of(known.begin(), known.end(), [&](const auto& m) { return m.name == options.method; })) {
      throw Error(Status::kInvalidArgument, "method \"" + options.method + "\" is unknown; expected lorc, palu or recalkv");
    }
    if (!(options.keep > 0 && options.keep <= 1))
      throw Error(Status::kInvalidArgument, "keep is " + std::to_string(options.keep) + "; expected above 0, up to 1");
    const ModelShape::Layer& shape = model.shape().layers.front();
    heads_ = shape.kv_heads;
    dim_ = shape.head_dim;
    LayerConfig layer;
    layer.kv_heads = heads_;
    layer.head_dim = dim_;
    layer.key_rank = 1;
    step_ = LayerConfig::kLatentStep * layer.lists();
    if (options.group < 0 || (options.group > 0 && heads_ % options.group != 0)) {
      throw Error(Status::kInvalidArgument, "groups of " + std::to_string(options.group) + " do not divide " +
                                                std::to_string(heads_) + " KV heads; choose a divisor");
    }
    group_ = options.group > 0 ? options.group : largest_divisor(heads_, 4);
    if (options.method == "lorc") group_ = heads_;
  }

  Factors run(std::span<const std::vector<Token>> windows) {
    const bool calibrated = options_.method != "lorc";
    const size_t layers = model_.shape().layers.size();
    Factors out;
    out.method = options_.method;
    out.model = model_.shape().name;
    out.fingerprint = model_.shape().fingerprint;
    const Sides ranks = options_.method == "lorc" ? progressive() : by_gradients();
    std::unique_ptr<Layerwise> run;
    std::vector<std::vector<float>> hidden;
    if (calibrated) {
      if (windows.empty()) throw Error(Status::kInvalidArgument, "method " + options_.method + " needs text; give some");
      run = std::make_unique<Layerwise>(model_, thread_count(options_.threads), Fp16Part{0, 0, 0});
      for (const std::vector<Token>& window : windows) hidden.push_back(run->embed(window));
    }
    double kept = 0;
    for (size_t l = 0; l < layers; ++l) {
      if (progress_ && !progress_(static_cast<double>(l), static_cast<double>(layers), "layer " + std::to_string(l)))
        throw Error(Status::kCancelled, "stopped while factorising");
      Matrix gram, centred;
      if (calibrated) {
        gram_of(l, hidden, gram, centred);
      } else {
        gram = norm_gain(l).cwiseAbs2().asDiagonal();  // the truncated SVD of W diag(gain)
      }
      Factors::Layer& layer = out.layers.emplace_back();
      layer.key = side(l, Side::kKey, static_cast<int>(ranks.key[l]), gram, centred);
      layer.value = side(l, Side::kValue, static_cast<int>(ranks.value[l]), gram, centred);
      for (const SideFactors* s : {&layer.key, &layer.value}) kept += s->groups * s->rank;
      if (!calibrated || l + 1 == layers) continue;
      const auto at = static_cast<int>(l);
      if (options_.method == "recalkv") {  // calibrates each layer behind compressed ones
        run->replace(at, "attn_k", product(layer.key));
        run->replace(at, "attn_v", product(layer.value));
      }
      for (std::vector<float>& h : hidden) h = run->forward(at, run->layer_config(at), h);
    }
    char note[160];
    std::snprintf(note, sizeof note, "asked to keep %.3f, keeps %.4f; %zu windows of text", options_.keep,
                  kept / (2.0 * static_cast<double>(layers) * heads_ * dim_), windows.size());
    out.note = note;
    return out;
  }

 private:
  Matrix weights(size_t layer, Side side) const {
    const std::vector<float> w = projection_weights(model_, layer, side);
    return Eigen::Map<const RowMajor>(w.data(), heads_ * dim_, model_.parameters().model_dim).cast<double>();
  }
  // Of the norm before the projections, which is as much a part of them as W is: they are W diag(gain) of what it normalises.
  Eigen::VectorXd norm_gain(size_t layer) const {
    const ggml_tensor* norm = model_.original("blk." + std::to_string(layer) + ".attn_norm.weight");
    Eigen::VectorXf gain(model_.parameters().model_dim);
    dequantise_row(norm, 0, gain.data());
    return gain.cast<double>();
  }
  // The nearest total rank that pages can hold, and `groups` divide.
  int fitting(double rank, int groups) const {
    const int step = std::lcm(step_, groups), n = heads_ * dim_, least = (2 * step_ + step - 1) / step * step;
    return std::clamp(rank::rounded_rank(rank, step, n), std::min(least, n), n);
  }

  Sides progressive() const {
    std::vector<double> key, value;
    for (size_t l = 0; l < model_.shape().layers.size(); ++l) {
      const Eigen::VectorXd gain = norm_gain(l);
      key.push_back(rank::log_condition(rank::singular_values(weights(l, Side::kKey) * gain.asDiagonal())));
      value.push_back(rank::log_condition(rank::singular_values(weights(l, Side::kValue) * gain.asDiagonal())));
    }
    Sides ranks;
    for (const int r :
         rank::progressive_ranks(rank::cumulative_log_conditions(key, value), heads_ * dim_, options_.keep, step_)) {
      ranks.key.push_back(fitting(r, 1));
      ranks.value.push_back(fitting(r, 1));
    }
    return ranks;
  }

  // Palu's allocation where gradients were measured, else equal ranks.
  Sides by_gradients() const {
    const size_t layers = model_.shape().layers.size();
    const int n = heads_ * dim_;
    std::vector<double> scores(2 * layers, 1.0);
    if (options_.profile != nullptr) {
      check_profile(*options_.profile, model_.shape(), false, "the profile");
      if (options_.profile->key_score.size() != layers || options_.profile->value_score.size() != layers)
        throw Error(Status::kMismatch, "the profile has no gradients of every layer; measure it with kvmix profile");
      for (size_t l = 0; l < layers; ++l) {
        scores[2 * l] = options_.profile->key_score[l];
        scores[2 * l + 1] = options_.profile->value_score[l];
      }
    }
    const std::vector<int> each = rank::fisher_ranks(scores, n, 1, options_.keep, 1, options_.method == "palu");
    Sides ranks;
    for (size_t l = 0; l < layers; ++l) {
      ranks.key.push_back(fitting(each[2 * l], heads_ / group_));
      ranks.value.push_back(fitting(each[2 * l + 1], options_.method == "recalkv" ? 1 : heads_ / group_));
    }
    return ranks;
  }

  // Sum of x x^T over the calibration's tokens, of the layer's projections' inputs, and the same about their mean.
  void gram_of(size_t layer, std::span<const std::vector<float>> hidden, Matrix& gram, Matrix& centred) const {
    const HyperParameters& p = model_.parameters();
    const auto d = static_cast<Eigen::Index>(p.model_dim);
    const Eigen::VectorXd gain = norm_gain(layer);
    gram = Matrix::Zero(d, d);
    Eigen::VectorXd sum = Eigen::VectorXd::Zero(d);
    double tokens = 0;
    for (const std::vector<float>& h : hidden) {
      Matrix x = Eigen::Map<const Eigen::MatrixXf>(h.data(), d, static_cast<Eigen::Index>(h.size()) / d).cast<double>();
      for (Eigen::Index t = 0; t < x.cols(); ++t) {
        const double mean = x.col(t).squaredNorm() / static_cast<double>(d);
        x.col(t) = x.col(t).cwiseProduct(gain) / std::sqrt(mean + static_cast<double>(p.norm_epsilon));
      }
      gram.selfadjointView<Eigen::Lower>().rankUpdate(x);
      sum += x.rowwise().sum();
      tokens += static_cast<double>(x.cols());
    }
    gram = Matrix(gram.selfadjointView<Eigen::Lower>());
    centred = gram - sum * sum.transpose() / tokens;
  }

  SideFactors side(size_t layer, Side which, int total, const Matrix& gram, const Matrix& centred) const {
    const Matrix w = weights(layer, which);
    Groups groups = natural_groups(heads_, options_.method == "recalkv" && which == Side::kValue ? heads_ : group_);
    const auto count = static_cast<int>(groups.size());
    const int rank = total / count;
    if (options_.method == "recalkv" && which == Side::kKey && count > 1) {
      groups = rank::greedy_groups(rank::head_similarity(w * centred * w.transpose(), heads_), group_);
      groups = rank::improved_groups(w * gram * w.transpose(), heads_, std::move(groups), rank);
    }
    SideFactors s;
    s.groups = count;
    s.rank = rank;
    s.group_of.resize(static_cast<size_t>(heads_));
    const Eigen::Index d = w.cols(), n = w.rows(), part = n / count;
    RowMajor down(total, d), up(n, rank), energies(count, part);
    for (int g = 0; g < count; ++g) {
      const std::vector<int>& heads = groups[static_cast<size_t>(g)];
      Matrix rows(part, d);
      for (size_t i = 0; i < heads.size(); ++i)
        rows.middleRows(static_cast<Eigen::Index>(i) * dim_, dim_) = w.middleRows(heads[i] * dim_, dim_);
      const rank::Factors f = rank::whitened_factors(rows, gram, rank);
      down.middleRows(static_cast<Eigen::Index>(g) * rank, rank) = f.down.cast<float>();
      energies.row(g) = f.energies.transpose().cast<float>();
      for (size_t i = 0; i < heads.size(); ++i) {
        up.middleRows(heads[i] * dim_, dim_) = f.up.middleRows(static_cast<Eigen::Index>(i) * dim_, dim_).cast<float>();
        s.group_of[static_cast<size_t>(heads[i])] = g;
      }
    }
    s.down.assign(down.data(), down.data() + down.size());
    s.up.assign(up.data(), up.data() + up.size());
    s.energies.assign(energies.data(), energies.data() + energies.size());
    return s;
  }

  // What the factors stand for in place of the weights, [kv_heads * head_dim][model_dim].
  std::vector<float> product(const SideFactors& s) const {
    const Eigen::Index d = model_.parameters().model_dim;
    const Eigen::Map<const RowMajor> down(s.down.data(), s.groups * s.rank, d), up(s.up.data(), heads_ * dim_, s.rank);
    RowMajor out(heads_ * dim_, d);
    for (int h = 0; h < heads_; ++h) {
      out.middleRows(h * dim_, dim_) =
          up.middleRows(h * dim_, dim_) * down.middleRows(s.group_of[static_cast<size_t>(h)] * s.rank, s.rank);
    }
    return {out.data(), out.data() + out.size()};
  }

  const GgufModel& model_;
  const FactoriseOptions& options_;
  const Progress& progress_;
  int heads_ = 0, dim_ = 0, group_ = 1, step_ = 16;
};

}  // namespace

std::vector<FactorisationInfo> factorisations() {
  return {
      {"lorc",
       "LoRC (arXiv 2410.03111): SVD of the weights alone, norms' gains in them, ranks that fall with depth; needs no text"},
      {"palu", "Palu (arXiv 2407.21118): whitened by text, groups of heads, ranks by a profile's gradients"},
      {"recalkv", "ReCalKV (arXiv 2505.24357): keys in groups of similar heads, values of all heads together"}};
}

void factorise(std::shared_ptr<const Model> model, std::span<const std::vector<Token>> windows, const FactoriseOptions& options,
               const std::string& path, const Progress& progress) {
  write_factors(Factoriser(gguf_model(*model), options, progress).run(windows), path);
}

}  // namespace kvmix
