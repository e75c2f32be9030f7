// What cannot work ends in one clear line with what to do, exit status 1 or 2 (130 after Ctrl-C), and nothing half-written.
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "cli/fixture.h"
#include "kvmix/cache.h"

namespace kvmix {
namespace {

using nlohmann::json;
using testing::Cli;
using testing::Outcome;
using testing::Program;

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
  refused(bad, {"plan.json", "another model of the same name", "0123456789abcdef", "kvmix plan", "--force"});
  EXPECT_EQ(run({"generate", model_, "-p", "a", "-n", "1", "--plan", plan, "--force"}).status, 0);
}

TEST_F(Cli, BudgetsThatCannotBeMetSayTheSmallest) {
  const std::string profile = folder_.file("profile.json"), plan = folder_.file("plan.json");
  ASSERT_EQ(run({"profile", model_, "--prompts", "2", "--tokens", "64", "--sensitivity", "none", "-o", profile}).status, 0);
  refuses(2, {"plan", model_, "--profile", profile, "--bits", "0.5", "--context", "1024", "-o", plan}, {"smallest"});
  refuses(2, {"plan", model_, "--profile", profile, "--fit", "1KiB", "--context", "1024", "-o", plan}, {"smallest"});
  EXPECT_FALSE(std::filesystem::exists(plan));
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

  std::string text;
  for (int i = 0; i < 20000; ++i) text += "the sea is a sea of words ";
  testing::write_bytes(folder_.file("text.txt"), text);
  Program evaluating(folder_, {"eval", model_, "--text", folder_.file("text.txt"), "--context", "512", "--windows", "0",
                               "--uniform", "2/2", "--json"});
  ASSERT_TRUE(evaluating.until([&] { return !evaluating.err().empty(); }));
  evaluating.interrupt();
  const Outcome cut = evaluating.wait();
  EXPECT_EQ(cut.status, 130);
  EXPECT_EQ(cut.out, "");

  const std::string profile = folder_.file("profile.json");
  Program profiling(folder_, {"profile", model_, "--calib", "own", "--prompts", "4000", "--tokens", "512", "--sensitivity",
                              "none", "-o", profile});
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
  // Not what was measured on other text, which a model may write elsewhere from the same seed.
  part["text"] = whole["text"].get<uint64_t>() ^ 1;
  testing::write_bytes(folder_.file("part.json"), part.dump());
  ASSERT_EQ(run(measure("part.json")).status, 0);
  resumed = json::parse(testing::read_bytes(folder_.file("part.json")));
  EXPECT_EQ(resumed["text"], whole["text"]);
  json all = whole["sensitivities"];
  EXPECT_EQ(first_kl(resumed["sensitivities"])["cost"], first_kl(all)["cost"]);
}

TEST_F(Cli, CalibrationThatIsNoTextIsRefused) {
  const std::string out = folder_.file("profile.json"), calibration = folder_.file("calibration.txt");
  const auto refused = [&](int status, const std::string& content, const std::vector<std::string>& words) {
    testing::write_bytes(calibration, content);
    refuses(status, {"profile", model_, "--calib", calibration, "--prompts", "2", "--tokens", "64", "-o", out}, words);
  };
  refused(2, "", {"calibration.txt", "empty"});
  refused(2, "a", {"calibration.txt", "16 tokens"});
  refused(2, "\xff\xfe a tide is a tide is a tide is a tide", {"calibration.txt", "UTF-8", "iconv"});
  refused(2, testing::read_bytes(model_), {"calibration.txt", "UTF-8"});
  const std::string lines = folder_.file("calibration.jsonl");
  testing::write_bytes(lines, "{\"text\": 3}\n");
  refuses(1, {"profile", model_, "--calib", lines, "-o", out}, {"calibration.jsonl", "line 1", "text"});
  refuses(1, {"profile", model_, "--calib", folder_.file("none.txt"), "-o", out}, {"none.txt", "check the path"});
  refuses(2, {"profile", model_, "--tokens", "4096", "-o", out}, {"context of 1024"});
  EXPECT_FALSE(std::filesystem::exists(out));
}

TEST_F(Cli, ProfilesThatAreDamagedOrSomethingElseAreRefused) {
  const std::string profile = folder_.file("profile.json"), plan = folder_.file("kvmix.json");
  ASSERT_EQ(
      run({"profile", model_, "--prompts", "2", "--tokens", "64", "--sensitivity", "none", "--quiet", "-o", profile}).status,
      0);
  const std::string good = testing::read_bytes(profile);
  const auto refused = [&](const std::string& content, const std::vector<std::string>& words) {
    testing::write_bytes(profile, content);
    refuses(1, {"plan", model_, "--profile", profile, "--bits", "8", "-o", plan}, words);
    EXPECT_FALSE(std::filesystem::exists(plan));
  };
  refused(good.substr(0, good.size() / 2), {"profile.json", "not valid JSON", "line"});
  refused(testing::read_bytes(plan_file()), {"profile.json", "kvmix-plan", "not a profile"});
  refused(testing::read_bytes(model_), {"profile.json"});
  json other = json::parse(good);
  other["fingerprint"] = "0123456789abcdef";
  refused(other.dump(), {"profile.json", "measured on another model of the same name", "0123456789abcdef", "kvmix profile"});
  other["model"] = "Other";
  refused(other.dump(),
          {"profile.json", "measured on another model (Other, fingerprint 0123456789abcdef; this one is tiny llama"});
  other = json::parse(good);
  other["key_score"][0] = "much";
  refused(other.dump(), {"profile.json", "key_score"});
  other = json::parse(good);
  other["value_score"][1] = nullptr;
  refused(other.dump(), {"profile.json", "value_score[1] is null", "layer 1", "kvmix profile"});
  other = json::parse(good);
  other["sensitivities"] = {{{"metric", "kl"},
                             {"layer", 2},
                             {"side", "value"},
                             {"codec", "int2.token.g64.minmax.zero"},
                             {"transform", "plain"},
                             {"cost", nullptr}}};
  refused(other.dump(), {"profile.json", "sensitivities[0].cost is null", "values of layer 2", "kvmix profile"});
  other = json::parse(good);
  other["model"] = "\x1b[31mred";
  refused(other.dump(), {"profile.json", "model", "control characters"});
}

TEST_F(Cli, EvaluationsThatAreDamagedOrOfAnotherModelAreNotReported) {
  const std::string file = folder_.file("eval.json"), page = folder_.file("report.html");
  std::string text;
  for (int i = 0; i < 400; ++i) text += "the sea is a sea of words ";
  const Outcome o =
      run({"eval", model_, "--text", "-", "--context", "256", "--windows", "1", "--uniform", "2/2", "--json", "--quiet"}, text);
  ASSERT_EQ(o.status, 0) << o.err;
  const json good = json::parse(o.out);
  const auto reported = [&](const json& value) {
    testing::write_bytes(file, value.dump());
    return run({"report", model_, "--eval", file, "-o", page, "--quiet"});
  };
  EXPECT_EQ(reported(good).status, 0);
  const auto refused = [&](const json& value, const std::vector<std::string>& words) {
    std::filesystem::remove(page);
    testing::write_bytes(file, value.dump());
    refuses(1, {"report", model_, "--eval", file, "-o", page}, words);
    EXPECT_FALSE(std::filesystem::exists(page));
  };
  json bad = good;
  bad["fingerprint"] = "0123456789abcdef";
  refused(bad, {"eval.json", "measured on another model of the same name", "0123456789abcdef", "kvmix eval"});
  bad = good;
  bad["rows"][1]["kl_mean"] = nullptr;
  refused(bad, {"eval.json", "rows[1].kl_mean is null"});
  bad = good;
  bad["rows"][1].erase("top1");
  refused(bad, {"eval.json", "rows[1] (uniform 2/2)", "top1"});
  refused(json::array(), {"eval.json", "kvmix eval --json"});
  bad = good;  // numbers so close that an axis has no steps between them
  for (auto& row : bad["rows"]) row["bits_per_element"] = 1e5;
  EXPECT_EQ(reported(bad).status, 0);
  bad = good;  // a peer that could not run has no numbers
  bad["rows"].push_back({{"name", "llama.cpp q4_0"}, {"lost", "block size"}});
  EXPECT_EQ(reported(bad).status, 0);
}

TEST_F(Cli, AModelWithNumbersThatAreNoneIsNotProfiled) {
  const std::string bad = folder_.file("bad.gguf"), calibration = folder_.file("calibration.txt"),
                    out = folder_.file("profile.json");
  testing::write_tiny_model({.architecture = "llama", .not_finite = "blk.1.ffn_up.weight"}, bad);
  std::string text;
  for (int i = 0; i < 100; ++i) text += "the sea is a sea of words ";
  testing::write_bytes(calibration, text);
  for (const std::vector<std::string>& more :
       {std::vector<std::string>{"--sensitivity", "none"}, {}, {"--sensitivity", "kl"}}) {
    std::vector<std::string> command = {"profile",  bad,   "--calib", calibration, "--prompts", "1",
                                        "--tokens", "512", "--quiet", "-o",        out};
    command.insert(command.end(), more.begin(), more.end());
    refuses(1, command, {"bad.gguf", "blk.1.ffn_up.weight", "not finite"});
    EXPECT_FALSE(std::filesystem::exists(out));
  }
}

TEST_F(Cli, FilesOfNoKindAreSaidToBeSo) {
  const std::string file = folder_.file("file");
  for (const std::string content : {"", "hello", "[]",
                                    "\x7f"
                                    "ELF"}) {
    testing::write_bytes(file, content);
    refuses(1, {"inspect", file}, {"no GGUF model, plan, profile, factors file or saved cache"});
  }
  refuses(2, {"inspect", folder_.file("")}, {"directory"});
  refuses(1, {"generate", "smollm3", "-p", "a"}, {"smollm3", "smollm2"});
}

TEST_F(Cli, SavedCachesAreShownOrRefused) {
  CacheConfig config;
  LayerConfig layer;
  layer.q_heads = layer.kv_heads = 1;
  layer.head_dim = 32;
  layer.scale = 1;
  layer.window.tokens = 0;
  layer.key.codec = {2, Axis::kChannel, 128, Fit::kMinMax, true};
  layer.value.codec = {2, Axis::kToken, 32, Fit::kMinMax, true};
  config.layers = {layer};
  Cache cache(config);
  const StepItem item{cache.create(), 300};
  const std::vector<float> rows(300 * 32, 0.5f);
  cache.begin_step({&item, 1});
  cache.append(0, rows.data(), 32, rows.data(), 32, 0, 1);
  cache.end_step();
  const std::string file = folder_.file("cache.kvmix");
  cache.save(item.sequence, file, "a model and a plan");
  const json shown = json::parse(run({"inspect", file, "--json"}).out);
  EXPECT_EQ(shown["tokens"], 300);
  EXPECT_EQ(shown["fingerprint"], "a model and a plan");
  const std::string good = testing::read_bytes(file);
  for (size_t at = 0; at < good.size(); at += good.size() / 50) {
    std::string bad = good;
    bad[at] = static_cast<char>(bad[at] ^ 4);
    testing::write_bytes(file, bad);
    refuses(1, {"inspect", file}, {});
    testing::write_bytes(file, good.substr(0, at));
    refuses(1, {"inspect", file}, {});
  }
}

TEST_F(Cli, ContextsLongerThanTheModelsAreRefused) {
  std::string text;
  for (int i = 0; i < 800; ++i) text += "the sea is a sea of words ";
  refuses(2, {"eval", model_, "--text", "-", "--context", "2048", "--windows", "1"}, {"2048", "context of 1024", "shorter"},
          text);
  refuses(2, {"eval", model_, "--text", "-", "--context", "512"}, {"window"}, "a short text");
  refuses(2, {"eval", model_, "--needle", "--contexts", "2048"}, {"2048", "1024"});
  refuses(2, {"bench", model_, "--depths", "1020", "--tokens", "10"}, {"1020", "context of 1024", "smaller"});
}

// With less and less address space, every command either works or says that memory is what it lacks.
TEST_F(Cli, TooLittleMemoryIsSaid) {
  const std::string out = folder_.file("profile.json");
  const std::vector<std::vector<std::string>> commands = {
      {"generate", model_, "-p", "a", "-n", "2", "--threads", "1", "--quiet"},
      {"bench", model_, "--depths", "900", "--tokens", "1", "--repetitions", "1", "--threads", "1", "--quiet"},
      {"profile", model_, "--prompts", "1", "--tokens", "512", "--sensitivity", "none", "--threads", "1", "--quiet", "-o",
       out}};
  for (const auto& command : commands) {
    int refusals = 0, successes = 0;
    for (size_t mib = 24; mib <= 1024 && successes == 0; mib += mib / 6) {
      std::filesystem::remove(out);
      const Outcome o = Program(folder_, command, "", false, "", mib << 20).wait();
      if (o.status == 0) {
        ++successes;
        continue;
      }
      ++refusals;
      EXPECT_EQ(o.status, 1) << command[0] << " in " << mib << " MiB: " << o.err;
      EXPECT_TRUE(o.err.starts_with("kvmix: ")) << command[0] << " in " << mib << " MiB: " << o.err;
      EXPECT_NE(o.err.find("memory"), std::string::npos) << command[0] << " in " << mib << " MiB: " << o.err;
      EXPECT_FALSE(std::filesystem::exists(out));
    }
    EXPECT_GT(refusals, 0) << command[0];
    EXPECT_EQ(successes, 1) << command[0];
  }
}

}  // namespace
}  // namespace kvmix
