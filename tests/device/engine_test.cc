// Whole models on a CUDA device against the same on the CPU: every architecture on tiny random weights.
#include "kvmix/engine.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iterator>
#include <span>
#include <utility>
#include <vector>

#include "engine/model.h"
#include "kvmix/error.h"
#include "profile/gradients.h"
#include "support/devices.h"
#include "support/divergence.h"
#include "support/tiny_model.h"

namespace kvmix {
namespace {

using testing::divergence;

// The device has kernels for heads of 64 numbers, not for the 32 that tiny models have otherwise; and products of its own for
// weights of 16 bits, with norms, biases, sums, both gates and rotations in their launches.
std::vector<testing::TinyModel> models() {
  std::vector<testing::TinyModel> all = testing::tiny_models();
  const size_t count = all.size();
  for (size_t i = 0; i < count; ++i) {
    const testing::TinyModel m = all[i];
    if (!m.pattern.empty()) continue;
    all.push_back(m), all.back().matrices = "f16";
  }
  for (testing::TinyModel& m : all) m.head_dim = 64;
  return all;
}

// Products of fp32 are to be fp32's: cuBLAS would round them to TF32, and numbers near the middle between two codes would be
// coded otherwise than on the CPU. It reads this when the device is first used.
const int kNoTf32 = setenv("NVIDIA_TF32_OVERRIDE", "0", 1);

// How many numbers stand in one of two ascending lists alone.
template <class Number>
size_t apart(const std::vector<Number>& ours, const std::vector<Number>& theirs) {
  std::vector<Number> alone;
  std::set_symmetric_difference(ours.begin(), ours.end(), theirs.begin(), theirs.end(), std::back_inserter(alone));
  return alone.size();
}

class DeviceEngine : public ::testing::TestWithParam<testing::TinyModel> {
 protected:
  DeviceEngine() : folder_("kvmix-device") {}
  void SetUp() override {
    ASSERT_EQ(kNoTf32, 0);
    if (!testing::has_device("cuda")) return;
    testing::write_tiny_model(GetParam(), folder_.file("model.gguf"));
    model_ = Model::load(folder_.file("model.gguf"));
    tokens_ = testing::random_tokens(900, model_->vocab_size(), 3);
  }
  // Keys and values of `bits`, and rows of open pages as the device keeps them, f16 or of 8 bits.
  Plan plan(int bits, const char* recent = "f16") const {
    Plan plan = f16_plan(model_->shape());
    if (bits == 16) return plan;
    PlannerRequest request;
    request.model = &model_->shape();
    request.options = {{"k-bits", std::to_string(bits)}, {"v-bits", std::to_string(bits)}, {"recent", recent}};
    return make_plan("uniform", request);
  }
  std::unique_ptr<Engine> engine(const char* device, int bits, const char* recent = "f16") const {
    return engine(device, plan(bits, recent));
  }
  std::unique_ptr<Engine> engine(const char* device, const Plan& plan) const {
    EngineOptions options;
    options.device = device;
    if (options.device == "cpu") options.kernel = "portable";  // others round more than the device does
    options.threads = 2;
    return std::make_unique<Engine>(model_, plan, options);
  }
  // Mean divergence of rows of logits.
  double mean_divergence(std::span<const float> cpu, std::span<const float> device) const {
    EXPECT_EQ(cpu.size(), device.size());
    const auto vocab = static_cast<size_t>(model_->vocab_size());
    double mean = 0;
    for (size_t at = 0; at + vocab <= std::min(cpu.size(), device.size()); at += vocab) {
      mean += divergence(cpu.subspan(at, vocab), device.subspan(at, vocab)) / static_cast<double>(cpu.size() / vocab);
    }
    return mean;
  }
  void expect_close(std::span<const float> cpu, std::span<const float> device, const std::string& what) const {
    EXPECT_LT(mean_divergence(cpu, device), 1e-3) << what;  // nor is it NaN
  }

