// What quantising one layer's keys or values alone costs.
//
// kl:     KL divergence to the exact model with only that tensor quantised, at 1, 2 and 3 bits, in fp32 so that nothing else
//         differs; other codecs by the ratio of their error in the attention output.
// fisher: second order from gradients at the cached rows, (sum of gradient x error)^2 / 2, element by element at 2 bits with
// the
//         same ratios ("fisher"), or summed inside a page first, which sees errors that go together ("fisher-page").
// output: relative squared error of the attention output (KVTuner's measure, forward only).
#include <algorithm>
#include <cmath>

#include "base/mean.h"
#include "base/parallel.h"
#include "kvmix/error.h"
#include "kvmix/measure.h"
#include "measure/gradients.h"
#include "measure/layerwise.h"
#include "measure/scored_rows.h"
#include "measure/stored_page.h"
#include "measure/transforms.h"
#include "plan/planner.h"

namespace kvmix {
namespace {

constexpr int kWidths[] = {1, 2, 3, 4, 6, 8};
constexpr int kMeasuredWidths[] = {1, 2, 3};  // of kl
constexpr int kSampledQueries = 48;

struct Candidate {
  SideConfig config;
  std::string transform;
  double output_error = 0;  // relative to the output's energy
  double fisher = 0, fisher_page = 0;
};

// The codecs that plans choose from, the reference choice (2 bits) first.
std::vector<Candidate> candidates(const Profile& profile, int layer, Side side, int head_dim) {
  std::vector<Candidate> out;
  const auto add = [&](SideConfig config, const std::string& transform) {
    config.transform = named_transform(profile, layer, side, transform);
    out.push_back({std::move(config), transform, 0, 0, 0});
  };
  for (const int bits : kWidths) {
    std::vector<SideConfig> codecs{side == Side::kKey ? recipe_key(bits, false) : recipe_value(bits)};
    if (side == Side::kValue && head_dim >= 128) {
      codecs.push_back(recipe_value(bits));
      codecs.back().codec.group = 128;
      codecs.back().codec.fit = Fit::kLeastSquares;
    }
    for (const SideConfig& codec : codecs) {
      if (side == Side::kKey) add(codec, "plain");
      add(codec, "hadamard");
      for (const Profile::Transform& t : profile.transforms) {
        if (t.layer == layer && t.side == side) add(codec, t.name);
      }
    }
  }
  const auto reference = std::find_if(out.begin(), out.end(), [](const Candidate& c) { return c.config.codec.bits == 2; });
  std::rotate(out.begin(), reference, reference + 1);
  return out;
}

// Rows as the sealed pages of a sequence hold them; sinks and the last, partial page stay as they are.
std::vector<float> stored_rows(const SideConfig& config, Side side, int head, int dim, int64_t n, int sinks,
                               const float* rows) {
  std::vector<float> out(rows, rows + n * dim);
  StoredPage page(config, side, dim);
  for (int64_t first = sinks; first + kPageTokens <= n; first += kPageTokens) {
    page.read_back(head, dim, rows + first * dim, out.data() + first * dim);
  }
  return out;
}

// One layer of one pass: adds to the candidates' errors.
class LayerErrors {
 public:
  LayerErrors(const ModelShape::Layer& shape, const PassResult& pass, size_t layer, int sinks)
      : shape_(shape),
        pass_(pass),
        layer_(layer),
        sinks_(sinks),
        n_(static_cast<int64_t>(pass.keys[layer].size()) / (shape.kv_heads * shape.head_dim)) {
    // Queries spread over the second half of the prompt.
    const int64_t half = n_ / 2, step = std::max<int64_t>(1, (n_ - half) / kSampledQueries);
    for (int64_t t = half; t < n_; t += step) queries_.push_back(t);
    exact_ = outputs(nullptr, nullptr, -1);
    for (const float x : exact_) energy_ += static_cast<double>(x) * static_cast<double>(x);
  }

