// What a person sees at a terminal: a conversation typed by hand, and progress bars that fit.
#include "cli/terminal.h"

#include <gtest/gtest.h>

#include <cstring>

#include "cli/program.h"
#include "support/models.h"

namespace kvmix {
namespace {

using testing::Terminal;

constexpr const char* kCtrlC = "\x03";
constexpr const char* kCtrlD = "\x04";

TEST(Terminal, AConversationIsTyped) {
  Terminal chat(
      {"chat", testing::model_file("smollm2"), "--cache", "4/4", "--temperature", "0", "-n", "1500", "--threads", "1"}, 80);
  ASSERT_TRUE(chat.shows("> ")) << chat.screen();
  const termios before = chat.settings();
  // Ctrl-C stops the answer.
  chat.type("Write a long story about the sea and its people.\r");
  ASSERT_TRUE(chat.shows("people.\r\n")) << chat.screen();
  ASSERT_TRUE(chat.shows(" ")) << chat.screen();  // between two words of the answer
  chat.type(kCtrlC);
  ASSERT_TRUE(chat.shows("cancelled]")) << chat.screen();
  ASSERT_TRUE(chat.shows("> ")) << chat.screen();
  chat.type("What is the capital of Spain? Fr\x7f\x7fOne word.\r");  // with two keys taken back
  ASSERT_TRUE(chat.shows("tokens/s after")) << chat.screen();
  ASSERT_TRUE(chat.shows("> ")) << chat.screen();
  // At the prompt it takes back the line; the conversation goes on.
  chat.type(std::string("never sent") + kCtrlC);
  ASSERT_TRUE(chat.shows("once more")) << chat.screen();
  ASSERT_TRUE(chat.shows("> ")) << chat.screen();
  // An arrow key and a letter of two bytes; a message of two lines.
  chat.type("\x1b[AGr\xc3\xbc\xc3\x9f mich: \\\rkurz.\r");
  ASSERT_TRUE(chat.shows("tokens/s after")) << chat.screen();
  ASSERT_TRUE(chat.shows("> ")) << chat.screen();
  chat.type(kCtrlD);
  EXPECT_EQ(chat.wait(), 0) << chat.screen();
  const termios after = chat.settings();
  EXPECT_EQ(after.c_lflag, before.c_lflag);
  EXPECT_EQ(after.c_iflag, before.c_iflag);
  EXPECT_EQ(chat.screen().find("kvmix: "), std::string::npos) << chat.screen();
}

TEST(Terminal, CtrlCTwiceAtThePromptEndsWith130) {
  Terminal chat({"chat", testing::model_file("smollm2"), "--threads", "1"}, 40);
  ASSERT_TRUE(chat.shows("> ")) << chat.screen();
  chat.type(kCtrlC);
  ASSERT_TRUE(chat.shows("once more")) << chat.screen();
  ASSERT_TRUE(chat.shows("> ")) << chat.screen();
  chat.type(kCtrlC);
  EXPECT_EQ(chat.wait(), 130) << chat.screen();
}

// Columns that a line takes: bytes that begin a character, without the sequence that clears the line.
size_t columns_of(std::string line) {
  for (size_t at; (at = line.find("\x1b[K")) != std::string::npos;) line.erase(at, 3);
  return static_cast<size_t>(std::count_if(line.begin(), line.end(), [](char c) { return (c & 0xC0) != 0x80; }));
}

TEST(Terminal, ProgressIsABarThatFitsAndGoes) {
  const testing::TemporaryFolder folder("kvmix-terminal");
  const std::string model = folder.file("tiny.gguf");
  testing::write_tiny_model({.architecture = "llama", .output_head = true}, model);
  for (const unsigned short columns : {80, 30}) {
    // Writing so much text takes more than the half second after which a bar tells the time that is left.
    Terminal profile({"profile", model, "--calib", "own", "--prompts", "120", "--tokens", "256", "--sensitivity", "none",
                      "--threads", "1", "-o", folder.file("profile.json")},
                     columns);
    EXPECT_EQ(profile.wait(), 0) << profile.screen();
    const std::string& screen = profile.screen();
    // Every state of the bar begins by clearing the one before.
    size_t bars = 0, last = 0;
    for (size_t at = screen.find("\r\x1b[K"); at != std::string::npos; at = screen.find("\r\x1b[K", at + 1)) {
      const std::string state = screen.substr(at + 1, screen.find('\r', at + 1) - at - 1);
      EXPECT_LT(columns_of(state), columns) << state;
      bars += state.find('%') != std::string::npos ? 1 : 0;
      last = at;
    }
    EXPECT_GT(bars, 3u) << screen;
    EXPECT_NE(screen.find(" left"), std::string::npos) << screen;
    EXPECT_LT(last, screen.find("layer")) << "the last bar is cleared before the table";
    EXPECT_EQ(screen.substr(last, 4 + 1).find('%'), std::string::npos);
  }
}

TEST(Terminal, CtrlCStopsAMeasurementWithAClearLine) {
  const testing::TemporaryFolder folder("kvmix-terminal");
  const std::string model = folder.file("tiny.gguf"), out = folder.file("profile.json");
  testing::write_tiny_model({.architecture = "llama", .output_head = true}, model);
  Terminal profile({"profile", model, "--calib", "own", "--prompts", "4000", "--tokens", "512", "--sensitivity", "none",
                    "--threads", "1", "-o", out},
                   80);
  ASSERT_TRUE(profile.shows("%")) << profile.screen();
  profile.type(kCtrlC);
  EXPECT_EQ(profile.wait(), 130) << profile.screen();
  EXPECT_TRUE(profile.screen().ends_with("\r\x1b[Kkvmix: interrupted\r\n")) << profile.screen();
  EXPECT_FALSE(std::filesystem::exists(out));
}

}  // namespace
}  // namespace kvmix
