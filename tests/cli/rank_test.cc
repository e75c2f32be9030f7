// Latents from the command line: factors are made, planned with, run, shown; what is damaged or of another model is refused.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "cli/fixture.h"

namespace kvmix {
namespace {

using nlohmann::json;
using testing::Cli;
using testing::Outcome;

class CliRanks : public Cli {
 protected:
  static void SetUpTestSuite() {
    Cli::SetUpTestSuite();
    factors_ = shared_->file("factors.gguf");
    const testing::TemporaryFolder folder("kvmix-cli-factors");
    const Outcome o = testing::Program(folder, {"factorise", model_, "--method", "palu", "--keep", "0.75", "--prompts", "1",
                                                "--tokens", "128", "-o", factors_})
                          .wait();
    ASSERT_EQ(o.status, 0) << o.err;
  }
  std::vector<std::string> planning(const std::string& factors, const std::string& out) const {
    return {"plan", model_, "--planner", "uniform", "--k-bits", "8", "--v-bits", "8", "--factors", factors, "-o", out};
  }
  std::string planned() const {
    const std::string path = folder_.file("ranks.json");
    const Outcome o = run(planning(factors_, path));
    EXPECT_EQ(o.status, 0) << o.err;
    return path;
  }
  std::string text() const {
    std::string out;
    for (int i = 0; i < 400; ++i) out += "the sea is a sea of words ";
    return out;
  }