  void add(Candidate& candidate, Side side) {
    const int dim = shape_.head_dim;
    const std::vector<float>& rows = side == Side::kKey ? pass_.keys[layer_] : pass_.values[layer_];
    const std::vector<float>& gradient = side == Side::kKey ? pass_.key_gradient[layer_] : pass_.value_gradient[layer_];
    double output = 0, element = 0, pages = 0;
    for (int head = 0; head < shape_.kv_heads; ++head) {
      const float* x = rows.data() + static_cast<ptrdiff_t>(head) * n_ * dim;
      const float* g = gradient.data() + static_cast<ptrdiff_t>(head) * n_ * dim;
      const std::vector<float> stored = stored_rows(candidate.config, side, head, dim, n_, sinks_, x);
      const std::vector<float> changed =
          outputs(side == Side::kKey ? stored.data() : nullptr, side == Side::kValue ? stored.data() : nullptr, head);
      const size_t width = changed.size() / static_cast<size_t>(shape_.kv_heads);
      for (size_t i = width * static_cast<size_t>(head); i < width * static_cast<size_t>(head + 1); ++i) {
        const double d = static_cast<double>(changed[i]) - static_cast<double>(exact_[i]);
        output += d * d;
      }
      for (int64_t first = sinks_; first + kPageTokens <= n_; first += kPageTokens) {
        double page = 0;
        for (int64_t i = first * dim; i < (first + kPageTokens) * dim; ++i) {
          const double gd = static_cast<double>(g[i]) * static_cast<double>(stored[static_cast<size_t>(i)] - x[i]);
          element += gd * gd;
          page += gd;
        }
        pages += page * page;
      }
    }
    candidate.output_error += output / energy_;
    candidate.fisher += element / (2.0 * static_cast<double>(n_));
    candidate.fisher_page += pages / (2.0 * static_cast<double>(n_));
  }

 private:
  // Attention outputs of the sampled queries, [kv_head][query][group][head_dim]; one head's rows may be replaced, and then only
  // that head is computed. A query sees stored rows of pages before its own window and the exact rows after.
  std::vector<float> outputs(const float* keys, const float* values, int only_head) const {
    const int dim = shape_.head_dim, group = shape_.q_heads / shape_.kv_heads;
    std::vector<float> out(static_cast<size_t>(shape_.q_heads) * queries_.size() * static_cast<size_t>(dim), 0.0f);
    std::vector<float> scores(static_cast<size_t>(n_));
    for (int head = 0; head < shape_.kv_heads; ++head) {
      if (only_head >= 0 && head != only_head) continue;
      const float* k = pass_.keys[layer_].data() + static_cast<ptrdiff_t>(head) * n_ * dim;
      const float* v = pass_.values[layer_].data() + static_cast<ptrdiff_t>(head) * n_ * dim;
      for (size_t s = 0; s < queries_.size(); ++s) {
        const int64_t t = queries_[s];
        const int64_t page = (t - sinks_) / kPageTokens;
        const int64_t exact_from = std::max<int64_t>(0, sinks_ + (page - 1) * kPageTokens);
        const int64_t first = shape_.sliding_window > 0 ? std::max<int64_t>(0, t - shape_.sliding_window + 1) : 0;
        for (int h = 0; h < group; ++h) {
          const float* q = pass_.queries[layer_].data() + (static_cast<ptrdiff_t>(head * group + h) * n_ + t) * dim;
          float top = -INFINITY;
          for (int64_t u = first; u <= t; ++u) {
            const float* row = (keys != nullptr && u < exact_from ? keys : k) + u * dim;
            float lanes[16] = {};
            for (int c = 0; c < dim; c += 16) {
              for (int j = 0; j < 16; ++j) lanes[j] += q[c + j] * row[c + j];
            }
            float sum = 0;
            for (const float lane : lanes) sum += lane;
            scores[static_cast<size_t>(u)] = sum * shape_.scale;
            top = std::max(top, sum * shape_.scale);
          }
          float* o =
              &out[((static_cast<size_t>(head) * queries_.size() + s) * static_cast<size_t>(group) + static_cast<size_t>(h)) *
                   static_cast<size_t>(dim)];
          float norm = 0;
          for (int64_t u = first; u <= t; ++u) {
            const float p = std::exp(scores[static_cast<size_t>(u)] - top);
            norm += p;
            const float* row = (values != nullptr && u < exact_from ? values : v) + u * dim;
            for (int c = 0; c < dim; ++c) o[c] += p * row[c];
          }
          for (int c = 0; c < dim; ++c) o[c] /= norm;
        }
      }
    }
    return out;
  }

