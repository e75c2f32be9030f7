// Divergence of whole plans, layer by layer.
#include <algorithm>
#include <array>
#include <memory>

#include "base/machine.h"
#include "kvmix/error.h"
#include "kvmix/measure.h"
#include "score/layerwise.h"
#include "score/scored_rows.h"

namespace kvmix {
namespace {

// The residual stream of a window in front of a layer. Shared between runs that agree up to there.
using Stream = std::shared_ptr<const std::vector<float>>;

// A plan's run: what every layer ran with, and the streams of all windows in front of every layer and after the last.
struct Run {
  std::vector<LayerConfig> configs;
  std::vector<std::vector<Stream>> streams;  // [layer][window]
};

class LayerwiseMeter final : public PlanMeter {
 public:
  LayerwiseMeter(std::shared_ptr<const Model> model, std::vector<std::vector<Token>> windows,
                 std::vector<std::vector<Token>> held_out, int threads)
      : model_(std::move(model)),
        threads_(thread_count(threads)),
        searched_(std::move(windows)),
        held_out_(std::move(held_out)) {}

  std::vector<double> divergence(const Plan& plan) override { return measure(plan, searched_, true); }
  std::vector<double> held_out(const Plan& plan) override { return measure(plan, held_out_, false); }

 private:
  struct Text {
    explicit Text(std::vector<std::vector<Token>> tokens) : windows(std::move(tokens)) {}
    std::vector<std::vector<Token>> windows;
    std::vector<ScoredRows> scored;
    std::array<Run, 2> runs;  // measured last; empty at first
    size_t newest = 0;
  };

  // Sinks and window decide what a query reads of the exact rows too, so a runner belongs to one choice of them.
  void prepare(const Plan& plan) {
    const Fp16Part fp16 = fp16_part(plan);
    if (runner_ != nullptr && fp16 == fp16_) return;
    for (Text* text : {&searched_, &held_out_}) {
      text->scored.clear();
      text->runs = {};
      const int least = fp16.sinks + fp16.window + 3 * kPageTokens;
      for (const std::vector<Token>& tokens : text->windows) {
        if (static_cast<int>(tokens.size()) >= least) continue;
        throw Error(Status::kInvalidArgument, "a window of " + std::to_string(tokens.size()) +
                                                  " tokens is too short to measure plans on; give at least " +
                                                  std::to_string(least));
      }
    }
    runner_ = std::make_unique<Layerwise>(gguf_model(*model_), threads_, fp16);
    fp16_ = fp16;
  }

  static size_t agreement(const Run& run, const std::vector<LayerConfig>& configs) {
    size_t l = 0;
    const auto alike = [](const LayerConfig& a, const LayerConfig& b) {
      return a.key == b.key && a.value == b.value && a.recent == b.recent;
    };
    while (l < run.configs.size() && alike(run.configs[l], configs[l])) ++l;
    return l;
  }

  // Runs all windows through a layer before the next, so that its weights are dequantised once.
  Run run(const Text& text, std::vector<LayerConfig> configs, const Run* from, size_t first) {
    Run out;
    if (from != nullptr) {
      out.streams.assign(from->streams.begin(), from->streams.begin() + static_cast<ptrdiff_t>(first) + 1);
    } else {
      std::vector<Stream>& embedded = out.streams.emplace_back();
      for (const auto& tokens : text.windows)
        embedded.push_back(std::make_shared<const std::vector<float>>(runner_->embed(tokens)));
    }
    for (size_t l = first; l < configs.size(); ++l) {
      std::vector<Stream> after;
      for (const Stream& before : out.streams[l])
        after.push_back(std::make_shared<const std::vector<float>>(runner_->forward(static_cast<int>(l), configs[l], *before)));
      out.streams.push_back(std::move(after));
    }
    out.configs = std::move(configs);
    return out;
  }

  std::vector<double> measure(const Plan& plan, Text& text, bool keep) {
    check_plan(plan, model_->shape(), false);
    prepare(plan);
    if (text.scored.empty()) {
      std::vector<LayerConfig> exact;
      for (int l = 0; l < runner_->layers(); ++l) exact.push_back(runner_->layer_config(l));
      const Run reference = run(text, std::move(exact), nullptr, 0);
      for (size_t w = 0; w < text.windows.size(); ++w)
        text.scored.emplace_back(*runner_, text.windows[w].size(), *reference.streams.back()[w], threads_);
    }
    if (plan.rank) {
      throw Error(Status::kUnsupported,
                  "a plan with \"rank\" cannot be measured layer by layer; measure it on the running cache with kvmix eval");
    }
    std::vector<LayerConfig> configs = cache_config(plan, model_->shape()).layers;
    // From the run that agrees longest; of two alike the older, which many plans are compared with, replacing the newer.
    const size_t older = 1 - text.newest;
    std::array<size_t, 2> agree = {agreement(text.runs[0], configs), agreement(text.runs[1], configs)};
    const size_t from = agree[text.newest] > agree[older] ? text.newest : older;
    Run made = run(text, std::move(configs), agree[from] > 0 ? &text.runs[from] : nullptr, agree[from]);
    std::vector<double> kl;
    for (size_t w = 0; w < text.windows.size(); ++w) {
      const std::vector<double> part = text.scored[w].divergence(*runner_, *made.streams.back()[w]);
      kl.insert(kl.end(), part.begin(), part.end());
    }
    if (keep) {
      text.newest = 1 - from;
      text.runs[text.newest] = std::move(made);
    }
    return kl;
  }

  std::shared_ptr<const Model> model_;
  int threads_;
  Fp16Part fp16_;
  std::unique_ptr<Layerwise> runner_;
  Text searched_, held_out_;
};

}  // namespace

std::unique_ptr<PlanMeter> make_plan_meter(std::shared_ptr<const Model> model, std::vector<std::vector<Token>> windows,
                                           std::vector<std::vector<Token>> held_out, int threads) {
  if (windows.empty() || held_out.empty())
    throw Error(Status::kInvalidArgument, "measuring plans needs a window to search with and one to check on");
  return std::make_unique<LayerwiseMeter>(std::move(model), std::move(windows), std::move(held_out), threads);
}

}  // namespace kvmix
