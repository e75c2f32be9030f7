// A conversation on a real model: the only kind that has a chat template.
#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>

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

}  // namespace
}  // namespace kvmix
