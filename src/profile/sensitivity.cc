// What quantising one layer's keys or values alone costs.
//
// kl:     KL divergence to the exact model with only that tensor quantised, at 1, 2 and 3 bits, in fp32 so that nothing else
//         differs; other codecs by the ratio of their `fisher`.
// fisher: second order in the error of the attention output, from one backward pass (layer_errors.h).
// output: relative squared error of the attention output (KVTuner's measure, forward only).
#include <algorithm>
#include <cmath>
#include <future>
#include <map>

#include "base/machine.h"
#include "base/mean.h"
#include "codec/trellis.h"
#include "kvmix/error.h"
#include "kvmix/measure.h"
#include "plan/planner.h"
#include "profile/gradients.h"
#include "profile/layer_errors.h"
#include "profile/transforms.h"
#include "score/layerwise.h"
#include "score/scored_rows.h"

namespace kvmix {
namespace {

constexpr int kMeasuredWidths[] = {1, 2, 3};  // of kl
constexpr int kWidestFit = 4;                 // to which keys have a second fit; above, fits hardly differ

struct Measured {
  CodecSpec codec;
  std::string transform;
  bool recent;         // rows that are not sealed yet, in this codec
  CodecErrors errors;  // mean over windows
};

// The codecs that plans choose from, and recent rows of 8 bits with each transform.
std::vector<Measured> candidates(const Profile& profile, int layer, Side side, int head_dim) {
  std::vector<Measured> out;
  const auto add = [&](const CodecSpec& codec, const std::string& transform) {
    const bool fresh = std::none_of(out.begin(), out.end(), [&](const Measured& c) { return c.transform == transform; });
    if (fresh) out.push_back({kRecentRows, transform, true, {}});
    out.push_back({codec, transform, false, {}});
  };
  for (const int bits : kRecipeBits) {
    std::vector<CodecSpec> codecs{side == Side::kKey ? recipe_key(bits, false).codec : recipe_value(bits).codec};
    if (side == Side::kValue && head_dim >= 128) {
      codecs.push_back(codecs.front());
      codecs.back().group = 128;
      codecs.back().fit = Fit::kUnbiased;  // least squares would shrink rows, and with them outputs
    }
    if (side == Side::kKey && bits <= kWidestFit) {
      codecs.push_back(codecs.front());
      codecs.back().fit = Fit::kUnbiased;
    }
    for (const CodecSpec& codec : codecs) {
      // Keys' second fit: with the transforms that are best at any fit.
      const bool second = side == Side::kKey && codec.fit == Fit::kUnbiased;
      if (side == Side::kKey && !second) add(codec, "plain");
      if (!second) add(codec, "hadamard");
      for (const Profile::Transform& t : profile.transforms) {
        if (t.layer == layer && t.side == side) add(codec, t.name);
      }
    }
  }
  // A trellis has one scale for a token's channels, so it wants rows that are rotated and, of keys, without their mean.
  for (const int bits : kTrellisBits) {
    for (const Profile::Transform& t : profile.transforms) {
      if (t.layer == layer && t.side == side && t.spec.hadamard) add(trellis_spec(bits, side), t.name);
    }
  }
  return out;
}

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
                                           int64_t context, const Fp16Part& fp16) {
  const auto length = static_cast<size_t>(std::min(options.tokens, context));
  std::vector<Token> all;
  for (const std::vector<Token>& prompt : prompts) all.insert(all.end(), prompt.begin(), prompt.end());
  std::vector<std::vector<Token>> windows;
  for (size_t at = 0; at < all.size() && windows.size() < static_cast<size_t>(options.windows); at += length) {
    const size_t n = std::min(length, all.size() - at);
    if (n < length && !windows.empty()) break;
    windows.emplace_back(all.begin() + static_cast<ptrdiff_t>(at), all.begin() + static_cast<ptrdiff_t>(at + n));
  }
  const int least = fp16.sinks + fp16.window + 3 * kPageTokens;
  if (windows.empty() || static_cast<int>(windows.front().size()) < least) {
    throw Error(Status::kInvalidArgument, "sensitivities need at least " + std::to_string(least) +
                                              " tokens of prompts, so that pages are sealed; use more --prompts or --tokens");
  }
  return windows;
}

// Errors in the attention output and, from the gradients, in the loss: from one pass over each window, layer by layer.
class ErrorMeasurement {
 public:
  ErrorMeasurement(const GgufModel& model, const Fp16Part& fp16, int threads, const SensitivityOptions& options,
                   Profile& profile)
      : model_(model), fp16_(fp16), threads_(threads), options_(options), profile_(profile) {
    const size_t layers = model.shape().layers.size();
    Plan frame = f16_plan(model.shape());
    set_fp16_part(fp16, frame);
    config_ = cache_config(frame, model.shape());
    profile.key_score.resize(layers);  // 0 until there are prompts
    profile.value_score.resize(layers);
    profile.windows.resize(layers, 0);
    profile.key_mean.resize(layers);
    tensors.resize(2 * layers);
    for (size_t l = 0; l < layers; ++l) {
      if (profile.windows[l] > 0) resume(l);
    }
  }

