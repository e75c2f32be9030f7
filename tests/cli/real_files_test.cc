// What people do with the program on real machines: names of other programs' caches, peers that cannot run, long commands that
// are stopped, texts that are one long word.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "cli/fixture.h"
#include "cli/terminal.h"

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

// Long commands that are stopped once the terminal shows that some rows are complete.
TEST_F(Cli, StoppedCommandsPrintTheRowsThatAreComplete) {
  std::string text;
  for (int i = 0; i < 20000; ++i) text += "the sea is a sea of words ";
  testing::write_bytes(folder_.file("text.txt"), text);
  struct Command {
    std::vector<std::string> words;
    std::string until;
    size_t least, most;  // rows
    const char* list;
  };
  const std::vector<std::string> eval = {"eval", model_, "--text", folder_.file("text.txt"), "--uniform", "2/2"};
  const auto with = [](std::vector<std::string> words, const std::vector<std::string>& more) {
    words.insert(words.end(), more.begin(), more.end());
    return words;
  };
  const std::vector<Command> commands = {
      {with(eval, {"--context", "64", "--windows", "0"}), "after 2 windows", 2, 2, "rows"},
      {with(eval, {"--generate", "--windows", "12", "--prompt-tokens", "64", "--tokens", "800"}), "uniform 2/2", 1, 1, "rows"},
      {{"eval", model_, "--needle", "--kinds", "key", "--contexts", "256,900", "--trials", "20", "--uniform", "2/2"},
       "f16, key at 900",
       5,
       15,
       "cells"},
      {{"bench", model_, "--depths", "0,100,900", "--tokens", "20", "--repetitions", "500", "--uniform", "2/2"},
       "at 100",
       2,
       4,
       "rows"}};
  for (const Command& command : commands) {
    for (const bool as_json : {false, true}) {
      testing::Terminal running(with(command.words, as_json ? std::vector<std::string>{"--json"} : std::vector<std::string>{}),
                                120);
      ASSERT_TRUE(running.shows(command.until)) << running.screen();
      if (as_json) {
        running.terminate();
      } else {
        running.type("\x03");
      }
      EXPECT_EQ(running.wait(), as_json ? 143 : 130) << running.screen();
      const std::string& screen = running.screen();
      EXPECT_NE(screen.find("kvmix: interrupted"), std::string::npos) << screen;
      if (!as_json) {
        EXPECT_NE(screen.find("stopped before the end"), std::string::npos) << screen;
        continue;
      }
      const size_t begin = screen.rfind("\n{") == std::string::npos ? screen.find('{') : screen.rfind("\n{") + 1;
      const json result = json::parse(screen.substr(begin, screen.rfind('}') + 1 - begin));
      EXPECT_EQ(result["interrupted"], true);
      EXPECT_GE(result[command.list].size(), command.least) << result;
      EXPECT_LE(result[command.list].size(), command.most) << result;
    }
  }
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
  const auto tokens = [&](const std::string& prompt, const std::vector<std::string>& more) {
    std::vector<std::string> command = {"generate", model_, "-p", prompt, "-n", "1", "--json", "--quiet"};
    command.insert(command.end(), more.begin(), more.end());
    return json::parse(run(command).out)["prompt_tokens"].get<int>();
  };
  EXPECT_LT(tokens("a</s>b", {"--special"}), tokens("a</s>b", {}));
  EXPECT_EQ(tokens("<s>a", {"--special"}), tokens("a", {"--special"}));  // a first token that is written out is the only one
}

TEST_F(Cli, AnEncodingsMarkIsNoText) {
  const auto tokens = [&](const std::string& prompt) {
    return json::parse(run({"generate", model_, "-f", "-", "-n", "1", "--json", "--quiet"}, prompt).out)["prompt_tokens"];
  };
  EXPECT_EQ(tokens("\xef\xbb\xbf"
                   "a tide"),
            tokens("a tide"));
}

// As when a download overwrites the file of a model that runs.
TEST_F(Cli, AModelThatIsCutShortWhileItRunsIsSaidToBe) {
  const std::string copy = folder_.file("copy.gguf");
  std::filesystem::copy_file(model_, copy);
  Program generating(folder_, {"generate", copy, "-p", "a", "-n", "100000", "--temperature", "0.5", "--threads", "1"});
  ASSERT_TRUE(generating.until([&] { return !generating.out().empty(); }));
  std::filesystem::resize_file(copy, 4096);
  const Outcome o = generating.wait();
  EXPECT_EQ(o.status, 1) << o.err;
  EXPECT_NE(o.err.find("kvmix: the model's file was cut short"), std::string::npos) << o.err;
}