  const ModelShape::Layer& shape_;
  const PassResult& pass_;
  size_t layer_;
  int sinks_;
  int64_t n_;
  std::vector<int64_t> queries_;
  std::vector<float> exact_;
  double energy_ = 1e-30;
};

// A window run with nothing quantised: the residual stream at every layer, to restart from, and what the model then says.
class ExactRun {
 public:
  ExactRun(Layerwise& runner, std::span<const Token> tokens, int threads)
      : hidden_(exact_streams(runner, tokens)), scored_(runner, tokens.size(), hidden_.back(), threads) {}

  // Mean KL divergence of the second half when one layer runs with `config`: the layers before it are not run again.
  double divergence(Layerwise& runner, int layer, const LayerConfig& config) const {
    std::vector<float> hidden = runner.forward(layer, config, hidden_[static_cast<size_t>(layer)]);
    for (int l = layer + 1; l < runner.layers(); ++l) hidden = runner.forward(l, runner.layer_config(l), hidden);
    return mean(scored_.divergence(runner, hidden));
  }

 private:
  static std::vector<std::vector<float>> exact_streams(Layerwise& runner, std::span<const Token> tokens) {
    std::vector<std::vector<float>> hidden{runner.embed(tokens)};
    for (int l = 0; l < runner.layers(); ++l) hidden.push_back(runner.forward(l, runner.layer_config(l), hidden.back()));
    return hidden;
  }