  // Layers that have the window already are left as they are; if all have, and nobody needs its scores, there is no pass.
  void measure(std::span<const Token> window, int index, bool scores, const PassOptions& pass) {
    const bool missing = std::any_of(profile_.windows.begin(), profile_.windows.end(), [&](int n) { return n <= index; });
    if (!missing && !scores) return;
    PassOptions options = pass;
    std::future<void> beside;  // what measures a layer while a GPU has the next
    if (missing) {
      options.rows = [&](size_t layer, LayerRows rows) {
        if (profile_.windows[layer] > index) return;
        if (options.device == "cpu") return add(layer, rows);
        if (beside.valid()) beside.get();
        beside = std::async(std::launch::async, [this, layer, rows = std::move(rows)] { add(layer, rows); });
      };
    }
    const PassResult result = differentiate(model_, window, options);
    if (beside.valid()) beside.get();
    if (scores) add_scores(result, window.size(), profile_);
    save();
  }

  // Tensors are numbered layer by layer, keys before values.
  std::vector<std::vector<Measured>> tensors;

  static bool is_of(const Profile::Sensitivity& s, const std::string& metric, size_t tensor, const Measured& c) {
    return s.metric == metric && s.recent == c.recent && s.layer == static_cast<int>(tensor / 2) &&
           (s.side == Side::kKey) == (tensor % 2 == 0) && s.transform == c.transform && s.codec == to_string(c.codec);
  }
  static Profile::Sensitivity entry(const std::string& metric, size_t tensor, const Measured& c, double cost) {
    return {.metric = metric,
            .layer = static_cast<int>(tensor / 2),
            .side = tensor % 2 == 0 ? Side::kKey : Side::kValue,
            .codec = to_string(c.codec),
            .transform = c.transform,
            .cost = cost,
            .recent = c.recent};
  }

 private:
  void make_tensors(size_t layer) {
    for (const Side side : {Side::kKey, Side::kValue})
      tensors[2 * layer + (side == Side::kKey ? 0 : 1)] =
          candidates(profile_, static_cast<int>(layer), side, model_.shape().layers[layer].head_dim);
  }

  // What the profile has of a layer; one that it has not all of is measured again.
  void resume(size_t layer) {
    const auto cost = [&](const char* metric, size_t tensor, const Measured& c) {
      const auto at = std::find_if(profile_.sensitivities.begin(), profile_.sensitivities.end(),
                                   [&](const Profile::Sensitivity& s) { return is_of(s, metric, tensor, c); });
      return at == profile_.sensitivities.end() ? NAN : at->cost;
    };
    make_tensors(layer);
    const bool mpo = std::any_of(profile_.transforms.begin(), profile_.transforms.end(), [&](const Profile::Transform& t) {
      return t.layer == static_cast<int>(layer) && t.name == "mpo";
    });
    bool whole = !profile_.key_mean[layer].empty() && (mpo || !options_.mpo);
    for (size_t t = 2 * layer; t < 2 * layer + 2; ++t) {
      for (Measured& c : tensors[t]) {
        c.errors = {cost("output", t, c), cost("fisher", t, c)};
        whole = whole && std::isfinite(c.errors.output) && std::isfinite(c.errors.fisher);
      }
    }
    if (whole) return;
    profile_.windows[layer] = 0;
    for (size_t t = 2 * layer; t < 2 * layer + 2; ++t) tensors[t].clear();
  }

