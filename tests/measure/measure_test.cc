// Measurements against independent ways to the same number.
#include "kvmix/measure.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>

#include "eval/divergence.h"
#include "kvmix/error.h"
#include "kvmix/eval.h"
#include "measure/gradients.h"
#include "measure/layerwise.h"
#include "support/tiny_model.h"

namespace kvmix {
namespace {

// A tiny model whose weights can be changed in its file, which the loaded model maps.
class ChangeableModel {
 public:
  explicit ChangeableModel(const testing::TinyModel& tiny) : folder_("kvmix-measure"), path_(folder_.file("model.gguf")) {
    testing::write_tiny_model(tiny, path_);
    model_ = Model::load(path_);
    file_ = open(path_.c_str(), O_RDWR | O_CLOEXEC);
  }
  ~ChangeableModel() { close(file_); }
  ChangeableModel(const ChangeableModel&) = delete;
  ChangeableModel& operator=(const ChangeableModel&) = delete;
  const std::shared_ptr<const Model>& model() const { return model_; }
  const GgufModel& inside() const { return gguf_model(*model_); }

  // Where a tensor's values are in the file.
  off_t offset(const std::string& name) const {
    gguf_context* gguf = gguf_init_from_file(path_.c_str(), {true, nullptr});
    const size_t at = gguf_get_data_offset(gguf) + gguf_get_tensor_offset(gguf, gguf_find_tensor(gguf, name.c_str()));
    gguf_free(gguf);
    return static_cast<off_t>(at);
  }
  void set(off_t at, float value) const {
    if (pwrite(file_, &value, sizeof value, at) != sizeof value) throw std::runtime_error("cannot change the weights");
  }