  std::vector<std::vector<float>> hidden_;
  ScoredRows scored_;
};

// The prompts one after the other, cut into windows.
std::vector<std::vector<Token>> windows_of(std::span<const std::vector<Token>> prompts, const SensitivityOptions& options,
                                           int64_t context) {
  const auto length = static_cast<size_t>(std::min(options.tokens, context));
  std::vector<Token> all;
  for (const std::vector<Token>& prompt : prompts) all.insert(all.end(), prompt.begin(), prompt.end());
  std::vector<std::vector<Token>> windows;
  for (size_t at = 0; at < all.size() && windows.size() < static_cast<size_t>(options.windows); at += length) {
    const size_t n = std::min(length, all.size() - at);
    if (n < length && !windows.empty()) break;
    windows.emplace_back(all.begin() + static_cast<ptrdiff_t>(at), all.begin() + static_cast<ptrdiff_t>(at + n));
  }
  if (windows.empty() || static_cast<int>(windows.front().size()) < options.sinks + options.window + 3 * kPageTokens) {
    throw Error(Status::kInvalidArgument, "sensitivities need at least " +
                                              std::to_string(options.sinks + options.window + 3 * kPageTokens) +
                                              " tokens of prompts, so that pages are sealed; use more --prompts or --tokens");
  }
  return windows;
}

}  // namespace

void profile_sensitivity(std::shared_ptr<const Model> model, std::span<const std::vector<Token>> prompts,
                         const SensitivityOptions& options, Profile& profile, const Progress& progress) {
  const std::string& metric = options.metric;
  if (metric != "kl" && metric != "fisher" && metric != "fisher-page" && metric != "output") {
    throw Error(Status::kInvalidArgument,
                "sensitivity \"" + metric + "\" is unknown; expected kl, fisher, fisher-page or output");
  }
  const GgufModel& inside = gguf_model(*model);
  const ModelShape& shape = model->shape();
  if (profile.fingerprint != shape.fingerprint) {
    throw Error(Status::kMismatch, "the profile was measured on another model (" + profile.model + "); start a new one");
  }
  const size_t layers = shape.layers.size();
  const int threads = thread_count(options.threads);
  const auto report = [&](double done, double total, const char* what) {
    if (progress && !progress(done, total, what)) throw Error(Status::kCancelled, "stopped while measuring sensitivities");
  };
  const std::vector<std::vector<Token>> windows = windows_of(prompts, options, shape.context_tokens);

  // Errors in the attention output and, from the gradients, in the loss.
  std::vector<std::vector<Candidate>> tensors;
  const TransposedWeights weights(inside);
  PassOptions pass_options;
  pass_options.threads = threads;
  pass_options.later = true;
  pass_options.sinks = options.sinks;
  const double passes = static_cast<double>(windows.size());
  for (size_t i = 0; i < windows.size(); ++i) {
    const PassResult pass = differentiate(inside, weights, windows[i], pass_options);
    if (i == 0) {
      profile.transforms = calibrated_transforms(inside, pass, options.sinks, threads);
      for (size_t l = 0; l < layers; ++l) {
        for (const Side side : {Side::kKey, Side::kValue})
          tensors.push_back(candidates(profile, static_cast<int>(l), side, shape.layers[l].head_dim));
      }
    }
    parallel_for(threads, layers, [&](size_t l) {
      LayerErrors errors(shape.layers[l], pass, l, options.sinks);
      for (const Side side : {Side::kKey, Side::kValue}) {
        for (Candidate& c : tensors[2 * l + (side == Side::kKey ? 0 : 1)]) errors.add(c, side);
      }
    });
    report(static_cast<double>(i + 1), passes, "errors by layer and codec");
  }

  // Tensors are numbered layer by layer, keys before values.
  const auto is_of = [](const Profile::Sensitivity& s, const std::string& name, size_t tensor, const Candidate& c) {
    return s.metric == name && s.layer == static_cast<int>(tensor / 2) && (s.side == Side::kKey) == (tensor % 2 == 0) &&
           s.codec == to_string(c.config.codec) && s.transform == c.transform;
  };
  const auto store = [&](const std::string& name, size_t tensor, const Candidate& c, double cost) {
    std::erase_if(profile.sensitivities, [&](const Profile::Sensitivity& s) { return is_of(s, name, tensor, c); });
    profile.sensitivities.push_back({name, static_cast<int>(tensor / 2), tensor % 2 == 0 ? Side::kKey : Side::kValue,
                                     to_string(c.config.codec), c.transform, cost});
  };
  for (size_t t = 0; t < tensors.size(); ++t) {
    for (const Candidate& c : tensors[t]) {
      const double ratio = c.output_error / std::max(tensors[t].front().output_error, 1e-30);
      store("output", t, c, c.output_error / passes);
      store("fisher", t, c, tensors[t].front().fisher / passes * ratio);
      store("fisher-page", t, c, c.fisher_page / passes);
    }
  }
  if (metric != "kl") return;

  // The divergence at the narrow widths, where errors are large and ratios mislead, one tensor at a time; the other codecs of a
  // width, and wider ones, by the ratio of their error in the attention output.
  struct Run {
    size_t tensor;
    const Candidate* measured;
    std::vector<const Candidate*> follow;  // `measured` among them
  };
  std::vector<Run> runs;
  double total = 0;
  for (size_t t = tensors.size(); t-- > 0;) {  // last layer first: its suffix is short, so a first result comes soon
    for (const int bits : kMeasuredWidths) {
      Run run{t, nullptr, {}};
      for (const Candidate& c : tensors[t]) {
        const bool widest = bits == kMeasuredWidths[std::size(kMeasuredWidths) - 1];
        if (c.config.codec.bits != bits && !(widest && c.config.codec.bits > bits)) continue;
        run.follow.push_back(&c);
        const bool better = run.measured == nullptr || c.output_error < run.measured->output_error;
        if (c.config.codec.bits == bits && better) run.measured = &c;
      }
      const bool known = std::all_of(run.follow.begin(), run.follow.end(), [&](const Candidate* c) {
        return std::any_of(profile.sensitivities.begin(), profile.sensitivities.end(),
                           [&](const Profile::Sensitivity& s) { return is_of(s, "kl", t, *c); });
      });
      if (known) continue;  // from an earlier, interrupted run
      total += static_cast<double>(layers - t / 2);
      runs.push_back(std::move(run));
    }
  }
  if (runs.empty()) return;
  Layerwise runner(inside, threads, options.sinks, options.window);
  std::vector<ExactRun> exact;
  for (const std::vector<Token>& window : windows) exact.emplace_back(runner, window, threads);
  double done = 0;
  for (const Run& run : runs) {
    const auto layer = static_cast<int>(run.tensor / 2);
    LayerConfig config = runner.layer_config(layer);
    (run.tensor % 2 == 0 ? config.key : config.value) = run.measured->config;
    double divergence = 0;
    for (const ExactRun& e : exact) divergence += e.divergence(runner, layer, config) / passes;
    for (const Candidate* c : run.follow)
      store("kl", run.tensor, *c, divergence * c->output_error / std::max(run.measured->output_error, 1e-30));
    if (options.partial) options.partial(profile);
    done += static_cast<double>(layers - run.tensor / 2);
    report(done, total, "divergence by layer, side and width");
  }
}

}  // namespace kvmix