  void add(size_t layer, const LayerRows& rows) {
    if (profile_.windows[layer] == 0) {
      std::erase_if(profile_.transforms, [&](const Profile::Transform& t) { return t.layer == static_cast<int>(layer); });
      const auto made = calibrated_transforms(model_, layer, rows, fp16_.sinks, options_.mpo, threads_);
      const auto behind = std::find_if(profile_.transforms.begin(), profile_.transforms.end(),
                                       [&](const Profile::Transform& t) { return t.layer > static_cast<int>(layer); });
      profile_.transforms.insert(behind, made.begin(), made.end());
      profile_.key_mean[layer] = mean_key(model_.shape().layers[layer], rows, fp16_.sinks, threads_);
      make_tensors(layer);
    }
    std::map<std::pair<Side, std::string>, TransformSpec> transforms;
    std::vector<Measured*> all;
    std::vector<StoredSide> stored;
    for (const Side side : {Side::kKey, Side::kValue}) {
      for (Measured& c : tensors[2 * layer + (side == Side::kKey ? 0 : 1)]) {
        const auto [transform, fresh] = transforms.try_emplace({side, c.transform});
        if (fresh) transform->second = named_transform(model_.shape(), profile_, static_cast<int>(layer), side, c.transform);
        all.push_back(&c);
        stored.push_back({side, &transform->second, c.codec, c.recent});
      }
    }
    const double count = ++profile_.windows[layer];
    const std::vector<CodecErrors> errors = LayerErrors(config_.layers[layer], rows, threads_).errors(stored);
    for (size_t i = 0; i < all.size(); ++i) {
      all[i]->errors.output += (errors[i].output - all[i]->errors.output) / count;
      all[i]->errors.fisher += (errors[i].fisher - all[i]->errors.fisher) / count;
    }
    save();
  }

  void save() {
    std::erase_if(profile_.sensitivities, [](const Profile::Sensitivity& s) { return s.metric != "kl"; });
    for (size_t t = 0; t < tensors.size(); ++t) {
      for (const Measured& c : tensors[t]) {
        profile_.sensitivities.push_back(entry("output", t, c, c.errors.output));
        profile_.sensitivities.push_back(entry("fisher", t, c, c.errors.fisher));
      }
    }
    if (options_.partial) options_.partial(profile_);
  }

  const GgufModel& model_;
  Fp16Part fp16_;
  int threads_;
  const SensitivityOptions& options_;
  Profile& profile_;
  CacheConfig config_;
};

}  // namespace

