// Measurements against independent ways to the same number.
#include "kvmix/measure.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <fstream>

#include "kvmix/error.h"
#include "kvmix/eval.h"
#include "profile/gradients.h"
#include "score/divergence.h"
#include "score/layerwise.h"
#include "support/models.h"
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

std::vector<LayerRows> rows_of(const GgufModel& model, std::span<const Token> prompt) {
  std::vector<LayerRows> rows(model.shape().layers.size());
  differentiate(model, prompt,
                {.device = "cpu", .rows = [&](size_t layer, const LayerRows& r) { rows[layer] = r; }, .progress = {}});
  return rows;
}

// || dL/dW || against central differences of every entry of W.
double norm_by_differences(const ChangeableModel& m, const std::string& name, std::span<const Token> prompt) {
  const PassOptions options;
  const ggml_tensor* w = m.inside().weights().get(name);
  const auto* values = static_cast<const float*>(w->data);
  const off_t at = m.offset(name);
  double squares = 0;
  for (int64_t i = 0; i < ggml_nelements(w); ++i) {
    const float old = values[i], step = 0.02f;
    const off_t here = at + i * static_cast<off_t>(sizeof(float));
    m.set(here, old + step);
    const double above = differentiate(m.inside(), prompt, options).loss;
    m.set(here, old - step);
    const double below = differentiate(m.inside(), prompt, options).loss;
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
  const PassResult pass = differentiate(m.inside(), prompt, {});
  for (size_t l = 0; l < 2; ++l) {
    const std::string layer = "blk." + std::to_string(l);
    const double key = norm_by_differences(m, layer + ".attn_k.weight", prompt);
    const double value = norm_by_differences(m, layer + ".attn_v.weight", prompt);
    EXPECT_NEAR(pass.key_norm[l], key, 1e-3 * key);
    EXPECT_NEAR(pass.value_norm[l], value, 1e-3 * value);
  }
}

// A bias of the values moves every attention output by as much, so its derivative is the sum of the output's gradients.
TEST(Gradients, AtTheAttentionOutputEqualFiniteDifferences) {
  const ChangeableModel m({.architecture = "qwen2", .layers = 2, .qkv_bias = true});
  const std::vector<Token> prompt = testing::random_tokens(10, m.model()->vocab_size(), 5);
  const std::vector<LayerRows> rows = rows_of(m.inside(), prompt);
  const std::string name = "blk.0.attn_v.bias";
  const auto* values = static_cast<const float*>(m.inside().weights().get(name)->data);
  const ModelShape::Layer& layer = m.model()->shape().layers[0];
  const int group = layer.q_heads / layer.kv_heads;
  for (int i = 0; i < layer.kv_heads * layer.head_dim; i += 7) {
    const float old = values[i], step = 0.02f;
    const off_t here = m.offset(name) + i * static_cast<off_t>(sizeof(float));
    m.set(here, old + step);
    const double above = differentiate(m.inside(), prompt, {}).loss;
    m.set(here, old - step);
    const double below = differentiate(m.inside(), prompt, {}).loss;
    m.set(here, old);
    const double slope = (above - below) / (2 * static_cast<double>(step)) * 9;  // of the sum over 9 predictions
    double sum = 0;
    for (int t = 0; t < 10; ++t) {
      for (int h = 0; h < group; ++h) {
        const int head = i / layer.head_dim * group + h;
        sum += static_cast<double>(
            rows[0].output_gradient[static_cast<size_t>((t * layer.q_heads + head) * layer.head_dim + i % layer.head_dim)]);
      }
    }
    EXPECT_NEAR(sum, slope, 1e-2 * std::abs(slope) + 1e-4) << i;
  }
}

// What a bias is on average over positions, and how far it moves around that, by turning it to each of them.
TEST(KeyOffsets, AreThoseOfABiasTurnedToEveryPosition) {
  int seen = 0;
  for (const testing::TinyModel& tiny : testing::tiny_models()) {
    const ChangeableModel m(tiny);
    for (size_t l = 0; l < m.model()->shape().layers.size(); ++l) {
      const ModelShape::Layer& layer = m.model()->shape().layers[l];
      if (!tiny.qkv_bias) {
        EXPECT_TRUE(layer.key_center.empty());
        continue;
      }
      const auto* bias = static_cast<const float*>(m.inside().weights().get("blk." + std::to_string(l) + ".attn_k.bias")->data);
      const int dim = layer.head_dim, half = dim / 2;
      ASSERT_EQ(layer.key_center.size(), static_cast<size_t>(layer.kv_heads * dim));
      const int64_t positions = m.model()->shape().context_tokens;
      double least = INFINITY, most = 0;
      for (int h = 0; h < layer.kv_heads; ++h) {
        for (int i = 0; i < half; ++i) {
          const bool neox = tiny.architecture != "llama";
          const int a = h * dim + (neox ? i : 2 * i), b = h * dim + (neox ? i + half : 2 * i + 1);
          double x = 0, y = 0, squares = 0;
          for (int64_t p = 0; p < positions; ++p) {
            const double angle = static_cast<double>(p) * std::pow(static_cast<double>(tiny.rope_base), -2.0 * i / dim);
            const double c = std::cos(angle), s = std::sin(angle);
            const double px = static_cast<double>(bias[a]) * c - static_cast<double>(bias[b]) * s;
            const double py = static_cast<double>(bias[a]) * s + static_cast<double>(bias[b]) * c;
            x += px / static_cast<double>(positions), y += py / static_cast<double>(positions);
            squares += (px * px + py * py) / static_cast<double>(positions);
          }
          EXPECT_NEAR(static_cast<double>(layer.key_center[static_cast<size_t>(a)]), x, 1e-5);
          EXPECT_NEAR(static_cast<double>(layer.key_center[static_cast<size_t>(b)]), y, 1e-5);
          const double size = std::sqrt(squares - x * x - y * y + 9);
          least = std::min(least, size), most = std::max(most, size);
          if (layer.key_sizes.empty()) continue;
          EXPECT_NEAR(static_cast<double>(layer.key_sizes[static_cast<size_t>(a)]), size, 1e-4);
          EXPECT_NEAR(static_cast<double>(layer.key_sizes[static_cast<size_t>(b)]), size, 1e-4);
        }
      }
      EXPECT_EQ(layer.key_sizes.empty(), most <= 2 * least);
      ++seen;
    }
  }
  EXPECT_GT(seen, 0);
}

// A measurement that stops between two layers goes on there, and ends as one that never stopped.
TEST(Sensitivities, ResumeLayerByLayer) {
  const ChangeableModel m({.architecture = "qwen2", .layers = 3, .qkv_bias = true});
  std::vector<std::vector<Token>> prompts;
  for (unsigned p = 0; p < 3; ++p) prompts.push_back(testing::random_tokens(500, m.model()->vocab_size(), 40 + p));
  Profile fresh;
  fresh.fingerprint = m.model()->shape().fingerprint;
  SensitivityOptions options;
  options.metric = "fisher";
  options.windows = 2;
  options.tokens = 500;
  options.threads = 2;
  int saves = 0;
  options.partial = [&](const Profile&) { ++saves; };
  Profile whole = fresh;
  profile_sensitivity(m.model(), prompts, options, whole, {});
  EXPECT_EQ(whole.prompts, 3);
  EXPECT_EQ(whole.windows, (std::vector<int>{2, 2, 2}));
  const int all = saves;
  // Keys of few bits have both fits, with every transform that was calibrated; wide keys one, values none that shrinks them.
  for (const Profile::Sensitivity& s : whole.sensitivities) {
    const CodecSpec codec = parse_codec(s.codec);
    if (s.side == Side::kValue) {
      EXPECT_NE(codec.fit, Fit::kLeastSquares) << s.codec;
    } else if (codec.fit == Fit::kUnbiased) {
      EXPECT_LE(codec.bits, 4);
    }
  }
  for (const Side side : {Side::kKey, Side::kValue}) {
    EXPECT_TRUE(std::ranges::any_of(whole.sensitivities, [side](const Profile::Sensitivity& s) {
      return s.side == side && parse_codec(s.codec).fit == Fit::kUnbiased && s.transform == "scaled-feedback" &&
             s.metric == "fisher";
    }));
  }

  for (const int stop : {1, 2, 5}) {
    SCOPED_TRACE(stop);
    Profile part = fresh;
    saves = 0;
    try {
      profile_sensitivity(m.model(), prompts, options, part, [&](double, double, const std::string&) { return saves < stop; });
      FAIL() << "was not stopped";
    } catch (const Error& e) {
      EXPECT_EQ(e.status(), Status::kCancelled);
    }
    EXPECT_EQ(saves, stop);
    part = parse_profile(to_json(part), "profile.json");
    saves = 0;
    profile_sensitivity(m.model(), prompts, options, part, {});
    EXPECT_LE(saves, all - stop + 1);  // a pass whose layers are all there may be needed for its scores
    EXPECT_EQ(to_json(part), to_json(whole));
  }
}

// DecoQuant's decomposition is measured where asked for, also by a profile that was whole without it, and taken where it pays.
TEST(Sensitivities, OfDecoQuantsDecomposition) {
  const ChangeableModel m({.architecture = "llama"});
  const std::vector<std::vector<Token>> prompts{testing::random_tokens(500, m.model()->vocab_size(), 40)};
  Profile profile;
  profile.fingerprint = m.model()->shape().fingerprint;
  SensitivityOptions options;
  options.metric = "fisher";
  options.threads = 2;
  profile_sensitivity(m.model(), prompts, options, profile, {});
  const auto of_mpo = [](const Profile::Sensitivity& s) { return s.transform == "mpo" && s.metric == "fisher"; };
  EXPECT_EQ(std::ranges::count_if(profile.sensitivities, of_mpo), 0);
  options.mpo = true;
  profile_sensitivity(m.model(), prompts, options, profile, {});
  const auto made_of = [&](const Profile& by) {
    PlannerRequest request;
    request.model = &m.model()->shape();
    request.profile = &by;
    request.budget.context = 2048;
    request.budget.bits = 5.0;
    return make_plan("kvmix", request);
  };
  const auto with_mpo = [](const Plan& plan) {
    size_t sides = 0;
    for (const auto& layer : plan.layers) {
      for (const SideConfig* side : {&layer.key, &layer.value})
        sides += !side->transform.more.empty() && side->transform.more.front().name == "mpo" ? 1 : 0;
    }
    return sides;
  };
  const Plan usual = made_of(profile);
  const size_t sides = 2 * usual.layers.size();
  EXPECT_EQ(std::ranges::count_if(profile.transforms, [](const Profile::Transform& t) { return t.name == "mpo"; }),
            static_cast<std::ptrdiff_t>(sides));
  for (Profile::Sensitivity& s : profile.sensitivities) {
    if (!of_mpo(s)) continue;
    EXPECT_TRUE(std::isfinite(s.cost) && s.cost > 0) << s.layer << " " << s.codec;
    s.cost *= 1e-6;
  }
  const Plan cheap = made_of(profile);
  EXPECT_EQ(with_mpo(cheap), sides);
  EXPECT_EQ(with_mpo(parse_plan(to_json(cheap), "plan.json")), sides);
}

// On text that the model wrote, so that its labels are draws from its own distribution.
TEST(Fisher, IsNearTheDivergenceOfSmallErrors) {
  const ChangeableModel m({.architecture = "llama"});
  CalibrationOptions text;
  text.prompts = 1;
  text.tokens = 1000;
  const auto windows = calibration_prompts(m.model(), text, 1, {});
  Profile profile;
  profile.fingerprint = m.model()->shape().fingerprint;
  SensitivityOptions options;
  options.metric = "kl";
  options.threads = 1;
  profile_sensitivity(m.model(), windows, options, profile, {});
  EXPECT_EQ(profile.prompts, 1);  // the scores come with the window's pass
  double fisher = 0, kl = 0;
  double recent = 0;
  for (const auto& s : profile.sensitivities) {
    if (s.recent && s.metric == "kl") recent += s.cost;
    if (parse_codec(s.codec).bits != 3) continue;
    if (s.metric == "fisher") fisher += s.cost;
    if (s.metric == "kl") kl += s.cost;
  }
  EXPECT_GT(recent, 0);
  EXPECT_LT(recent, 0.05 * kl);
  EXPECT_GT(fisher, 0.5 * kl);
  EXPECT_LT(fisher, 2 * kl);
  ASSERT_EQ(profile.key_mean.size(), m.model()->shape().layers.size());
  const std::vector<LayerRows> rows = rows_of(m.inside(), windows[0]);
  const auto dim = static_cast<size_t>(m.model()->shape().layers[1].head_dim), n = windows[0].size();
  double sum = 0;  // layer 1, head 0, channel 3, behind 16 sinks
  for (size_t t = 16; t < n; ++t) sum += static_cast<double>(rows[1].keys[t * dim + 3]);
  EXPECT_NEAR(static_cast<double>(profile.key_mean[1][3]), sum / static_cast<double>(n - 16), 1e-4);
  options.fp16 = Fp16Part{.window = 32};
  EXPECT_THROW(profile_sensitivity(m.model(), windows, options, profile, {}), Error);
}

TEST(Calibration, TheBuiltInTextFillsLongWindows) {
  const ChangeableModel m({.architecture = "llama"});
  CalibrationOptions text;
  text.prompts = 20;
  text.tokens = 1000;
  text.file = kBuiltInText;
  const auto windows = calibration_prompts(m.model(), text, 1, {});
  ASSERT_EQ(windows.size(), 20u);
  for (const auto& window : windows) EXPECT_EQ(window.size(), 1000u);
  EXPECT_NE(windows[0], windows[1]);
  EXPECT_EQ(windows, calibration_prompts(m.model(), text, 1, {}));
  text.prompts = 1000;
  EXPECT_THROW(calibration_prompts(m.model(), text, 1, {}), Error);
}

TEST(Tasks, AreAnsweredByWhatBeginsWithTheAnswer) {
  EXPECT_TRUE(is_answer(" 42.\n", "42"));
  EXPECT_TRUE(is_answer("42", " 42 "));
  EXPECT_FALSE(is_answer("421", "42"));
  EXPECT_FALSE(is_answer("It is 42", "42"));
  EXPECT_FALSE(is_answer("4", "42"));
}

TEST(Tasks, FilesAreCheckedLineByLine) {
  const testing::TemporaryFolder folder("kvmix-tasks");
  const std::string path = folder.file("tasks.jsonl");
  const auto refused = [&](const std::string& content, const std::string& part) {
    std::ofstream(path) << content;
    try {
      read_tasks(path);
      ADD_FAILURE() << content;
    } catch (const Error& e) {
      EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
      EXPECT_NE(std::string(e.what()).find(path), std::string::npos) << e.what();
    }
  };
  const std::string good = "{\"prompt\": \"one\", \"answer\": \"1\"}\n";
  refused(good + "{\"prompt\": \"two\"}\n", "line 2 is not an object with a \"answer\"");
  refused(good + "\n{\"prompt\": 2, \"answer\": \"2\"}\n", "line 3");
  refused(good + "{\"prompt\": \"two\", \"answer\": \" \"}\n", "line 2");
  refused(good + "not json\n", "line 2");
  refused(good + "{\"prompt\": \"two\", \"answer\": \"2\", \"kind\": 2}\n", "line 2 is not an object with a \"kind\"");
  refused(good + good, "2 tasks");
  std::ofstream(path) << good + good + "\n{\"prompt\": \"two\", \"answer\": \"2\", \"kind\": \"sum\"}\n";
  const std::vector<Task> tasks = read_tasks(path);
  ASSERT_EQ(tasks.size(), 3u);
  EXPECT_EQ(tasks[0].kind, "");
  EXPECT_EQ(tasks[2].kind, "sum");
  EXPECT_THROW(read_tasks(folder.file("none.jsonl")), Error);
}

// The running cache answers what the model knows, with fp16 rows and with fine codes; wrong answers count.
TEST(Tasks, AreCountedWithTheRunningCache) {
  const auto model = Model::load(testing::model_file("smollm2"));
  std::vector<Task> tasks = {{"The capital of France is", "Paris"}, {"The capital of France is", "Rome"},
                             {"The capital of Italy is", "Rome"},   {"The capital of Italy is", "Paris"},
                             {"The capital of Spain is", "Madrid"}, {"The capital of Spain is", "London"}};
  const auto meter = make_task_meter(model, tasks, 2);
  EXPECT_FALSE(meter->in_nats());
  PlannerRequest request;
  request.model = &model->shape();
  request.options = {{"k-bits", "8"}, {"v-bits", "8"}};
  for (const Plan& plan : {f16_plan(model->shape()), make_plan("uniform", request)}) {
    EXPECT_EQ(meter->divergence(plan), (std::vector<double>{0, 1, 0, 1}));
    EXPECT_EQ(meter->held_out(plan), (std::vector<double>{0, 1}));
  }
  EXPECT_THROW(make_task_meter(model, {tasks[0], tasks[1]}, 2), Error);
  for (int i = 0; i < 9000; ++i) tasks[0].prompt += " and";
  EXPECT_THROW(make_task_meter(model, tasks, 2)->divergence(f16_plan(model->shape())), Error);
}

// Of the codecs of one width, the one that is measured.
bool least_fisher(const Profile& profile, const Profile::Sensitivity& of) {
  const auto fisher = [&](const Profile::Sensitivity& like) {
    for (const auto& s : profile.sensitivities) {
      if (s.metric == "fisher" && s.layer == like.layer && s.side == like.side && s.codec == like.codec &&
          s.transform == like.transform) {
        return s.cost;
      }
    }
    return -1.0;
  };
  for (const auto& s : profile.sensitivities) {
    if (s.metric == of.metric && s.layer == of.layer && s.side == of.side &&
        parse_codec(s.codec).bits == parse_codec(of.codec).bits && fisher(s) < fisher(of)) {
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
  Layerwise runner(m.inside(), 2, {});
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
  Profile profile;
  profile.fingerprint = m.model()->shape().fingerprint;
  profile_gradients(m.model(), windows, {.device = "cpu", .threads = 2, .partial = {}}, profile, {});
  SensitivityOptions options;
  options.metric = "kl";
  options.threads = 2;
  profile_sensitivity(m.model(), windows, options, profile, {});
  std::vector<EvalSubject> subjects;
  std::vector<double> measured;
  int global = 1;  // a layer that sees everything, not the first
  while (m.model()->shape().layers[static_cast<size_t>(global)].sliding_window > 0) ++global;
  for (const auto& s : profile.sensitivities) {
    const CodecSpec codec = parse_codec(s.codec);
    if (s.metric != "kl" || (s.layer != 0 && s.layer != global)) continue;
    if (codec.bits > 3 || !least_fisher(profile, s)) continue;  // the others follow by ratios
    Plan plan = f16_plan(m.model()->shape());
    set_fp16_part(profile.fp16, plan);
    auto& layer = plan.layers[static_cast<size_t>(s.layer)];
    SideConfig& side = s.side == Side::kKey ? layer.key : layer.value;
    side.codec = codec;
    side.transform = named_transform(m.model()->shape(), profile, s.layer, s.side, s.transform);
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
