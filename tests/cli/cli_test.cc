// The command line as it is used: help, refusals in one line, JSON, files written whole, Ctrl-C.
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <sstream>

#include "cli/program.h"

namespace kvmix {
namespace {

using nlohmann::json;
using testing::Outcome;
using testing::Program;

class Cli : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    shared_ = new testing::TemporaryFolder("kvmix-cli");
    model_ = shared_->file("tiny.gguf");
    testing::write_tiny_model({.architecture = "llama", .output_head = true}, model_);
  }
  static void TearDownTestSuite() { delete shared_; }

  Outcome run(const std::vector<std::string>& arguments, const std::string& input = "") const {
    return Program(folder_, arguments, input).wait();
  }

  // Fails with this status and one line that has all the words.
  void refuses(int status, const std::vector<std::string>& arguments, const std::vector<std::string>& words,
               const std::string& input = "") const {
    const Outcome o = run(arguments, input);
    std::string command;
    for (const auto& a : arguments) command += a.substr(0, 60) + " ";
    EXPECT_EQ(o.status, status) << command << "\n" << o.err;
    EXPECT_TRUE(o.err.starts_with("kvmix: ")) << command << "\n" << o.err;
    EXPECT_EQ(std::count(o.err.begin(), o.err.end(), '\n'), 1) << command << "\n" << o.err;
    EXPECT_EQ(o.out, "") << command;
    for (const auto& word : words) EXPECT_NE(o.err.find(word), std::string::npos) << command << "\n" << o.err;
  }

  std::string plan_file() const {
    const std::string path = folder_.file("plan.json");
    EXPECT_EQ(run({"plan", model_, "--planner", "uniform", "--k-bits", "4", "--v-bits", "4", "-o", path}).status, 0);
    return path;
  }

  static testing::TemporaryFolder* shared_;
  static std::string model_;
  testing::TemporaryFolder folder_{"kvmix-cli-test"};
};
testing::TemporaryFolder* Cli::shared_ = nullptr;
std::string Cli::model_;

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
  }
  EXPECT_EQ(commands, 9);
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

TEST_F(Cli, TablesStandOnStandardOutputAndProgressOnTheOther) {
  const Outcome o = run({"plan", model_, "--planner", "uniform", "-o", folder_.file("plan.json")});
  EXPECT_EQ(o.status, 0);
  EXPECT_NE(o.out.find("layer"), std::string::npos);
  EXPECT_EQ(o.err, "");
  const Outcome quiet = run({"bench", model_, "--depths", "0", "--tokens", "1", "--repetitions", "1", "--quiet"});
  EXPECT_EQ(quiet.err, "");
  EXPECT_NE(quiet.out.find("f16"), std::string::npos);
}

TEST_F(Cli, PromptsThatCannotBeContinuedAreRefused) {
  refuses(2, {"generate", model_}, {"--prompt"});
  refuses(2, {"generate", model_, "-p", ""}, {"empty"});
  refuses(2, {"generate", model_, "-f", "-"}, {"standard input", "empty"});
  refuses(2, {"generate", model_, "-p", "caf\xe9"}, {"UTF-8", "offset 3"});
  refuses(2, {"generate", model_, "-f", model_}, {"UTF-8"});
  refuses(1, {"generate", model_, "-f", folder_.file("none")}, {"none"});
  refuses(2, {"generate", model_, "-f", "-"}, {"1024", "shorten"}, std::string(20000, 'x'));
  refuses(2, {"chat", model_}, {"chat template"});
}

TEST_F(Cli, FilesThatAreNotWhatTheyShouldBeAreRefused) {
  refuses(1, {"inspect", folder_.file("none")}, {"none"});
  refuses(1, {"generate", folder_.file("none"), "-p", "a"}, {"none"});
  const std::string broken = folder_.file("broken.gguf"), whole = testing::read_bytes(model_);
  testing::write_bytes(broken, whole.substr(0, whole.size() / 2));
  refuses(1, {"inspect", broken}, {"broken.gguf"});
  testing::write_bytes(broken, "KVMIXSEQ and no more");
  refuses(1, {"inspect", broken}, {"broken.gguf"});
  refuses(1, {"eval", model_, "--text", "-", "--plan", model_}, {"tiny.gguf"}, "some text");

  const std::string plan = plan_file();
  const json good = json::parse(testing::read_bytes(plan));
  const auto refused = [&](const json& value, const std::vector<std::string>& words) {
    testing::write_bytes(plan, value.dump());
    refuses(1, {"generate", model_, "-p", "a", "--plan", plan}, words);
  };
  json bad = good;
  bad["layers"][1]["key"]["bits"] = 7;
  refused(bad, {"plan.json", "bits", "7"});
  bad = good;
  bad["sinks"] = 1e300;
  refused(bad, {"plan.json", "sinks"});
  bad = good;
  bad["layers"].erase(0);
  refused(bad, {"layers"});
  bad = good;
  bad["surprise"] = 1;
  refused(bad, {"plan.json", "surprise"});
  bad = good;
  bad["fingerprint"] = "0123456789abcdef";
  refused(bad, {"another model"});
  EXPECT_EQ(run({"generate", model_, "-p", "a", "-n", "1", "--plan", plan, "--force"}).status, 0);
}