  // Sequences of these lengths after their prompts, in one engine.
  struct Batch {
    Batch(std::unique_ptr<Engine> made, std::span<const Token> tokens, std::span<const size_t> lengths)
        : engine(std::move(made)) {
      for (const size_t n : lengths) {
        ids.push_back(engine->cache().create());
        engine->prefill(ids.back(), tokens.first(n));
      }
    }
    std::vector<float> step(std::span<const std::span<const Token>> next) {
      std::vector<EngineItem> items;
      for (size_t s = 0; s < ids.size(); ++s) items.push_back({ids[s], next[s]});
      const auto logits = engine->step(items);
      return {logits.begin(), logits.end()};
    }
    std::unique_ptr<Engine> engine;
    std::vector<SequenceId> ids = {};
  };

  testing::TemporaryFolder folder_;
  std::shared_ptr<const Model> model_;
  std::vector<Token> tokens_;
};

TEST_P(DeviceEngine, APromptGivesTheLogitsOfTheCpu) {
  for (const int bits : {16, 4}) {
    const auto cpu = engine("cpu", bits), cuda = engine("cuda", bits);
    const EngineItem a{cpu->cache().create(), std::span(tokens_).first(450), true};
    const EngineItem b{cuda->cache().create(), std::span(tokens_).first(450), true};
    expect_close(cpu->step({&a, 1}), cuda->step({&b, 1}), std::to_string(bits) + " bits");
  }
}

// Forward and backward passes of a profile.
TEST_P(DeviceEngine, GradientsAreThoseOfTheCpu) {
  const auto pass = [&](const char* device, std::vector<LayerRows>& rows) {
    PassOptions options;
    options.device = device;
    options.threads = 2;
    options.rows = [&](size_t layer, const LayerRows& r) { rows[layer] = r; };
    rows.resize(model_->shape().layers.size());
    return differentiate(gguf_model(*model_), std::span(tokens_).first(300), options);
  };
  std::vector<LayerRows> cpu_rows, rows;
  const PassResult cpu = pass("cpu", cpu_rows), cuda = pass("cuda", rows);
  EXPECT_NEAR(cuda.loss, cpu.loss, 1e-3 * cpu.loss);
  for (size_t l = 0; l < rows.size(); ++l) {
    EXPECT_NEAR(cuda.key_norm[l], cpu.key_norm[l], 0.02 * cpu.key_norm[l]) << "layer " << l;
    EXPECT_NEAR(cuda.value_norm[l], cpu.value_norm[l], 0.02 * cpu.value_norm[l]) << "layer " << l;
    for (const auto part : {&LayerRows::queries, &LayerRows::keys, &LayerRows::values, &LayerRows::output_gradient}) {
      const std::vector<float>&expected = cpu_rows[l].*part, &got = rows[l].*part;
      ASSERT_EQ(got.size(), expected.size());
      double error = 0, energy = 0;
      for (size_t i = 0; i < got.size(); ++i) {
        error += std::pow(static_cast<double>(got[i] - expected[i]), 2);
        energy += std::pow(static_cast<double>(expected[i]), 2);
      }
      EXPECT_LT(error, 4e-4 * energy) << "layer " << l;  // ggml's CPU products round activations to 8 bits
    }
  }
}

// Long enough for pages to be begun and sealed in steps that are queued, captured and launched again, beside a prompt. A number
// in the middle between two codes may get either one: of 8 bits that shows in no step, of 4 bits it is a small part of what the
// codes cost.
TEST_P(DeviceEngine, ABatchDecodesAsOnTheCpu) {
  constexpr size_t kSteps = 160;
  const std::vector<size_t> lengths = {1, 140, 260, 383};
  for (const int bits : {8, 4}) {
    Batch cpu(engine("cpu", bits), tokens_, lengths), cuda(engine("cuda", bits), tokens_, lengths),
        exact(engine("cpu", 16), tokens_, lengths);
    double apart = 0, cost = 0;
    for (size_t t = 0; t < kSteps; ++t) {
      std::vector<std::span<const Token>> next;
      for (size_t s = 0; s < lengths.size(); ++s) {
        // Once, a prompt goes on beside the others.
        next.push_back(std::span(tokens_).subspan(lengths[s] + t, t == 50 && s == 1 ? 60 : 1));
      }
      const std::vector<float> expected = cpu.step(next);
      const double now = mean_divergence(expected, cuda.step(next));
      if (bits == 8) {
        ASSERT_LT(now, 1e-3) << "step " << t;
      }
      apart += now;
      cost += mean_divergence(exact.step(next), expected);
    }
    if (bits == 4) {
      EXPECT_LT(apart, 0.1 * cost);
    }
  }
}

// A sequence alone has a block a KV head: its warps share sealed pages and quarters of open ones.
TEST_P(DeviceEngine, OneSequenceDecodesAsOnTheCpu) {
  constexpr size_t kSteps = 40;
  for (const size_t prompt : {size_t{100}, size_t{370}}) {  // both past a page's end
    const size_t lengths[] = {prompt};
    for (const auto& [bits, recent] : {std::pair{16, "f16"}, std::pair{8, "f16"}, std::pair{8, "8"}}) {
      const std::string what =
          std::to_string(bits) + " bits, recent rows " + recent + ", " + std::to_string(prompt) + " tokens";
      Batch cpu(engine("cpu", bits, recent), tokens_, lengths), cuda(engine("cuda", bits, recent), tokens_, lengths),
          exact(engine("cpu", 16), tokens_, lengths);
      double apart = 0, cost = 0;  // means
      for (size_t t = 0; t < kSteps; ++t) {
        const std::span<const Token> next[] = {std::span(tokens_).subspan(prompt + t, 1)};
        const std::vector<float> expected = cpu.step(next);
        const double now = mean_divergence(expected, cuda.step(next));
        if (bits == 16) {
          ASSERT_LT(now, 1e-4) << what << ", step " << t;
        }
        apart += now / kSteps;
        cost += mean_divergence(exact.step(next), expected) / kSteps;
      }
      // A number near the middle between two codes may get the other one, which is as far off as rounding is.
      EXPECT_LT(apart, 2e-5 + 0.5 * cost) << what;
    }
  }
}

// Prompts of different lengths, read in chunks, of which a policy keeps a part; then decoding, by captured launches too.
TEST_P(DeviceEngine, APolicyKeepsTheTokensThatItKeepsOnTheCpu) {
  const size_t lengths[] = {700, 450};
  Plan governed = plan(4);
  governed.tokens = PolicySpec{"adakv", {{"keep", 0.3}}};
  Batch cpu(engine("cpu", governed), tokens_, lengths), cuda(engine("cuda", governed), tokens_, lengths);
  for (size_t s = 0; s < cpu.ids.size(); ++s) {
    for (int l = 0; l < static_cast<int>(model_->shape().layers.size()); ++l) {
      const auto ours = cuda.engine->cache().kept(cuda.ids[s], l), theirs = cpu.engine->cache().kept(cpu.ids[s], l);
      size_t tokens = 0, differ = 0;  // scores a rounding apart change places
      for (size_t h = 0; h < theirs.size(); ++h) {
        tokens += theirs[h].size(), differ += apart(ours[h], theirs[h]);
      }
      const double most = l == 0 ? 0.02 : 0.06;  // later layers see what attention before them has rounded
      EXPECT_LE(static_cast<double>(differ), most * static_cast<double>(tokens)) << "layer " << l;
    }
  }
  for (int i = 0; i < 200; ++i) {  // past a sealed page
    const auto at = static_cast<size_t>(700 + i % 200);
    const std::span<const Token> next[] = {std::span(tokens_).subspan(at, 1), std::span(tokens_).subspan(at, 1)};
    const auto a = cpu.step(next), b = cuda.step(next);
    if (i % 20 != 19) continue;
    EXPECT_LT(mean_divergence(a, b), 0.02) << "token " << i;
  }
}

// Prompts read in chunks, a second one behind the choice, and decoding by captured launches. What is chosen is what queries
// that are rounded to fp16 say, so that channels next to each other in importance may change places.
TEST_P(DeviceEngine, ChannelsAreChosenAsOnTheCpu) {
  const size_t lengths[] = {600, 450};
  Plan thin = plan(4);
  thin.channels = PolicySpec{"think", {{"keep", 0.75}}};
  Batch cpu(engine("cpu", thin), tokens_, lengths), cuda(engine("cuda", thin), tokens_, lengths);
  for (size_t s = 0; s < cpu.ids.size(); ++s) {
    for (int l = 0; l < static_cast<int>(model_->shape().layers.size()); ++l) {
      const auto ours = cuda.engine->cache().channels(cuda.ids[s], l), theirs = cpu.engine->cache().channels(cpu.ids[s], l);
      ASSERT_EQ(ours.size(), theirs.size());
      for (size_t h = 0; h < theirs.size(); ++h) {
        EXPECT_EQ(ours[h].size(), theirs[h].size());
        EXPECT_LE(apart(ours[h], theirs[h]), 4u) << "layer " << l << ", KV head " << h;
      }
    }
  }
  for (int i = 0; i < 200; ++i) {  // past a sealed page
    const auto at = static_cast<size_t>(600 + i % 200);
    const size_t n = i == 30 ? 70 : 1;
    const std::span<const Token> next[] = {std::span(tokens_).subspan(at, 1), std::span(tokens_).subspan(at, n)};
    const auto a = cpu.step(next), b = cuda.step(next);
    if (i % 20 != 19) continue;
    EXPECT_LT(mean_divergence(a, b), 0.02) << "token " << i;
  }
}

TEST_P(DeviceEngine, ACacheMovesToTheCpu) {
  const auto cpu = engine("cpu", 4), cuda = engine("cuda", 4);
  const SequenceId id = cuda->cache().create();
  cuda->prefill(id, std::span(tokens_).first(400));
  cuda->cache().save(id, folder_.file("cache"), cuda->cache_fingerprint());
  const SequenceId loaded = cpu->cache().load(folder_.file("cache"), cpu->cache_fingerprint());
  const std::span<const Token> next = std::span(tokens_).subspan(400, 5);
  const auto there = cuda->prefill(id, next);
  const std::vector<float> expected(there.begin(), there.end());
  expect_close(cpu->prefill(loaded, next), expected, "continued");
}

INSTANTIATE_TEST_SUITE_P(All, DeviceEngine, ::testing::ValuesIn(models()),
                         [](const auto& one) { return testing::tiny_name(one.param) + "_" + std::to_string(one.index); });

class DeviceErrors : public ::testing::Test {
 protected:
  DeviceErrors() : folder_("kvmix-device") {}
  std::string message(const testing::TinyModel& tiny, const std::string& device) const {
    testing::write_tiny_model(tiny, folder_.file("model.gguf"));
    const auto model = Model::load(folder_.file("model.gguf"));
    EngineOptions options;
    options.device = device;
    options.exact = true;  // the CPU's int8 products would differ by more than all else
    try {
      Engine engine(model, f16_plan(model->shape()), options);
      const Token token = 5;
      const EngineItem item{engine.cache().create(), {&token, 1}};
      engine.step({&item, 1});
    } catch (const Error& e) {
      return e.what();
    }
    return "";
  }
  testing::TemporaryFolder folder_;
};

TEST_F(DeviceErrors, AnUnknownDeviceIsNamed) {
  EXPECT_NE(message({.architecture = "llama"}, "tpu").find("device \"tpu\" is unknown"), std::string::npos);
}

TEST_F(DeviceErrors, AMissingDeviceSaysWhatToDo) {
  if (testing::missing_device("cuda").empty()) GTEST_SKIP() << "there is one";
  const std::string said = message({.architecture = "llama", .head_dim = 64}, "cuda");
  EXPECT_NE(said.find("device \"cuda\": "), std::string::npos) << said;
  EXPECT_NE(said.find("take the device \"cpu\""), std::string::npos) << said;
}

TEST_F(DeviceErrors, WhatTheDeviceLacksAndWhatIsNotFiniteIsNamed) {
  if (!testing::has_device("cuda")) return;
  EXPECT_NE(message({.architecture = "llama"}, "cuda").find("head_dim 32"), std::string::npos);
  const testing::TinyModel broken{.architecture = "llama", .head_dim = 64, .not_finite = "blk.1.ffn_up.weight"};
  const std::string said = message(broken, "cuda");
  EXPECT_NE(said.find("blk.1.ffn_up.weight"), std::string::npos) << said;
}

}  // namespace
}  // namespace kvmix
