// The loader alone, without what runs a model: every kind of tiny model is read to its last weight, and what a file may have
// wrong is refused. Built under the address and undefined sanitizers too (preset fuzz).
#include <gtest/gtest.h>

#include "engine/model.h"
#include "kvmix/error.h"
#include "support/tiny_model.h"

namespace kvmix {
namespace {

using testing::TinyModel;

class Loader : public ::testing::Test {
 protected:
  // The message of the refusal; empty if the file is taken.
  static std::string refusal(const std::string& path) {
    try {
      read_all(path);
      return "";
    } catch (const Error& e) {
      return e.what();
    }
  }
  static void read_all(const std::string& path) {
    const auto model = Model::load(path);
    EXPECT_EQ(gguf_model(*model).not_finite(), "");
    const std::string text = "a tale of a \xc3\xa9 and <s> \xff";
    for (const bool special : {false, true}) EXPECT_FALSE(model->tokenize(text, true, special).empty());
    EXPECT_NE(model->detokenize(model->tokenize(text, false)).find("tale"), std::string::npos);
    EXPECT_GT(model->weight_bytes(), 0u);
  }

  testing::TemporaryFolder folder_{"kvmix-loader"};
  std::string path_ = folder_.file("model.gguf");
};

TEST_F(Loader, EveryTinyModelIsReadToTheEnd) {
  for (const TinyModel& tiny : testing::tiny_models()) {
    testing::write_tiny_model(tiny, path_);
    EXPECT_EQ(refusal(path_), "") << testing::tiny_name(tiny);
  }
}

TEST_F(Loader, SplitFilesAreReadFromAnyPart) {
  TinyModel tiny = testing::tiny_models().front();
  tiny.parts = 3;
  const std::string prefix = folder_.file("split");
  testing::write_tiny_model(tiny, prefix);
  for (int part = 0; part < 3; ++part) EXPECT_EQ(refusal(testing::tiny_part(prefix, part, 3)), "");
  std::filesystem::remove(testing::tiny_part(prefix, 1, 3));
  EXPECT_NE(refusal(testing::tiny_part(prefix, 0, 3)).find("00002-of-00003"), std::string::npos);
}

TEST_F(Loader, CutAndForeignFilesAreRefused) {
  testing::write_tiny_model(testing::tiny_models().front(), path_);
  const std::string bytes = testing::read_bytes(path_);
  for (size_t n = 0; n < bytes.size(); n += 1 + bytes.size() / 200) {
    testing::write_bytes(path_, bytes.substr(0, n));
    EXPECT_NE(refusal(path_), "") << n;
  }
  TinyModel odd = testing::tiny_models().front();
  odd.extra_tensor = "blk.0.surprise.weight";
  testing::write_tiny_model(odd, path_);
  EXPECT_NE(refusal(path_).find("blk.0.surprise.weight"), std::string::npos);
}

}  // namespace
}  // namespace kvmix