TEST_F(Cli, BudgetsThatCannotBeMetSayTheSmallest) {
  const std::string profile = folder_.file("profile.json"), plan = folder_.file("plan.json");
  ASSERT_EQ(run({"profile", model_, "--prompts", "2", "--tokens", "64", "-o", profile}).status, 0);
  refuses(2, {"plan", model_, "--profile", profile, "--bits", "0.5", "--context", "1024", "-o", plan}, {"smallest"});
  refuses(2, {"plan", model_, "--profile", profile, "--fit", "1KiB", "--context", "1024", "-o", plan}, {"smallest"});
  EXPECT_FALSE(std::filesystem::exists(plan));
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

// A full disk, as the file size limit makes it.
TEST_F(Cli, AFileThatCannotBeWrittenIsNotLeftBehind) {
  const std::string plan = plan_file(), before = testing::read_bytes(plan);
  refuses(1, {"plan", model_, "--planner", "uniform", "-o", folder_.file("no/such/folder.json")}, {"folder.json"});
  signal(SIGXFSZ, SIG_IGN);  // inherited: the write fails instead
  rlimit old{};
  getrlimit(RLIMIT_FSIZE, &old);
  const rlimit small{200, old.rlim_max};
  setrlimit(RLIMIT_FSIZE, &small);
  const Outcome o = run({"plan", model_, "--planner", "uniform", "--k-bits", "2", "-o", plan});
  setrlimit(RLIMIT_FSIZE, &old);
  EXPECT_EQ(o.status, 1);
  EXPECT_NE(o.err.find("plan.json"), std::string::npos) << o.err;
  EXPECT_EQ(testing::read_bytes(plan), before);
  for (const auto& entry : std::filesystem::directory_iterator(std::filesystem::path(plan).parent_path())) {
    const std::string name = entry.path().filename();
    EXPECT_TRUE(name == "plan.json" || name == "stdout" || name == "stderr") << name << " was left behind";
  }
  const Outcome full = Program(folder_, {"list"}, "", false, "/dev/full").wait();
  EXPECT_EQ(full.status, 1);
  EXPECT_NE(full.err.find("standard output"), std::string::npos) << full.err;
}

TEST_F(Cli, CtrlCEndsWith130) {
  Program generating(folder_, {"generate", model_, "-p", "a", "-n", "100000", "--temperature", "0.5"});
  ASSERT_TRUE(generating.until([&] { return !generating.out().empty(); }));
  generating.interrupt();
  EXPECT_EQ(generating.wait().status, 130);

  const std::string profile = folder_.file("profile.json");
  Program profiling(folder_, {"profile", model_, "--prompts", "4000", "--tokens", "512", "-o", profile});
  ASSERT_TRUE(profiling.until([&] { return !profiling.err().empty(); }));
  profiling.interrupt();
  const Outcome stopped = profiling.wait();
  EXPECT_EQ(stopped.status, 130);
  EXPECT_NE(stopped.err.find("interrupted"), std::string::npos);
  EXPECT_FALSE(std::filesystem::exists(profile));
}

// A measurement that was stopped goes on where it was and ends in the same profile.
TEST_F(Cli, SensitivitiesResume) {
  const auto measure = [&](const std::string& file) {
    return std::vector<std::string>{"profile",       model_, "--prompts", "3", "--tokens", "400",
                                    "--sensitivity", "kl",   "--windows", "1", "-o",       folder_.file(file)};
  };
  ASSERT_EQ(run(measure("whole.json")).status, 0);
  const json whole = json::parse(testing::read_bytes(folder_.file("whole.json")));
  json part = whole;
  auto& kept = part["sensitivities"];
  kept.erase(std::remove_if(kept.begin(), kept.end(), [](const json& s) { return s["layer"] > 0; }), kept.end());
  const auto first_kl = [](json& list) -> json& {
    return *std::find_if(list.begin(), list.end(), [](const json& s) { return s["metric"] == "kl" && s["layer"] == 0; });
  };
  first_kl(kept)["cost"] = 123.5;  // what is there is not measured again
  testing::write_bytes(folder_.file("part.json"), part.dump());
  ASSERT_EQ(run(measure("part.json")).status, 0);
  json resumed = json::parse(testing::read_bytes(folder_.file("part.json")));
  ASSERT_EQ(resumed["sensitivities"].size(), whole["sensitivities"].size());
  EXPECT_EQ(first_kl(resumed["sensitivities"])["cost"], 123.5);
}

}  // namespace
}  // namespace kvmix