 private:
  testing::TemporaryFolder folder_;
  std::string path_;
  std::shared_ptr<const Model> model_;
  int file_;
};

// || dL/dW || against central differences of every entry of W.
double norm_by_differences(const ChangeableModel& m, const std::string& name, std::span<const Token> prompt) {
  const TransposedWeights weights(m.inside());
  const PassOptions options;
  const ggml_tensor* w = m.inside().weights().get(name);
  const auto* values = static_cast<const float*>(w->data);
  const off_t at = m.offset(name);
  double squares = 0;
  for (int64_t i = 0; i < ggml_nelements(w); ++i) {
    const float old = values[i], step = 0.02f;
    const off_t here = at + i * static_cast<off_t>(sizeof(float));
    m.set(here, old + step);
    const double above = differentiate(m.inside(), weights, prompt, options).loss;
    m.set(here, old - step);
    const double below = differentiate(m.inside(), weights, prompt, options).loss;
    m.set(here, old);
    const double slope = (above - below) / (2 * static_cast<double>(step));
    squares += slope * slope;
  }
  return std::sqrt(squares);
}

// One pass gives what separate differences for each layer's matrices give.
TEST(Gradients, OnePassEqualsFiniteDifferencesOfEachLayer) {
  const ChangeableModel m({.architecture = "llama", .layers = 2});
  const std::vector<Token> prompt = testing::random_tokens(10, m.model()->vocab_size(), 5);
  const PassResult pass = differentiate(m.inside(), TransposedWeights(m.inside()), prompt, {});
  for (size_t l = 0; l < 2; ++l) {
    const std::string layer = "blk." + std::to_string(l);
    const double key = norm_by_differences(m, layer + ".attn_k.weight", prompt);
    const double value = norm_by_differences(m, layer + ".attn_v.weight", prompt);
    EXPECT_NEAR(pass.key_norm[l], key, 1e-3 * key);
    EXPECT_NEAR(pass.value_norm[l], value, 1e-3 * value);
  }
}

// Of the codecs of one width, the one that is measured.
bool least_output_error(const Profile& profile, const Profile::Sensitivity& of) {
  const auto output = [&](const Profile::Sensitivity& like) {
    for (const auto& s : profile.sensitivities) {
      if (s.metric == "output" && s.layer == like.layer && s.side == like.side && s.codec == like.codec &&
          s.transform == like.transform) {
        return s.cost;
      }
    }
    return -1.0;
  };
  for (const auto& s : profile.sensitivities) {
    if (s.metric == of.metric && s.layer == of.layer && s.side == of.side &&
        parse_codec(s.codec).bits == parse_codec(of.codec).bits && output(s) < output(of)) {
      return false;
    }
  }
  return true;
}

class LayerwiseModel : public ::testing::TestWithParam<testing::TinyModel> {};

// Run layer by layer in fp32, a model says what the engine says.
TEST_P(LayerwiseModel, SaysWhatTheEngineSays) {
  const ChangeableModel m(GetParam());
  const std::vector<Token> tokens = testing::random_tokens(512, m.model()->vocab_size(), 11);
  Engine engine(m.model(), f16_plan(m.model()->shape()), {.threads = 2});
  const EngineItem item{engine.cache().create(), tokens, true};
  const auto ours = engine.step({&item, 1});
  Layerwise runner(m.inside(), 2, 16, 128);
  std::vector<float> hidden = runner.embed(tokens);
  for (int l = 0; l < runner.layers(); ++l) hidden = runner.forward(l, runner.layer_config(l), hidden);
  std::vector<int> rows;
  for (int t = 0; t < 512; t += 7) rows.push_back(t);
  const auto logits = runner.logits(hidden, rows);
  const auto vocab = static_cast<size_t>(m.model()->vocab_size());
  double kl = 0;
  for (size_t r = 0; r < rows.size(); ++r) {
    ReferenceRow reference;
    set_reference(logits.subspan(r * vocab, vocab), reference);
    kl += score_row(reference, ours.subspan(static_cast<size_t>(rows[r]) * vocab, vocab), 0).kl /
          static_cast<double>(rows.size());
  }
  EXPECT_LT(kl, 1e-4);
}

// The divergence measured by restarting at a layer is the one that the running cache has with that plan.
TEST_P(LayerwiseModel, MeasuresWhatTheRunningCacheLoses) {
  const ChangeableModel m(GetParam());
  const std::vector<std::vector<Token>> windows = {testing::random_tokens(1000, m.model()->vocab_size(), 13)};
  Profile profile = profile_gradients(m.model(), windows, 2, {});
  SensitivityOptions options;
  options.metric = "kl";
  options.threads = 2;
  profile_sensitivity(m.model(), windows, options, profile, {});
  std::vector<EvalSubject> subjects;
  std::vector<double> measured;
  const int global = GetParam().sliding_window > 0 ? 5 : 1;  // a layer that sees everything
  for (const auto& s : profile.sensitivities) {
    const CodecSpec codec = parse_codec(s.codec);
    if (s.metric != "kl" || (s.layer != 0 && s.layer != global)) continue;
    if (codec.bits > 3 || !least_output_error(profile, s)) continue;  // the others follow by ratios
    Plan plan = f16_plan(m.model()->shape());
    plan.sinks = options.sinks;
    plan.window.tokens = options.window;
    auto& layer = plan.layers[static_cast<size_t>(s.layer)];
    SideConfig& side = s.side == Side::kKey ? layer.key : layer.value;
    side.codec = codec;
    side.transform = named_transform(profile, s.layer, s.side, s.transform);
    subjects.push_back({s.codec, plan, ""});
    measured.push_back(s.cost);
  }
  ASSERT_GE(subjects.size(), 12u);  // more where all codecs of a width cost nothing
  EvalOptions eval;
  eval.threads = 2;
  eval.exact = true;
  const auto rows = evaluate_tokens(m.model(), windows, subjects, eval, {});
  for (size_t i = 0; i < subjects.size(); ++i)
    EXPECT_NEAR(measured[i], rows[i + 1].kl_mean, 0.1 * rows[i + 1].kl_mean + 1e-5) << i;
}

INSTANTIATE_TEST_SUITE_P(Tiny, LayerwiseModel, ::testing::ValuesIn(testing::tiny_models()),
                         [](const auto& test) { return testing::tiny_name(test.param); });

}  // namespace
}  // namespace kvmix
