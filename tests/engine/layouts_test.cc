// Files as they are found: split in parts, of other kinds, with tensors or keys that nothing reads, with numbers that are none.
// What is right is held to libllama in architecture_test.cc; here is what is said of the rest.
#include <gtest/gtest.h>

#include "kvmix/engine.h"
#include "kvmix/error.h"
#include "support/models.h"
#include "support/tiny_model.h"

namespace kvmix {
namespace {

using testing::TinyModel;

class Layouts : public ::testing::Test {
 protected:
  // The error of loading what was written for `m`; empty if it loads.
  std::string error_of(const TinyModel& m) const {
    testing::write_tiny_model(m, folder_.file("model.gguf"));
    return error_of_file("model.gguf");
  }
  std::string error_of_file(const std::string& name) const {
    try {
      Model::load(folder_.file(name));
      return "";
    } catch (const Error& e) {
      return e.what();
    }
  }
  static void expect_words(const std::string& error, const std::vector<std::string>& words) {
    for (const std::string& word : words) EXPECT_NE(error.find(word), std::string::npos) << word << " in: " << error;
    EXPECT_EQ(error.find('\n'), std::string::npos) << error;
  }
  testing::TemporaryFolder folder_{"kvmix-layouts"};
};

TEST_F(Layouts, SplitFilesOpenFromAnyPart) {
  testing::write_tiny_model({.architecture = "llama"}, folder_.file("whole.gguf"));
  testing::write_tiny_model({.architecture = "llama", .parts = 3}, folder_.file("split"));
  const auto whole = Model::load(folder_.file("whole.gguf"));
  for (int part = 0; part < 3; ++part) {
    const auto split = Model::load(testing::tiny_part(folder_.file("split"), part, 3));
    EXPECT_EQ(split->path(), testing::tiny_part(folder_.file("split"), 0, 3));
    EXPECT_EQ(split->shape().fingerprint, whole->shape().fingerprint);
    EXPECT_EQ(split->weight_bytes(), whole->weight_bytes());
  }
  Peer peer(testing::tiny_part(folder_.file("split"), 0, 3), "f16", 256, 1);
  std::filesystem::remove(testing::tiny_part(folder_.file("split"), 1, 3));
  expect_words(error_of_file("split-00003-of-00003.gguf"), {"split-00002-of-00003.gguf is missing", "3 files"});
  std::filesystem::rename(testing::tiny_part(folder_.file("split"), 2, 3), folder_.file("other.gguf"));
  expect_words(error_of_file("other.gguf"), {"part 3 of 3", "-00003-of-00003.gguf"});
}

TEST_F(Layouts, TensorsThatNothingReadsAreNamed) {
  for (const std::string name :
       {"blk.1.attn_sinks.weight", "blk.3.attn_norm.weight", "blk.0.attn_output.bias2", "surprise.weight"})
    expect_words(error_of({.architecture = "llama", .extra_tensor = name}), {"model.gguf", name, "nothing reads"});
  // libllama reads these in other architectures alone.
  expect_words(error_of({.architecture = "llama", .qk_norm = true}), {"attn_k_norm.weight"});
  expect_words(error_of({.architecture = "qwen3"}), {"model.gguf", "attn_k_norm.weight is missing"});
  expect_words(error_of({.architecture = "qwen2", .rope_factors = true}), {"rope_freqs.weight"});
}

TEST_F(Layouts, KeysThatChangeTheGraphAreNamed) {
  for (const std::string key : {"llama.nextn_predict_layers", "llama.expert_count"})
    EXPECT_NE(error_of({.architecture = "llama", .extra_number = key}), "") << key;
  expect_words(error_of({.architecture = "llama", .extra_number = "llama.nextn_predict_layers"}), {"nextn_predict_layers"});
  expect_words(error_of({.architecture = "llama", .extra_number = "llama.attention.key_length_swa"}),
               {"key_length_swa", "is 1"});
  EXPECT_EQ(error_of({.architecture = "llama", .extra_number = "llama.a_note"}), "");
}

TEST_F(Layouts, OtherKindsOfFilesAreCalledByTheirName) {
  const auto write = [&](const std::vector<std::pair<std::string, std::string>>& texts) {
    const std::unique_ptr<gguf_context, decltype(&gguf_free)> gguf(gguf_init_empty(), gguf_free);
    for (const auto& [key, text] : texts) gguf_set_val_str(gguf.get(), key.c_str(), text.c_str());
    ASSERT_TRUE(gguf_write_to_file(gguf.get(), folder_.file("other.gguf").c_str(), false));
  };
  write({{"general.type", "adapter"}, {"general.architecture", "llama"}});
  expect_words(error_of_file("other.gguf"), {"LoRA"});
  write({{"general.type", "imatrix"}});
  expect_words(error_of_file("other.gguf"), {"importance matrix"});
  write({{"general.architecture", "clip"}});
  expect_words(error_of_file("other.gguf"), {"mmproj"});
  write({{"general.architecture", "llama"}, {"tokenizer.ggml.model", "llama"}});
  expect_words(error_of_file("other.gguf"), {"vocabulary without weights"});
  std::string bytes = testing::read_bytes(folder_.file("other.gguf"));
  bytes[4] = 1;
  testing::write_bytes(folder_.file("other.gguf"), bytes);
  expect_words(error_of_file("other.gguf"), {"version 1"});
  bytes[4] = 0;
  bytes[7] = 3;
  testing::write_bytes(folder_.file("other.gguf"), bytes);
  expect_words(error_of_file("other.gguf"), {"big-endian"});
}

TEST_F(Layouts, TheReasonThatLibllamaGivesIsPassedOn) {
  expect_words(error_of({.architecture = "llama", .pre = "of-tomorrow"}),
               {"model.gguf", "unknown pre-tokenizer type", "of-tomorrow"});

  testing::write_tiny_model({.architecture = "llama", .head_dim = 48}, folder_.file("narrow.gguf"));
  try {
    Peer peer(folder_.file("narrow.gguf"), "q4_0", 256, 1);
    ADD_FAILURE() << "a head of 48 in blocks of 32";
  } catch (const Error& e) {
    expect_words(e.what(), {"llama.cpp q4_0", "32", "48"});
  }
}

// Its assertions do not end the process: a window that no layer has.
TEST_F(Layouts, AssertionsOfLibllamaAreErrors) {
  testing::write_tiny_model(
      {.architecture = "gemma3", .layers = 4, .qk_norm = true, .post_norms = true, .sliding_window = 96, .pattern = {1}},
      folder_.file("model.gguf"));
  const auto model = Model::load(folder_.file("model.gguf"));
  for (const auto& layer : model->shape().layers) EXPECT_EQ(layer.sliding_window, 0);
  EXPECT_THROW(
      {
        Peer peer(model->path(), "f16", 256, 1);
        peer.step(std::vector<Token>{1, 2, 3}, true);
      },
      Error);
}

TEST_F(Layouts, NumbersThatAreNoneStopTheStepAndNameTheTensor) {
  for (const std::string name :
       {"blk.1.attn_v.weight", "blk.0.ffn_down.weight", "blk.2.ffn_norm.weight", "output_norm.weight"}) {
    testing::write_tiny_model({.architecture = "llama", .not_finite = name}, folder_.file("model.gguf"));
    const auto model = Model::load(folder_.file("model.gguf"));
    EngineOptions options;
    options.threads = 2;
    Engine engine(model, f16_plan(model->shape()), options);
    const SequenceId id = engine.cache().create();
    try {
      engine.prefill(id, std::vector<Token>{1, 5, 6, 7});
      ADD_FAILURE() << name;
    } catch (const Error& e) {
      expect_words(e.what(), {"not finite", name, "layer"});
    }
    EXPECT_EQ(engine.cache().length(id), 0) << name;
  }
}

// The tokenizer of this model takes words apart with std::regex: on the usual stack 27,000 equal characters are a crash.
TEST_F(Layouts, LongRunsOfOneCharacterAreTokenisedOrRefused) {
  const auto model = Model::load(testing::model_file("smollm2"));
  for (const size_t n : {size_t{2000}, size_t{27000}, size_t{100000}}) {
    const std::string word(n, 'a');
    EXPECT_EQ(model->detokenize(model->tokenize(word, false)), word);
  }
  EXPECT_THROW(model->tokenize(std::string(2000000, 'a'), false), Error);
}

TEST_F(Layouts, NamesHaveNoControlCharacters) {
  testing::write_tiny_model({.architecture = "llama", .name_ending = "\x1b[31m\nred"}, folder_.file("model.gguf"));
  EXPECT_EQ(Model::load(folder_.file("model.gguf"))->shape().name, "tiny llama [31m red");
}

}  // namespace
}  // namespace kvmix
