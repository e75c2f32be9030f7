// What every sub-command shares. A sub-command is one file with one add_* function and one line in main.cc.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>

namespace kvmix::app {

struct Common {
  int threads = 0;  // 0: the cores that affinity and quotas leave
  bool json = false;
  bool quiet = false;
};

// A wrong command line that only the command itself can see: exit status 2.
class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

inline constexpr int kExitOk = 0, kExitFailure = 1, kExitUsage = 2;

// Set by the sub-command that was chosen; main runs it after parsing.
using Action = std::function<int(const Common&)>;

struct CommandContext {
  CLI::App& root;
  Common& common;
  Action& action;
};

// Declares a sub-command with the common options and an example in its help.
CLI::App* add_command(CommandContext& context, const std::string& name, const std::string& description,
                      const std::string& example);

// --device, of commands that run a model.
void add_device_option(CLI::App* command, std::string& device);

void add_list(CommandContext& context);
void add_inspect(CommandContext& context);
void add_profile(CommandContext& context);
void add_plan(CommandContext& context);
void add_factorise(CommandContext& context);
void add_generate(CommandContext& context);
void add_chat(CommandContext& context);
void add_eval(CommandContext& context);
void add_bench(CommandContext& context);
void add_report(CommandContext& context);

}  // namespace kvmix::app