TEST_F(Cli, ModelsAreFoundThroughLinksAndFromAnyFolder) {
  testing::write_tiny_model({.architecture = "llama", .parts = 2}, folder_.file("blobs with spaces"));
  // As in a cache of downloads: names in one folder, links to files of other names.
  std::filesystem::create_directory(folder_.file("names"));
  for (int part = 0; part < 2; ++part) {
    const std::string blob = folder_.file("blob" + std::to_string(part));
    std::filesystem::rename(testing::tiny_part(folder_.file("blobs with spaces"), part, 2), blob);
    std::filesystem::create_symlink(blob, testing::tiny_part(folder_.file("names/m\xc3\xb6"
                                                                          "del"),
                                                             part, 2));
  }
  const Outcome o = run({"inspect",
                         testing::tiny_part(folder_.file("names/m\xc3\xb6"
                                                         "del"),
                                            1, 2),
                         "--json"});
  EXPECT_EQ(o.status, 0) << o.err;
  std::filesystem::create_symlink(folder_.file("nowhere"), folder_.file("dangling.gguf"));
  refuses(1, {"generate", folder_.file("dangling.gguf"), "-p", "a"}, {"dangling.gguf", "No such file"});
  refuses(1, {"generate", folder_.file("names"), "-p", "a"}, {"names", "not a regular file"});
}

// Greedy text does not depend on how many threads there are, nor on what was asked before in the same process.
TEST_F(Cli, ThreadsDoNotChangeTheText) {
  const auto text = [&](const std::string& threads) {
    return json::parse(run({"generate", model_, "-p", "a tide is", "-n", "200", "--temperature", "0", "--cache", "4/4",
                            "--threads", threads, "--json", "--quiet"})
                           .out)["text"];
  };
  const json one = text("1");
  EXPECT_FALSE(one.get<std::string>().empty());
  for (const char* threads : {"2", "3", "5"}) EXPECT_EQ(text(threads), one) << threads;
}

TEST_F(Cli, ChatTemplatesAreNamedOrFilesOrRefused) {
  const auto prompt_tokens = [&](const std::string& chat_template) {
    const Outcome o =
        run({"generate", model_, "-p", "a", "-n", "1", "--chat", "--chat-template", chat_template, "--json", "--quiet"});
    EXPECT_EQ(o.status, 0) << o.err;
    return json::parse(o.out)["prompt_tokens"].get<int>();
  };
  EXPECT_GT(prompt_tokens("chatml"), 20);  // the words around the message are bytes to this vocabulary
  const std::string file = folder_.file("template.jinja");
  testing::write_bytes(file, "{% for m in messages %}{{ m.content }}{% endfor %}");
  const int bare = prompt_tokens(file);
  EXPECT_LT(bare, 5);
  testing::write_bytes(file, "{% for m in messages %}{{ m.content }}</s>{% endfor %}");
  EXPECT_EQ(prompt_tokens(file), bare + 1);
  testing::write_bytes(file, "{% for m in messages %}{{ m.content");
  const std::vector<std::string> command = {"generate", model_, "-p", "a", "--chat", "--chat-template"};
  const auto with = [&](const std::string& chat_template) {
    std::vector<std::string> words = command;
    words.push_back(chat_template);
    return words;
  };
  refuses(1, with(file), {"template.jinja", "cannot write"});
  refuses(1, with(folder_.file("none.jinja")), {"none.jinja", "check the path"});
  refuses(2, with("chatml2"), {"chatml2", "chatml,", "file with Jinja"});
  refuses(2, {"generate", model_, "-p", "a", "--chat-template", "chatml"}, {"--chat"});
  refuses(2, {"generate", model_, "-p", "a", "--chat"}, {"no chat template", "--chat-template"});
  testing::write_bytes(
      file,
      "{% if messages[0].role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}{{ messages[0].content }}");
  refuses(1, {"chat", model_, "--chat-template", file, "--system", "be brief"}, {"template.jinja", "no system messages"});
  const Outcome o = Program(folder_, {"chat", model_, "--chat-template", file, "-n", "3"}, "hello\n").wait();
  EXPECT_EQ(o.status, 0) << o.err;
}

}  // namespace
}  // namespace kvmix
