// Damaged GGUF files end in kvmix::Error: never in a crash, and never in a model that crashes when it is used.
#include <gtest/gtest.h>

#include <cstring>

#include "kvmix/engine.h"
#include "kvmix/error.h"
#include "support/tiny_model.h"

namespace kvmix {
namespace {

constexpr int kFiles = 1000;

// Loads the file and, if that works, uses it. Returns whether it was refused.
bool refused(const std::string& path) {
  try {
    const auto model = Model::load(path);
    EngineOptions options;
    options.threads = 1;
    Engine engine(model, f16_plan(model->shape()), options);
    const std::vector<Token> tokens = model->tokenize("a tale of a \xc3\xa9 and \xff", true);
    engine.prefill(engine.cache().create(), tokens);
    model->detokenize(tokens);
    return false;
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()), "");
    return true;
  }
}

class HostileGguf : public ::testing::Test {
 protected:
  HostileGguf() : folder_("kvmix-hostile"), path_(folder_.file("model.gguf")) {
    testing::write_tiny_model(testing::tiny_models().front(), path_);
    bytes_ = testing::read_bytes(path_);
    // The data section follows the name of the last tensor closely.
    header_bytes_ = bytes_.rfind("ffn_down.weight") + 128;
  }
  bool refuses(const std::string& bytes) {
    testing::write_bytes(path_, bytes);
    return refused(path_);
  }
  // The same bytes with `from` replaced by `to` of equal length where it first stands.
  std::string replaced(const std::string& from, const std::string& to) const {
    std::string bytes = bytes_;
    bytes.replace(bytes.find(from), from.size(), to);
    return bytes;
  }

  testing::TemporaryFolder folder_;
  std::string path_, bytes_;
  size_t header_bytes_ = 0;
};

TEST_F(HostileGguf, TheIntactFileLoads) { EXPECT_FALSE(refused(path_)); }

TEST_F(HostileGguf, EveryTruncationIsRefused) {
  for (size_t n = 0; n < header_bytes_; n += 997) EXPECT_TRUE(refuses(bytes_.substr(0, n))) << n;
  EXPECT_TRUE(refuses(bytes_.substr(0, bytes_.size() - 64)));
}

TEST_F(HostileGguf, MislabelledFilesAreRefused) {
  EXPECT_TRUE(refuses("not a model"));
  EXPECT_TRUE(refuses(std::string(4096, '\0')));
  EXPECT_TRUE(refuses("GGUF" + std::string(4096, '\xff')));
  EXPECT_TRUE(refused(folder_.file("absent.gguf")));
}

TEST_F(HostileGguf, AMetadataKeyWithoutNameIsRefused) {
  // The first key's length stands behind magic, version and two counts.
  constexpr size_t kLengthAt = 24, kNameAt = 32;
  uint64_t length = 0;
  std::string bytes = bytes_;
  std::memcpy(&length, &bytes[kLengthAt], sizeof length);
  std::memset(&bytes[kLengthAt], 0, sizeof length);
  bytes.erase(kNameAt, length);
  EXPECT_TRUE(refuses(bytes));
}

TEST_F(HostileGguf, TwoTokensOfTheSameTextAreRefused) { EXPECT_TRUE(refuses(replaced("<0x41>", "<0x42>"))); }

TEST_F(HostileGguf, AByteTokenThatIsNoByteIsRefused) { EXPECT_TRUE(refuses(replaced("<0x41>", "(0x41)"))); }

TEST_F(HostileGguf, FlippedBitsAndBytesNeverCrash) {
  std::mt19937 random(11);
  int refusals = 0;
  for (int file = 0; file < kFiles; ++file) {
    std::string bytes = bytes_;
    for (unsigned changes = 1 + random() % 3; changes > 0; --changes) {
      char& byte = bytes[random() % header_bytes_];
      byte = random() % 2 == 0 ? static_cast<char>(byte ^ (1 << random() % 8)) : static_cast<char>(random());
    }
    refusals += refuses(bytes) ? 1 : 0;
  }
  EXPECT_GT(refusals, 0);
  RecordProperty("refused", refusals);
}

}  // namespace
}  // namespace kvmix
