// Conversations: on a real model, and on tiny ones that are led to the end of their context.
#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <sstream>

#include "cli/program.h"
#include "support/models.h"

namespace kvmix {
namespace {

using testing::Program;

TEST(Chat, AnswersTurnsAndStopsAnAnswerOnCtrlC) {
  const testing::TemporaryFolder folder("kvmix-chat");
  Program chat(folder, {"chat", testing::model_file("smollm2"), "--cache", "4/4", "--temperature", "0", "-n", "1500"},
               "Write a long story about the sea and its people.\n", true);
  ASSERT_TRUE(chat.until([&] { return chat.out().size() > 20; })) << chat.err();
  chat.interrupt();
  const auto closing_lines = [&] {
    const std::string err = chat.err();
    return std::count(err.begin(), err.end(), '[');
  };
  ASSERT_TRUE(chat.until([&] { return closing_lines() == 1; })) << chat.err();
  EXPECT_NE(chat.err().find("cancelled"), std::string::npos) << chat.err();
  // The program lives on: the next message is refused in one line, the one after it answered.
  chat.send("\xff\xfe\n");
  ASSERT_TRUE(chat.until([&] { return chat.err().find("UTF-8") != std::string::npos; })) << chat.err();
  const size_t before = chat.out().size();
  chat.send("What is the capital of France? One word.\n");
  chat.close_input();
  const testing::Outcome o = chat.wait();
  EXPECT_EQ(o.status, 0) << o.err;
  EXPECT_NE(o.out.substr(before).find("Paris"), std::string::npos) << o.out.substr(before);
}

// What other programs shift to make room fails there with packed caches. Here a conversation that fills the context is told so,
// message by message, whatever its cache, and goes on once it is cleared.
TEST(Chat, FillsTheContextAndGoesOnOnceItIsCleared) {
  const testing::TemporaryFolder folder("kvmix-chat");
  testing::TinyModel llama{.architecture = "llama", .output_head = true};
  testing::TinyModel gemma{.architecture = "gemma3", .layers = 7, .qk_norm = true, .post_norms = true, .sliding_window = 96};
  for (testing::TinyModel tiny : {llama, gemma}) {
    tiny.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}";
    tiny.context = 320;
    const std::string model = folder.file(tiny.architecture + ".gguf");
    testing::write_tiny_model(tiny, model);
    for (const std::string cache : {"f16", "8/8", "4/4", "2/2"}) {
      // Eight messages of at least forty tokens fill it, even if every answer is empty.
      std::string input;
      for (int i = 0; i < 8; ++i) input += "tell me more of the sea and of its people " + std::to_string(i) + "\n";
      input += "/clear\nand now\n";
      const testing::Outcome o =
          Program(folder, {"chat", model, "--cache", cache, "--temperature", "0", "-n", "1000", "--json"}, input).wait();
      EXPECT_EQ(o.status, 0) << o.err;
      std::vector<nlohmann::json> answers;
      std::istringstream out(o.out);
      while (out >> std::ws && out.peek() != EOF) out >> answers.emplace_back();
      const auto refused = static_cast<size_t>(std::count(o.err.begin(), o.err.end(), '\n'));
      EXPECT_GT(refused, 0u) << tiny.architecture << " " << cache;
      EXPECT_EQ(answers.size() + refused, 9u) << o.err;
      EXPECT_NE(o.err.find("the model's context is 320"), std::string::npos) << o.err;
      ASSERT_GE(answers.size(), 2u);
      // The first answer after it was cleared read one message and nothing else.
      EXPECT_LT(answers.back()["prompt_tokens"], answers.front()["prompt_tokens"]);
    }
  }
}

}  // namespace
}  // namespace kvmix
