// --device where there is no GPU, and what it asks of other options.
#include <gtest/gtest.h>

#include "cli/fixture.h"
#include "support/devices.h"
#include "support/tiny_model.h"

namespace kvmix {
namespace {

using testing::Cli;
using testing::Outcome;

TEST_F(Cli, ADeviceThatIsNotThereIsSaidToBeSo) {
  if (testing::missing_device("cuda").empty()) GTEST_SKIP() << "there is one";
  const std::string model = folder_.file("tiny.gguf"), text = folder_.file("text");
  testing::write_tiny_model({.architecture = "llama", .head_dim = 64}, model);
  testing::write_bytes(text, std::string(4000, 'a'));
  const std::vector<std::string> cuda = {"--device", "cuda", "--quiet"};
  for (std::vector<std::string> command : {std::vector<std::string>{"generate", model, "-p", "a tide"},
                                           {"bench", model, "--depths", "8"},
                                           {"eval", model, "--text", text, "--context", "128", "--windows", "1"}}) {
    command.insert(command.end(), cuda.begin(), cuda.end());
    refuses(1, command, {"device \"cuda\": ", "take the device \"cpu\""});
  }
  refuses(1, {"plan", model, "--planner", "uniform", "--device", "cuda", "--fit", "free", "-o", folder_.file("plan.json")},
          {"device \"cuda\": "});
}

TEST_F(Cli, WhatADeviceCannotTakeIsRefused) {
  const std::string model = folder_.file("tiny.gguf"), narrow = folder_.file("narrow.gguf"), plan = folder_.file("plan.json");
  testing::write_tiny_model({.architecture = "llama", .head_dim = 64}, model);
  testing::write_tiny_model({.architecture = "llama"}, narrow);
  refuses(2, {"generate", model, "-p", "a", "--device", "tpu"}, {"--device", "tpu", "cuda"});
  refuses(2, {"bench", model, "--depths", "8", "--memory", "1GiB"}, {"--memory", "--device cuda"});
  refuses(2, {"plan", model, "--planner", "uniform", "--fit", "free", "-o", plan}, {"--fit free", "--device cuda"});
  refuses(1, {"plan", narrow, "--planner", "uniform", "--device", "cuda", "-o", plan}, {"layer 0", "head_dim 32"});
  refuses(1, {"plan", model, "--planner", "uniform", "--device", "cuda", "--k-bits", "6", "-o", plan},
          {"layer 0 keys", "int6"});
  const Outcome made = run({"plan", model, "--planner", "uniform", "--device", "cuda", "-o", plan});
  EXPECT_EQ(made.status, 0) << made.err;
  EXPECT_NE(testing::read_bytes(plan).find("\"recent\": \"int8.token.g64.minmax.zero\""), std::string::npos);
}

}  // namespace
}  // namespace kvmix
