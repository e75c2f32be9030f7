// The command line as it is used: help, wrong command lines, tables and JSON, curves of plans.
#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <sstream>

#include "cli/fixture.h"

namespace kvmix {
namespace {

using nlohmann::json;
using testing::Cli;
using testing::Outcome;
using testing::Program;

TEST_F(Cli, EveryCommandHasHelpWithAnExample) {
  const Outcome root = run({"--help"});
  EXPECT_EQ(root.status, 0);
  std::istringstream lines(root.out.substr(root.out.find("Subcommands:")));
  std::string line;
  std::getline(lines, line);
  int commands = 0;
  while (std::getline(lines, line) && line.starts_with("  ")) {
    std::istringstream words(line);
    std::string name;
    words >> name;
    if (line[2] == ' ') continue;  // a wrapped description
    ++commands;
    const Outcome o = run({name, "--help"});
    EXPECT_EQ(o.status, 0) << name;
    EXPECT_NE(o.out.find("Example:\n  kvmix " + name), std::string::npos) << name;
    for (const char* option : {"--threads", "--json", "--quiet"}) EXPECT_NE(o.out.find(option), std::string::npos) << name;
    std::istringstream help(o.out.substr(0, o.out.find("Example:")));
    for (std::string shown; std::getline(help, shown);) EXPECT_LE(shown.size(), 80u) << name << ": " << shown;
  }
  EXPECT_EQ(commands, 10);
  EXPECT_EQ(run({"--version"}).status, 0);
}

TEST_F(Cli, WrongCommandLinesAreRefusedInOneLine) {
  refuses(2, {}, {"--help"});
  refuses(2, {"frobnicate"}, {"--help"});
  refuses(2, {"list", "--frobnicate"}, {"--frobnicate", "kvmix list --help"});
  refuses(2, {"list", "--threads", "1000"}, {"threads"});
  refuses(2, {"plan", model_, "--planner", "none"}, {"none", "uniform"});
  refuses(2, {"plan", model_, "--planner", "kvmix"}, {"--bits"});
  refuses(2, {"plan", model_, "--planner", "kvmix", "--bits", "3"}, {"--profile", "kvmix profile"});
  refuses(2, {"plan", model_, "--planner", "uniform", "--fit", "many"}, {"many", "64MiB"});
  refuses(2, {"plan", model_, "--planner", "uniform", "--k-bits", "7"}, {"7"});
  refuses(2, {"eval", model_}, {"--text"});
  refuses(2, {"eval", model_, "--text", model_, "--uniform", "4"}, {"UTF-8"});
  refuses(2, {"bench", model_, "--uniform", "four"}, {"four", "4/4"});
  refuses(2, {"bench", model_, "--depths", "100000"}, {"1024"});
}

TEST_F(Cli, ResultsAreJson) {
  const json listed = json::parse(run({"list", "--json"}).out);
  for (const char* part : {"codecs", "planners", "architectures", "kernels"}) EXPECT_FALSE(listed[part].empty()) << part;
  const std::string plan = plan_file();
  EXPECT_EQ(json::parse(run({"inspect", plan, "--json"}).out)["mean_key_bits"], 4.0);
  EXPECT_EQ(json::parse(run({"inspect", model_, "--json"}).out)["architecture"], "llama");
  const json generated = json::parse(run({"generate", model_, "-p", "a tide", "-n", "5", "--plan", plan, "--json"}).out);
  EXPECT_EQ(generated["new_tokens"], 5);
  EXPECT_GT(generated["cache_bytes"], 0);
  std::string text;
  for (int i = 0; i < 400; ++i) text += "the sea is a sea of words ";
  const json scored = json::parse(
      run({"eval", model_, "--text", "-", "--context", "256", "--windows", "1", "--uniform", "2/2", "--peer", "--json"}, text)
          .out);
  ASSERT_EQ(scored["rows"].size(), 5u);
  EXPECT_GT(scored["rows"][1]["kl_mean"], 0);
  const json timed = json::parse(
      run({"bench", model_, "--depths", "0,300", "--tokens", "2", "--repetitions", "1", "--plan", plan, "--json"}).out);
  ASSERT_EQ(timed["rows"].size(), 4u);
  for (const auto& row : timed["rows"]) EXPECT_GT(row["decode_tokens_per_s"], 0);
}

// Of what a model of random weights says, the longest part from the start that can be told to be all of an answer.
std::string answer_of(const std::string& said) {
  for (size_t n = said.size(); n-- > 1;) {
    const bool plain =
        std::all_of(said.begin(), said.begin() + static_cast<ptrdiff_t>(n), [](char c) { return c > ' ' && c <= '~'; });
    if (plain && std::isalnum(static_cast<unsigned char>(said[n])) == 0) return said.substr(0, n);
  }
  return "";
}

// What the f16 cache answers is taken for the right answer.
TEST_F(Cli, TasksAreScoredByKind) {
  const std::string file = folder_.file("tasks.jsonl");
  std::string text;
  for (int i = 0; i < 20; ++i) text += "the sea is a sea of words ";
  std::vector<json> tasks;
  const auto write = [&] {
    std::ofstream out(file);
    for (const json& task : tasks) out << task << "\n";
  };
  for (size_t i = 0; i < 16; ++i)
    tasks.push_back({{"prompt", text.substr(13 * i)}, {"answer", "words"}, {"kind", i % 2 == 0 ? "near" : "far"}});
  write();
  const std::vector<std::string> command = {"eval", model_, "--tasks", file, "--uniform", "1/1"};
  std::vector<std::string> with_json = command;
  with_json.emplace_back("--json");
  const json first = json::parse(run(with_json).out);
  ASSERT_EQ(first["rows"].size(), 2u);
  EXPECT_EQ(first["rows"][0]["solved"], 0);
  const std::vector<std::string> said = first["rows"][0]["answers"];
  ASSERT_EQ(said.size(), tasks.size());
  const auto plain = std::ranges::find_if(said, [](const std::string& t) { return !answer_of(t).empty(); });
  ASSERT_NE(plain, said.end());
  tasks = {
      {{"prompt", tasks[static_cast<size_t>(plain - said.begin())]["prompt"]}, {"answer", answer_of(*plain)}, {"kind", "near"}},
      {{"prompt", text}, {"answer", "words"}, {"kind", "far"}},
      {{"prompt", text}, {"answer", "words"}, {"kind", "near"}}};
  write();
  const json scored = json::parse(run(with_json).out);
  const json &f16 = scored["rows"][0], &coded = scored["rows"][1];
  EXPECT_EQ(f16["name"], "f16");
  EXPECT_EQ(f16["answered_rightly"], json({true, false, false}));
  EXPECT_EQ(f16["kinds"]["near"]["solved"], 1);
  EXPECT_EQ(f16["kinds"]["far"]["solved"], 0);
  EXPECT_NEAR(f16["accuracy"], 1.0 / 3, 1e-12);
  EXPECT_EQ(coded["solved"].get<int>() + coded["lost_against_f16"].get<int>(), 1);
  EXPECT_LT(coded["bits_per_element"], f16["bits_per_element"]);
  const Outcome table = run(command);
  EXPECT_EQ(table.status, 0) << table.err;
  for (const char* word : {"near", "far", "1/2", "0/1", "1/3", "33.3 %", "uniform 1/1"})
    EXPECT_NE(table.out.find(word), std::string::npos) << word << "\n" << table.out;
  std::vector<std::string> too_much = command;
  too_much.emplace_back("--needle");
  refuses(2, too_much, {"--tasks", "--needle"});
  std::ofstream(file) << R"({"prompt": "a", "answer": "b"})"
                      << "\n"
                      << R"({"prompt": "a", "answer": "b", "kind": 3})"
                      << "\n";
  refuses(1, command, {file, "line 2", "\"kind\""});
  refuses(1, {"eval", model_, "--tasks", folder_.file("none.jsonl")}, {"none.jsonl"});
  tasks[1]["prompt"] = std::string(5000, 'a');
  write();
  refuses(2, command, {"task", "context of 1024", "shorten"});
}

TEST_F(Cli, TablesStandOnStandardOutputAndProgressOnTheOther) {
  const Outcome o = run({"plan", model_, "--planner", "uniform", "-o", folder_.file("plan.json")});
  EXPECT_EQ(o.status, 0);
  EXPECT_NE(o.out.find("layer"), std::string::npos);
  EXPECT_EQ(o.err, "");
  const Outcome quiet = run({"bench", model_, "--depths", "0", "--tokens", "1", "--repetitions", "1", "--quiet"});
  EXPECT_EQ(quiet.err, "");
  EXPECT_NE(quiet.out.find("f16"), std::string::npos);
}

// One profile with divergences, for the tests of what plan does with it.
class CliPlans : public Cli {
 protected:
  static void SetUpTestSuite() {
    Cli::SetUpTestSuite();
    profile_ = shared_->file("measured.json");
    const testing::TemporaryFolder folder("kvmix-cli-profile");
    ASSERT_EQ(Program(folder, {"profile", model_, "--prompts", "1", "--tokens", "800", "--sensitivity", "kl", "--windows", "1",
                               "-o", profile_})
                  .wait()
                  .status,
              0);
  }
  static std::string profile_;
};
std::string CliPlans::profile_;

TEST_F(CliPlans, ACurveIsAFolderOfPlansAndAPicture) {
  const std::string plans = folder_.file("curve");
  for (const std::string planner : {"kvmix", "kvtuner"}) {
    const std::vector<std::string> command = {"plan",     model_, "--planner", planner, "--profile", profile_, "--pareto",
                                              "--points", "6",    "--context", "1024",  "-o",        plans};
    std::vector<std::string> as_json = command;
    as_json.emplace_back("--json");
    const json curve = json::parse(run(as_json).out);
    ASSERT_GE(curve["plans"].size(), 4u) << planner;
    const Outcome o = run(command);
    EXPECT_EQ(o.status, 0) << o.err;
    double bytes = 0, predicted = INFINITY;
    for (const auto& point : curve["plans"]) {
      const std::string file = point["plan"];
      EXPECT_NE(o.out.find(file), std::string::npos) << file;
      EXPECT_GT(point["bytes"], bytes);
      EXPECT_LE(point["predicted"], predicted);
      bytes = point["bytes"];
      predicted = point["predicted"];
      EXPECT_EQ(run({"generate", model_, "-p", "a", "-n", "1", "--plan", file}).status, 0) << file;
    }
    const std::string picture = testing::read_bytes(plans + "/pareto.svg");
    EXPECT_TRUE(picture.starts_with("<svg xmlns=")) << picture.substr(0, 80);
    EXPECT_TRUE(picture.ends_with("</svg>\n"));
    std::vector<std::string> report = {"report", model_, "-o", folder_.file("report.html"), "--pareto"};
    for (const auto& point : curve["plans"]) report.push_back(point["plan"]);
    EXPECT_EQ(run(report).status, 0);
    EXPECT_NE(testing::read_bytes(folder_.file("report.html")).find("Predicted loss against size"), std::string::npos);
  }
  refuses(2, {"plan", model_, "--planner", "uniform", "--pareto"}, {"uniform", "no budget"});
  refuses(2, {"plan", model_, "--profile", profile_, "--pareto", "--bits", "3"}, {"--pareto"});
  refuses(1, {"plan", model_, "--profile", profile_, "--pareto", "-o", model_ + "/no"}, {"tiny.gguf/no"});
}

TEST_F(CliPlans, APlanForLongerSequencesThanWereMeasuredSaysSo) {
  const std::vector<std::string> command = {"plan",   model_, "--profile", profile_,
                                            "--bits", "8",    "-o",        folder_.file("plan.json")};
  const auto with = [&](const std::string& context) {
    std::vector<std::string> all = command;
    all.insert(all.end(), {"--context", context});
    return run(all).out;
  };
  const std::string hint = "--tokens 1024";  // no more than the model takes
  EXPECT_NE(with("1024").find(hint), std::string::npos);
  EXPECT_NE(with("8192").find(hint), std::string::npos);
  EXPECT_EQ(with("800").find("--tokens"), std::string::npos);
}

TEST_F(CliPlans, PlansAreMeasuredAsAWhole) {
  const std::string plan = folder_.file("plan.json");
  for (const std::string planner : {"kvmix", "kvtuner"}) {
    const Outcome o = run({"plan", model_, "--planner", planner, "--profile", profile_, "--bits", "8", "--context", "1024",
                           "--measure", "3", "--windows", "1", "-o", plan});
    EXPECT_EQ(o.status, 0) << o.err;
    EXPECT_NE(o.err.find("measuring plans"), std::string::npos) << o.err;
    EXPECT_NE(json::parse(testing::read_bytes(plan))["note"].get<std::string>().find("plans measured"), std::string::npos);
  }
  refuses(2, {"plan", model_, "--planner", "uniform", "--measure", "10"}, {"uniform", "--measure"});
  refuses(2, {"plan", model_, "--profile", profile_, "--bits", "8", "--windows", "2"}, {"--measure"});
  refuses(2,
          {"plan", model_, "--profile", profile_, "--bits", "8", "--context", "1024", "--metric", "output", "--measure", "5"},
          {"output", "kvmix profile --sensitivity"});
  const std::string scores = folder_.file("scores.json");
  json bare = json::parse(testing::read_bytes(profile_));
  bare["sensitivities"] = json::array();
  testing::write_bytes(scores, bare.dump());
  refuses(2, {"plan", model_, "--profile", scores, "--bits", "8", "--context", "1024", "--measure", "5"},
          {"gradient scores", "kvmix profile --sensitivity"});
  refuses(2, {"plan", model_, "--planner", "kvtuner", "--profile", scores, "--bits", "8"},
          {"gradient scores", "kvmix profile --sensitivity"});
  testing::write_bytes(folder_.file("short.txt"), "a tide is a tide is a tide is a tide is a tide");
  refuses(2,
          {"plan", model_, "--profile", profile_, "--bits", "8", "--context", "1024", "--measure", "5", "--calib",
           folder_.file("short.txt"), "--quiet"},
          {"window"});
}

// A budget over both axes: every choice has its bytes, and what was chosen is written.
TEST_F(CliPlans, TokensAndBitsShareABudget) {
  const std::string plan = folder_.file("axes.json");
  const std::vector<std::string> command = {"plan",      model_, "--profile", profile_,      "--bits",    "5",
                                            "--context", "1024", "--axes",    "tokens,bits", "--windows", "1",
                                            "--needles", "1",    "-o",        plan};
  std::vector<std::string> as_json = command;
  as_json.emplace_back("--json");
  const Outcome o = run(as_json);
  ASSERT_EQ(o.status, 0) << o.err;
  const json made = json::parse(o.out);
  int chosen = 0, measured = 0;
  double budget = 0, best = INFINITY, chosen_kl = INFINITY;
  for (const auto& row : made["axes"]) {
    if (row["tokens"] == "all") budget = row["bytes"];
    if (row.contains("lost")) continue;
    ++measured;
    EXPECT_LE(row["bytes"].get<double>(), 1.02 * budget) << row;
    best = std::min(best, row["kl_mean"].get<double>());
    if (!row["chosen"]) continue;
    ++chosen;
    chosen_kl = row["kl_mean"];
    const json written = json::parse(testing::read_bytes(plan));
    EXPECT_EQ(written.contains("tokens"), row["tokens"] != "all") << row;
  }
  EXPECT_EQ(chosen, 1);
  EXPECT_GT(measured, 4);
  EXPECT_FALSE(made["why"].get<std::string>().empty());
  EXPECT_TRUE(made["held_out"].contains("kl_mean"));
  if (made["why"].get<std::string>().find("diverges least") != std::string::npos) {
    EXPECT_EQ(chosen_kl, best);
  }
  const Outcome words = run(command);
  EXPECT_NE(words.out.find("snapkv keep=0.5"), std::string::npos) << words.out;
  EXPECT_NE(words.out.find("* chosen"), std::string::npos) << words.out;

  std::vector<std::string> curve = {
      "plan",   model_,        "--profile", profile_, "--pareto", "--points",           "2",     "--context", "1024",
      "--axes", "tokens,bits", "--windows", "1",      "-o",       folder_.file("axes"), "--json"};
  const json curves = json::parse(run(curve).out);
  EXPECT_GT(curves["plans"].size(), 8u);
  EXPECT_NE(testing::read_bytes(curves["picture"]).find("snapkv keep=0.25"), std::string::npos);

  // The same with the tokens given: as many bytes, and nothing is measured.
  const std::vector<std::string> given = {"plan", model_,      "--profile", profile_, "--bits",
                                          "5",    "--context", "1024",      "-o",     plan};
  std::vector<std::string> kept = given;
  kept.insert(kept.end(), {"--tokens", "snapkv keep=0.5", "--json"});
  const json half = json::parse(run(kept).out);
  EXPECT_LE(half["bytes"].get<double>(), 1.02 * budget);
  EXPECT_GT(half["mean_key_bits"].get<double>(), 6);
  EXPECT_EQ(json::parse(testing::read_bytes(plan))["tokens"]["policy"], "snapkv");
  std::vector<std::string> wrong = given;
  wrong.insert(wrong.end(), {"--tokens", "snapvk"});
  refuses(2, wrong, {"snapvk", "snapkv"});
  wrong.back() = "h2o";
  wrong.insert(wrong.end(), {"--axes", "tokens,bits"});
  refuses(2, wrong, {"--tokens", "--axes"});

  refuses(2, {"plan", model_, "--planner", "uniform", "--axes", "tokens,bits"}, {"uniform", "--axes"});
  refuses(2, {"plan", model_, "--profile", profile_, "--bits", "5", "--axes", "tokens,bits", "--measure", "3"}, {"--measure"});
  refuses(2, {"plan", model_, "--profile", profile_, "--bits", "5", "--needles", "3"}, {"--needles", "--axes"});
  refuses(2, {"plan", model_, "--profile", profile_, "--bits", "5", "--axes", "ranks"}, {"--axes"});
}

TEST_F(CliPlans, RanksAndChannelsShareABudgetWithBits) {
  const std::string factors = folder_.file("all.gguf"), plan = folder_.file("axes.json"), half = folder_.file("half.gguf");
  ASSERT_EQ(run({"factorise", model_, "--method", "lorc", "--keep", "1", "-o", factors}).status, 0);
  const std::vector<std::string> command = {"plan", model_,      "--profile", profile_, "--bits",
                                            "4",    "--context", "1024",      "--axes", "bits,channels,rank",
                                            "-o",   plan,        "--windows", "1",      "--factors"};
  const auto with = [&](const std::string& file) {
    std::vector<std::string> all = command;
    all.push_back(file);
    return all;
  };
  std::vector<std::string> as_json = with(factors);
  as_json.emplace_back("--json");
  const Outcome o = run(as_json);
  ASSERT_EQ(o.status, 0) << o.err;
  const json made = json::parse(o.out);
  constexpr double kBudget = 4.0 / 8 * 3 * 2 * 2 * 32 * 1024;  // of layers, sides, KV heads, channels and tokens
  int ranks = 0, thin = 0;
  for (const auto& row : made["axes"]) {
    if (row.contains("lost")) continue;
    ranks += row["ranks"] != "none" ? 1 : 0;
    thin += row["channels"] != "all" ? 1 : 0;
    EXPECT_LE(row["bytes"].get<double>(), kBudget) << row;
    EXPECT_GT(row["bytes"].get<double>(), 0.9 * kBudget) << row;
    EXPECT_GT(row["keys_kept"], 0.4) << row;
  }
  EXPECT_EQ(ranks, 3);
  EXPECT_GT(thin, 0);
  EXPECT_GT(made["quarter_left_out"]["keys"], 0);
  EXPECT_FALSE(made["why"].get<std::string>().empty());
  EXPECT_EQ(run({"generate", model_, "-p", "a tide", "-n", "2", "--plan", plan}).status, 0);

  ASSERT_EQ(run({"factorise", model_, "--method", "lorc", "--keep", "0.5", "-o", half}).status, 0);
  refuses(2, with(half), {"half.gguf", "--keep 1"});
  refuses(2, {"plan", model_, "--profile", profile_, "--bits", "5", "--axes", "bits,rank"}, {"--factors", "kvmix factorise"});
  refuses(2, {"plan", model_, "--profile", profile_, "--bits", "5", "--axes", "tokens,rank"}, {"no bits"});
  refuses(2, {"plan", model_, "--profile", profile_, "--bits", "5", "--axes", "bits,bits"}, {"twice"});
  refuses(2, {"plan", model_, "--profile", profile_, "--pareto", "--axes", "bits,channels"}, {"--pareto", "--axes"});
}

TEST_F(CliPlans, ReportsShowWhichTokensStay) {
  json plan = json::parse(testing::read_bytes(plan_file()));
  plan["tokens"] = {{"policy", "leankv"}, {"high", 2.0}, {"low", 0.5}};
  const std::string file = folder_.file("lean.json"), text = folder_.file("text.txt"), page = folder_.file("live.html");
  testing::write_bytes(file, plan.dump());
  std::string words;
  for (int i = 0; i < 300; ++i) words += "the tide number " + std::to_string(i) + " comes in. ";
  testing::write_bytes(text, words);
  const Outcome o = run({"report", model_, "--plan", file, "--text", text, "--context", "400", "-o", page, "--json"});
  ASSERT_EQ(o.status, 0) << o.err;
  const json live = json::parse(o.out)["live"][0];
  EXPECT_EQ(live["tokens"], 400);
  ASSERT_FALSE(live["heads"].empty());
  for (const auto& head : live["heads"]) {
    int64_t n = 0, last = -1;
    for (const auto& range : head["positions"]) {
      EXPECT_GT(range[0].get<int64_t>(), last);
      EXPECT_GE(range[1], range[0]);
      last = range[1];
      n += range[1].get<int64_t>() - range[0].get<int64_t>() + 1;
    }
    EXPECT_EQ(head["kept"], n);
    EXPECT_EQ(last, 399);
  }
  const Outcome shown = run({"report", model_, "--plan", file, "--text", text, "--context", "400", "-o", page});
  EXPECT_NE(shown.out.find("a prompt of 400 tokens"), std::string::npos) << shown.out;
  EXPECT_NE(testing::read_bytes(page).find("Tokens that stay"), std::string::npos);
  refuses(2, {"report", model_, "--plan", plan_file(), "--text", text, "-o", page}, {"--text", "token policies"});
}

// What inspect says in words it says as JSON too.
TEST_F(CliPlans, RanksAndSizesAreShownInBothForms) {
  const std::string words = run({"inspect", profile_}).out;
  const json ranks = json::parse(run({"inspect", profile_, "--json"}).out)["rank_correlation"]["with_kl_at_2_bits"];
  ASSERT_TRUE(ranks.contains("output")) << ranks;
  char shown[64];
  std::snprintf(shown, sizeof shown, "%.3f together", ranks["output"]["together"].get<double>());
  EXPECT_NE(words.find(shown), std::string::npos) << shown << "\n" << words;
  const std::string plan = plan_file();
  const std::string sizes = run({"inspect", plan, "--model", model_}).out;
  const json as_json = json::parse(run({"inspect", plan, "--model", model_, "--json"}).out);
  EXPECT_NE(sizes.find("pages x " + as_json["formula"]["sealed_page_bytes"].dump() + " B"), std::string::npos) << sizes;
  EXPECT_EQ(as_json["sizes"][0]["context"], 1024);
}

TEST_F(CliPlans, SequencesShareTheBytes) {
  const std::string plan = folder_.file("plan.json");
  const Outcome o =
      run({"plan", model_, "--profile", profile_, "--fit", "8MiB", "--sequences", "20", "--context", "1024", "-o", plan});
  EXPECT_EQ(o.status, 0) << o.err;
  EXPECT_NE(o.out.find("20 sequences: "), std::string::npos) << o.out;
  EXPECT_NE(o.out.find("of 8.00 MiB"), std::string::npos) << o.out;
  const json made = json::parse(run({"plan", model_, "--profile", profile_, "--fit", "8MiB", "--sequences", "20", "--context",
                                     "1024", "-o", plan, "--json"})
                                    .out);
  EXPECT_LE(20 * made["bytes"].get<double>(), 8.0 * 1024 * 1024);
  refuses(2, {"plan", model_, "--profile", profile_, "--bits", "8", "--sequences", "20"}, {"--sequences", "--fit"});
}

}  // namespace
}  // namespace kvmix
