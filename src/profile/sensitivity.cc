// What quantising one layer's keys or values alone costs.
//
// kl:     KL divergence to the exact model with only that tensor quantised, at 1, 2 and 3 bits, in fp32 so that nothing else
//         differs; other codecs by the ratio of their `fisher`.
// fisher: second order in the error of the attention output, from one backward pass (layer_errors.h).
// output: relative squared error of the attention output (KVTuner's measure, forward only).
#include <algorithm>
#include <cmath>

#include "base/machine.h"
#include "base/mean.h"
#include "base/parallel.h"
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

struct Measured {
  SideConfig config;
  std::string transform;
  CodecErrors errors;  // summed over windows
};

// The codecs that plans choose from.
std::vector<Measured> candidates(const Profile& profile, int layer, Side side, int head_dim) {
  std::vector<Measured> out;
  const auto add = [&](SideConfig config, const std::string& transform) {
    config.transform = named_transform(profile, layer, side, transform);
    out.push_back({std::move(config), transform, {}});
  };
  for (const int bits : kRecipeBits) {
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

}  // namespace

void profile_sensitivity(std::shared_ptr<const Model> model, std::span<const std::vector<Token>> prompts,
                         const SensitivityOptions& options, Profile& profile, const Progress& progress) {
  const std::string& metric = options.metric;
  if (metric != "kl" && metric != "fisher" && metric != "output")
    throw Error(Status::kInvalidArgument, "sensitivity \"" + metric + "\" is unknown; expected kl, fisher or output");
  const GgufModel& inside = gguf_model(*model);
  const ModelShape& shape = model->shape();
  if (profile.fingerprint != shape.fingerprint) {
    throw Error(Status::kMismatch,
                "the profile was measured on " + other_model(profile.model, profile.fingerprint, shape) + ": start a new one");
  }
  const size_t layers = shape.layers.size();
  const int threads = thread_count(options.threads);
  const auto report = [&](double done, double total, const char* what) {
    if (progress && !progress(done, total, what)) throw Error(Status::kCancelled, "stopped while measuring sensitivities");
  };
  const Fp16Part fp16 = options.fp16.value_or(usual_fp16_part(shape));
  if (!profile.sensitivities.empty() && profile.fp16 != fp16)
    throw Error(Status::kMismatch, "the profile was measured with other sinks or another window; start a new one");
  profile.fp16 = fp16;
  const std::vector<std::vector<Token>> windows = windows_of(prompts, options, shape.context_tokens, fp16);
  Plan frame = f16_plan(shape);
  set_fp16_part(fp16, frame);
  const CacheConfig config = cache_config(frame, shape);

  // Errors in the attention output and, from the gradients, in the loss.
  std::vector<std::vector<Measured>> tensors;
  const TransposedWeights weights(inside);
  const double passes = static_cast<double>(windows.size());
  const bool scores_missing = profile.key_score.empty();
  std::vector<bool> scored(prompts.size(), !scores_missing);
  for (size_t i = 0; i < windows.size(); ++i) {
    const PassResult pass = differentiate(inside, weights, windows[i], {.threads = threads, .rows = true});
    if (scores_missing && i < prompts.size() && windows[i] == prompts[i]) {
      add_scores(pass, windows[i].size(), profile);
      scored[i] = true;
    }
    if (i == 0) {
      profile.transforms = calibrated_transforms(inside, pass, fp16.sinks, threads);
      profile.key_mean = mean_keys(shape, pass, fp16.sinks);
      for (size_t l = 0; l < layers; ++l) {
        for (const Side side : {Side::kKey, Side::kValue})
          tensors.push_back(candidates(profile, static_cast<int>(l), side, shape.layers[l].head_dim));
      }
    }
    parallel_for(threads, layers, [&](size_t l) {
      const LayerErrors errors(config.layers[l], pass, l);
      for (const Side side : {Side::kKey, Side::kValue}) {
        for (Measured& c : tensors[2 * l + (side == Side::kKey ? 0 : 1)]) {
          const CodecErrors e = errors.of(c.config, side);
          c.errors.output += e.output / passes;
          c.errors.fisher += e.fisher / passes;
        }
      }
    });
    report(static_cast<double>(i + 1), passes, "errors by layer and codec");
  }
  for (size_t p = 0; p < prompts.size(); ++p) {
    if (scored[p]) continue;
    report(static_cast<double>(p), static_cast<double>(prompts.size()), "gradients");
    add_scores(differentiate(inside, weights, prompts[p], {.threads = threads}), prompts[p].size(), profile);
  }

  // Tensors are numbered layer by layer, keys before values.
  const auto is_of = [](const Profile::Sensitivity& s, const std::string& name, size_t tensor, const Measured& c) {
    return s.metric == name && s.layer == static_cast<int>(tensor / 2) && (s.side == Side::kKey) == (tensor % 2 == 0) &&
           s.transform == c.transform && s.codec == to_string(c.config.codec);
  };
  const auto store = [&](const std::string& name, size_t tensor, const Measured& c, double cost) {
    profile.sensitivities.push_back({name, static_cast<int>(tensor / 2), tensor % 2 == 0 ? Side::kKey : Side::kValue,
                                     to_string(c.config.codec), c.transform, cost});
  };
  std::erase_if(profile.sensitivities, [](const Profile::Sensitivity& s) { return s.metric != "kl"; });
  for (size_t t = 0; t < tensors.size(); ++t) {
    for (const Measured& c : tensors[t]) {
      store("output", t, c, c.errors.output);
      store("fisher", t, c, c.errors.fisher);
    }
  }
  if (metric != "kl") return;

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
        if (c.config.codec.bits != bits && !(widest && c.config.codec.bits > bits)) continue;
        run.follow.push_back(&c);
        const bool better = run.measured == nullptr || c.errors.fisher < run.measured->errors.fisher;
        if (c.config.codec.bits == bits && better) run.measured = &c;
      }
      const bool known = std::all_of(run.follow.begin(), run.follow.end(), [&](const Measured* c) {
        return std::any_of(profile.sensitivities.begin(), profile.sensitivities.end(),
                           [&](const Profile::Sensitivity& s) { return is_of(s, "kl", t, *c); });
      });
      if (known) continue;  // from an earlier, interrupted run
      std::erase_if(profile.sensitivities, [&](const Profile::Sensitivity& s) {
        return std::any_of(run.follow.begin(), run.follow.end(), [&](const Measured* c) { return is_of(s, "kl", t, *c); });
      });
      total += static_cast<double>(layers - t / 2);
      runs.push_back(std::move(run));
    }
  }
  if (runs.empty()) return;
  Layerwise runner(inside, threads, fp16);
  std::vector<ExactRun> exact;
  for (const std::vector<Token>& window : windows) exact.emplace_back(runner, window, threads);
  double done = 0;
  for (const Run& run : runs) {
    const auto layer = static_cast<int>(run.tensor / 2);
    LayerConfig changed = runner.layer_config(layer);
    (run.tensor % 2 == 0 ? changed.key : changed.value) = run.measured->config;
    double divergence = 0;
    for (const ExactRun& e : exact) divergence += e.divergence(runner, layer, changed) / passes;
    for (const Measured* c : run.follow)
      store("kl", run.tensor, *c, divergence * c->errors.fisher / std::max(run.measured->errors.fisher, 1e-300));
    if (options.partial) options.partial(profile);
    done += static_cast<double>(layers - run.tensor / 2);
    report(done, total, "divergence by layer, side and width");
  }
}

}  // namespace kvmix
