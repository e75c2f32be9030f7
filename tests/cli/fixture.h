// A tiny model of random weights, a folder a test, and the program to run on them.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>

#include "cli/program.h"

namespace kvmix::testing {

class Cli : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    shared_ = new TemporaryFolder("kvmix-cli");
    model_ = shared_->file("tiny.gguf");
    write_tiny_model({.architecture = "llama", .output_head = true}, model_);
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

  inline static TemporaryFolder* shared_ = nullptr;
  inline static std::string model_;
  TemporaryFolder folder_{"kvmix-cli-test"};
};

}  // namespace kvmix::testing