void profile_sensitivity(std::shared_ptr<const Model> model, std::span<const std::vector<Token>> prompts,
                         const SensitivityOptions& options, Profile& profile, const Progress& progress) {
  const std::string& metric = options.metric;
  if (metric != "kl" && metric != "fisher" && metric != "output")
    throw Error(Status::kInvalidArgument, "sensitivity \"" + metric + "\" is unknown; expected kl, fisher or output");
  if (metric == "kl" && options.device != "cpu")
    throw Error(Status::kInvalidArgument,
                "sensitivity \"kl\" runs on the device cpu alone; measure fisher on " + options.device);
  const GgufModel& inside = gguf_model(*model);
  const ModelShape& shape = model->shape();
  check_same_model(profile, shape);
  const size_t layers = shape.layers.size();
  const int threads = thread_count(options.threads);
  const auto report = [&](double done, double total, const std::string& what) {
    if (progress && !progress(done, total, what)) throw Error(Status::kCancelled, "stopped while measuring sensitivities");
  };
  const Fp16Part fp16 = options.fp16.value_or(usual_fp16_part(shape));
  if (!profile.sensitivities.empty() && profile.fp16 != fp16)
    throw Error(Status::kMismatch, "the profile was measured with other sinks or another window; start a new one");
  profile.fp16 = fp16;
  const std::vector<std::vector<Token>> windows = windows_of(prompts, options, shape.context_tokens, fp16);
  profile.window_tokens = static_cast<int64_t>(windows.back().size());  // only one that is alone may be short
  const auto pass_options = [&](const std::string& what) {
    return PassOptions{
        .device = options.device,
        .threads = threads,
        .rows = {},
        .progress = [&report, what](double done, double total, const char* stage) { report(done, total, stage + what); }};
  };

  // Prompts that are windows have their scores from the windows' passes and come first, then the others.
  std::vector<size_t> order;
  for (const bool window : {true, false}) {
    for (size_t p = 0; p < prompts.size(); ++p) {
      if ((p < windows.size() && windows[p] == prompts[p]) == window) order.push_back(p);
    }
  }
  const auto next_scored = [&](size_t prompt) {
    const auto done = static_cast<size_t>(profile.prompts);
    return done < order.size() && order[done] == prompt;
  };
  ErrorMeasurement errors(inside, fp16, threads, options, profile);
  for (size_t i = 0; i < windows.size(); ++i) {
    const std::string what = ", window " + std::to_string(i + 1) + " of " + std::to_string(windows.size());
    errors.measure(windows[i], static_cast<int>(i), i < prompts.size() && windows[i] == prompts[i] && next_scored(i),
                   pass_options(what));
  }
  while (static_cast<size_t>(profile.prompts) < order.size()) {
    const size_t p = order[static_cast<size_t>(profile.prompts)];
    const std::string what = ", prompt " + std::to_string(p + 1) + " of " + std::to_string(prompts.size());
    add_scores(differentiate(inside, prompts[p], pass_options(what)), prompts[p].size(), profile);
    if (options.partial) options.partial(profile);
  }
  if (metric != "kl") return;

  const std::vector<std::vector<Measured>>& tensors = errors.tensors;
  const double passes = static_cast<double>(windows.size());
  // The divergence at the narrow widths, where errors are large and ratios mislead, one tensor at a time; the other codecs of a
  // width, and wider ones, by the ratio of their `fisher`.
  struct Run {
    size_t tensor;
    const Measured* measured;
    std::vector<const Measured*> follow;  // `measured` among them
  };
  std::vector<Run> runs;
  double total = 0;
  for (size_t t = tensors.size(); t-- > 0;) {  // last layer first: its suffix is short, so a first result comes soon
    for (const int bits : kMeasuredWidths) {
      Run run{t, nullptr, {}};
      for (const Measured& c : tensors[t]) {
        const bool widest = bits == kMeasuredWidths[std::size(kMeasuredWidths) - 1];
        if (c.codec.bits != bits && !(widest && c.codec.bits > bits)) continue;
        run.follow.push_back(&c);  // recent rows, of 8 bits, with the widest
        const bool better = run.measured == nullptr || c.errors.fisher < run.measured->errors.fisher;
        if (c.codec.bits == bits && better) run.measured = &c;
      }
      const bool known = std::all_of(run.follow.begin(), run.follow.end(), [&](const Measured* c) {
        return std::any_of(profile.sensitivities.begin(), profile.sensitivities.end(),
                           [&](const Profile::Sensitivity& s) { return ErrorMeasurement::is_of(s, "kl", t, *c); });
      });
      if (known) continue;  // from an earlier, interrupted run
      std::erase_if(profile.sensitivities, [&](const Profile::Sensitivity& s) {
        return std::any_of(run.follow.begin(), run.follow.end(),
                           [&](const Measured* c) { return ErrorMeasurement::is_of(s, "kl", t, *c); });
      });
      total += static_cast<double>(layers - t / 2);
      runs.push_back(std::move(run));
    }
  }
  if (runs.empty()) return;
  Layerwise runner(inside, threads, fp16);
  std::vector<ExactRun> exact;
  for (const std::vector<Token>& window : windows) {
    report(static_cast<double>(exact.size()), passes, "exact passes");
    exact.emplace_back(runner, window, threads);
  }
  double done = 0;
  for (const Run& run : runs) {
    const auto layer = static_cast<int>(run.tensor / 2);
    LayerConfig changed = runner.layer_config(layer);
    const Side side = run.tensor % 2 == 0 ? Side::kKey : Side::kValue;
    (side == Side::kKey ? changed.key : changed.value) = {
        run.measured->codec, named_transform(shape, profile, layer, side, run.measured->transform)};
    double divergence = 0;
    for (const ExactRun& e : exact) divergence += e.divergence(runner, layer, changed) / passes;
    for (const Measured* c : run.follow)
      profile.sensitivities.push_back(ErrorMeasurement::entry(
          "kl", run.tensor, *c, divergence * c->errors.fisher / std::max(run.measured->errors.fisher, 1e-300)));
    if (options.partial) options.partial(profile);
    done += static_cast<double>(layers - run.tensor / 2);
    report(done, total, "divergence by layer, side and width");
  }
}

}  // namespace kvmix