  inline static std::string factors_;
};

TEST_F(CliRanks, FactorsAndPlansAreShown) {
  const Outcome made = run({"factorise", model_, "--method", "lorc", "-o", folder_.file("lorc.gguf")});
  EXPECT_EQ(made.status, 0) << made.err;
  // Half of 64 channels is the least that a page holds; the first layer gets more.
  EXPECT_NE(made.out.find("lorc, 0.583 of all channels kept"), std::string::npos) << made.out;
  const json shown = json::parse(run({"inspect", factors_, "--json"}).out);
  EXPECT_EQ(shown["kind"], "factors");
  EXPECT_EQ(shown["method"], "palu");
  EXPECT_EQ(shown["keep"], 0.75);
  EXPECT_EQ(shown["layers"][0]["key_rank"], 48);
  EXPECT_EQ(shown["layers"][0]["key_channels"], 64);
  EXPECT_NE(run({"inspect", factors_}).out.find("by palu"), std::string::npos);

  const std::string plan = planned();
  const Outcome o = run({"inspect", plan, "--model", model_});
  EXPECT_NE(o.out.find("latents       by palu"), std::string::npos) << o.out;
  EXPECT_NE(o.out.find("of 48 latents"), std::string::npos) << o.out;
  // Three quarters of the numbers, and of the scales: 64 channels have one for 64, and 48 latents one for 48.
  const std::string whole = folder_.file("whole.json");
  ASSERT_EQ(run({"plan", model_, "--planner", "uniform", "--k-bits", "8", "--v-bits", "8", "-o", whole}).status, 0);
  const auto formula = [&](const std::string& file) {
    return json::parse(run({"inspect", file, "--model", model_, "--json"}).out)["formula"];
  };
  const json narrow = formula(plan), full = formula(whole);
  EXPECT_LT(narrow["sealed_page_bytes"], full["sealed_page_bytes"]);
  EXPECT_EQ(narrow["sink_bytes"].get<double>(), 0.75 * full["sink_bytes"].get<double>());
  const json listed = json::parse(run({"list", "--json"}).out);
  EXPECT_EQ(listed["factorisations"].size(), 3u);
}

// Plans name their factors relative to themselves, so both can move together.
TEST_F(CliRanks, EveryCommandRunsThem) {
  const std::string plan = planned();
  EXPECT_EQ(run({"generate", model_, "-p", "a tide", "-n", "3", "--plan", plan}).status, 0);
  const std::vector<std::string> text_task = {"--text", "-", "--context", "256", "--windows", "1"};
  std::vector<std::string> float_task = text_task;
  float_task.emplace_back("--float-weights");
  const std::vector<std::string> needle_task = {"--needle", "--contexts", "300",      "--kinds", "key",
                                                "--depths", "0.5",        "--trials", "1"};
  for (const auto& task : {text_task, float_task, needle_task}) {
    std::vector<std::string> command = {"eval", model_, "--plan", plan, "--json"};
    command.insert(command.end(), task.begin(), task.end());
    const Outcome o = run(command, task == needle_task ? "" : text());
    ASSERT_EQ(o.status, 0) << o.err;
    EXPECT_NE(o.out.find("\"ranks\""), std::string::npos) << o.out;
  }
  const Outcome o =
      run({"bench", model_, "--depths", "0,300", "--tokens", "2", "--repetitions", "1", "--plan", plan, "--json"});
  ASSERT_EQ(o.status, 0) << o.err;
  const json timed = json::parse(o.out);
  ASSERT_EQ(timed["rows"].size(), 4u);
  EXPECT_LT(timed["rows"][3]["cache_bytes"], timed["rows"][2]["cache_bytes"]);
  const std::string report = folder_.file("report.html");
  EXPECT_EQ(run({"report", model_, "--plan", plan, "-o", report}).status, 0);
  const std::string moved = folder_.file("moved");
  std::filesystem::create_directory(moved);
  const json named = json::parse(testing::read_bytes(plan))["rank"]["factors"];
  EXPECT_FALSE(std::filesystem::path(named.get<std::string>()).is_absolute()) << named;
  json there = json::parse(testing::read_bytes(plan));
  there["rank"]["factors"] = "f.gguf";
  std::filesystem::copy_file(factors_, moved + "/f.gguf");
  testing::write_bytes(moved + "/p.json", there.dump());
  EXPECT_EQ(run({"generate", model_, "-p", "a tide", "-n", "3", "--plan", moved + "/p.json"}).status, 0);
}

TEST_F(CliRanks, WhatDoesNotFitIsRefused) {
  refuses(2, {"factorise", model_, "--method", "magic"}, {"magic", "palu"});
  refuses(2, {"factorise", model_, "--keep", "0"}, {"keep"});
  refuses(2, {"factorise", model_, "--method", "palu", "--group", "0"}, {"group"});
  refuses(2, {"factorise", model_, "--method", "palu", "--group", "3"}, {"--group 3", "2 KV heads"});
  refuses(2, {"factorise", model_, "--method", "lorc", "--profile", "none.json"}, {"--profile", "lorc"});
  refuses(1, {"factorise", model_, "--calib", folder_.file("none")}, {"none"});
  refuses(1, {"factorise", factors_}, {"kvmix-factors"});
  refuses(1, {"factorise", model_, "--method", "lorc", "--quiet", "-o", folder_.file("no/such/factors.gguf")},
          {"factors.gguf"});
  EXPECT_FALSE(std::filesystem::exists("factors.gguf"));

  const std::string plan = folder_.file("plan.json");
  refuses(1, planning(folder_.file("none.gguf"), plan), {"none.gguf"});
  refuses(1, planning(model_, plan), {"tiny.gguf", "no factors file", "kvmix factorise"});
  for (const auto& more : {std::vector<std::string>{"--device", "cuda"}, {"--planner", "kvmix", "--bits", "4"}}) {
    std::vector<std::string> command = {"plan", model_, "--factors", factors_, "-o", plan};
    command.insert(command.end(), more.begin(), more.end());
    EXPECT_NE(run(command).status, 0) << more[0];
  }
  const std::string other = folder_.file("other.gguf");
  testing::write_tiny_model({.architecture = "qwen2", .qkv_bias = true}, other);
  refuses(1, {"plan", other, "--planner", "uniform", "--factors", factors_, "-o", plan}, {"made for", "kvmix factorise"});
  EXPECT_FALSE(std::filesystem::exists(plan));

  const std::string broken = folder_.file("broken.gguf"), whole = testing::read_bytes(factors_);
  testing::write_bytes(broken, whole.substr(0, whole.size() / 2));
  refuses(1, planning(broken, plan), {"broken.gguf"});
  refuses(1, {"inspect", broken}, {"broken.gguf"});
  std::string flipped = whole;
  flipped[flipped.size() - 200] ^= 1;
  testing::write_bytes(broken, flipped);
  refuses(1, planning(broken, plan), {"broken.gguf", "damaged factors file"});
}

TEST_F(CliRanks, PlansThatDoNotFitTheirFactorsAreRefused) {
  const std::string plan = planned();
  const json good = json::parse(testing::read_bytes(plan));
  const auto refused = [&](const json& value, const std::vector<std::string>& words) {
    testing::write_bytes(plan, value.dump());
    refuses(1, {"generate", model_, "-p", "a", "--plan", plan}, words);
    if (value["fingerprint"] == good["fingerprint"])
      refuses(1, {"bench", model_, "--depths", "0", "--tokens", "1", "--repetitions", "1", "--plan", plan}, words);
  };
  json bad = good;
  bad["layers"][1]["key"]["rank"] = 40;
  refused(bad, {"ranks.json", "layer 1", "rank 40 of keys", "multiple of 16"});
  bad = good;
  bad["layers"][1]["value"]["rank"] = 80;
  refused(bad, {"ranks.json", "layer 1", "rank 80 of values", "from 32 to 64"});
  bad = good;
  bad["layers"][1]["value"]["rank"] = 64;
  refused(bad, {"layer 1", "values", "rank 64 in the plan", "up to 48"});
  bad = good;
  bad["layers"][0]["key"].erase("rank");
  refused(bad, {"ranks.json", "layers[0].key", "the other side has a rank"});
  bad = good;
  bad.erase("rank");
  refused(bad, {"ranks.json", "layers[0].key.rank", "not a known field"});
  bad = good;
  bad["channels"] = {{"policy", "think"}};
  refused(bad, {"ranks.json", "rank", "policy"});
  bad = good;
  bad["layers"][0]["key"]["hadamard"] = true;
  refused(bad, {"ranks.json", "layers[0].key.rank", "row maps"});
  bad = good;
  bad["rank"]["factors"] = "gone.gguf";
  refused(bad, {"gone.gguf"});
  bad = good;
  bad["rank"]["checksum"] = "7";
  refused(bad, {"factors.gguf", "checksum", "kvmix plan --factors"});
  testing::write_bytes(plan, good.dump());
  refuses(1, {"generate", model_, "-p", "a", "--plan", plan, "--kernel", "avx2"}, {"kernel", "avx2"});
  // As with plans: other weights of the same shape by force alone.
  const std::string other = folder_.file("other.gguf");
  testing::write_tiny_model({.architecture = "llama", .rope_factors = true}, other);
  refuses(1, {"generate", other, "-p", "a", "--plan", plan}, {"ranks.json", "another model", "--force"});
  EXPECT_EQ(run({"generate", other, "-p", "a", "-n", "1", "--plan", plan, "--force"}).status, 0);
}

}  // namespace
}  // namespace kvmix
