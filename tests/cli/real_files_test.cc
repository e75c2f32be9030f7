// What people do with the program on real machines: names of other programs' caches, peers that cannot run, long commands that
// are stopped, texts that are one long word.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "cli/fixture.h"

namespace kvmix {
namespace {

using nlohmann::json;
using testing::Cli;
using testing::Outcome;
using testing::Program;

TEST_F(Cli, NamesOfOtherCachesAreExplained) {
  refuses(2, {"generate", model_, "-p", "a", "--cache", "q4_0"}, {"q4_0", "--cache 4/4", "--peer"});
  refuses(2, {"generate", model_, "-p", "a", "--cache", "q8_0"}, {"--cache 8/8"});
  refuses(2, {"generate", model_, "-p", "a", "--cache", "fp8"}, {"fp8", "f16", "4/4", "plan file"});
  refuses(1, {"generate", model_, "-p", "a", "--cache", "none.json"}, {"none.json", "check the path"});
}

TEST_F(Cli, APeerThatCannotRunLosesItsRowOnly) {
  const std::string narrow = folder_.file("narrow.gguf");
  testing::write_tiny_model({.architecture = "llama", .head_dim = 48}, narrow);
  std::string text;
  for (int i = 0; i < 400; ++i) text += "the sea is a sea of words ";
  const std::vector<std::string> peers = {"--uniform", "4/4", "--peer", "--peer-types", "f16,q4_0", "--json", "--quiet"};
  const auto with_peers = [&](std::vector<std::string> command) {
    command.insert(command.end(), peers.begin(), peers.end());
    return run(command, text);
  };
  for (const auto& command : {std::vector<std::string>{"eval", narrow, "--text", "-", "--context", "256", "--windows", "1"},
                              {"bench", narrow, "--depths", "0", "--tokens", "2", "--repetitions", "1"}}) {
    const Outcome o = with_peers(command);
    EXPECT_EQ(o.status, 0) << o.err;
    const json rows = json::parse(o.out)["rows"];
    ASSERT_EQ(rows.size(), 4u);
    EXPECT_FALSE(rows[2].contains("lost"));
    EXPECT_NE(rows[3]["lost"].get<std::string>().find("48"), std::string::npos) << rows[3];
    EXPECT_NE(o.err.find("llama.cpp q4_0 has no numbers"), std::string::npos) << o.err;
  }
}

TEST_F(Cli, StoppedEvaluationsPrintTheRowsThatAreComplete) {
  std::string text;
  for (int i = 0; i < 20000; ++i) text += "the sea is a sea of words ";
  testing::write_bytes(folder_.file("text.txt"), text);
  // Progress comes every ten seconds outside of terminals; windows of 64 tokens are complete long before.
  Program evaluating(folder_, {"eval", model_, "--text", folder_.file("text.txt"), "--context", "64", "--windows", "0",
                               "--uniform", "2/2", "--json"});
  ASSERT_TRUE(evaluating.until([&] { return !evaluating.err().empty(); }));
  std::this_thread::sleep_for(std::chrono::seconds(4));
  evaluating.terminate();
  const Outcome o = evaluating.wait();
  EXPECT_EQ(o.status, 143) << o.err;
  const json result = json::parse(o.out);
  EXPECT_EQ(result["interrupted"], true);
  ASSERT_EQ(result["rows"].size(), 2u);
  EXPECT_GT(result["rows"][1]["scored_tokens"], 0);

  Program timing(folder_, {"bench", model_, "--depths", "0,900", "--tokens", "100", "--repetitions", "1000", "--quiet"});
  std::this_thread::sleep_for(std::chrono::seconds(2));
  timing.interrupt();
  EXPECT_EQ(timing.wait().status, 130);
}

TEST_F(Cli, AModelWithNumbersThatAreNoneIsNotContinued) {
  const std::string bad = folder_.file("bad.gguf");
  testing::write_tiny_model({.architecture = "llama", .not_finite = "blk.1.ffn_up.weight"}, bad);
  refuses(1, {"generate", bad, "-p", "a", "-n", "4"}, {"bad.gguf", "layer 2", "blk.1.ffn_up.weight", "not finite"});
}

TEST_F(Cli, ALongWordIsReadOrRefused) {
  const std::string word(40000, 'x');
  refuses(2, {"generate", model_, "-f", "-"}, {"1024"}, word);
  refuses(2, {"generate", model_, "-f", "-"}, {"run of"}, std::string(700000, 'x'));
}

TEST_F(Cli, SpecialTokensInAPromptAreTakenOnRequest) {
  const auto tokens = [&](const std::vector<std::string>& more) {
    std::vector<std::string> command = {"generate", model_, "-p", "a</s>b", "-n", "1", "--json", "--quiet"};
    command.insert(command.end(), more.begin(), more.end());
    return json::parse(run(command).out)["prompt_tokens"].get<int>();
  };
  EXPECT_LT(tokens({"--special"}), tokens({}));
}

}  // namespace
}  // namespace kvmix
