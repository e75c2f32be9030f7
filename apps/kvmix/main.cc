#include <cerrno>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <new>

#include "command.h"
#include "console.h"
#include "help.h"
#include "kvmix/error.h"

namespace kvmix::app {
namespace {

// One line adds a sub-command.
constexpr void (*kCommands[])(CommandContext&) = {
    add_profile, add_factorise, add_plan, add_generate, add_chat, add_eval, add_bench, add_report, add_inspect, add_list,
};

int fail(int status, const std::string& message) {
  Console::clear_line();
  std::string line = message;
  for (char& c : line) {  // one line, of which a terminal obeys nothing
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = ' ';
  }
  std::fprintf(stderr, "kvmix: %s\n", line.c_str());
  return status;
}

int flush_output(int status) {
  errno = 0;
  const bool failed = std::fflush(stdout) != 0 || std::ferror(stdout) != 0;
  if (!failed) return status;
  return fail(kExitFailure, std::string("cannot write to standard output: ") + std::strerror(errno == 0 ? EIO : errno));
}

int run(int argc, char** argv) {
  CLI::App root("Small, fast key/value caches for language models.", "kvmix");
  root.formatter(std::make_shared<HelpFormatter>());
  root.require_subcommand(1);
  root.set_version_flag("--version", KVMIX_VERSION);
  root.footer("Start with: kvmix profile smollm2 -o profile.json");
  Common common;
  Action action;
  CommandContext context{root, common, action};
  for (const auto& add : kCommands) add(context);
  try {
    root.parse(argc, argv);
  } catch (const CLI::Success& e) {
    return flush_output(root.exit(e));  // --help and --version
  } catch (const CLI::ParseError& e) {
    const auto chosen = root.get_subcommands();
    return fail(kExitUsage,
                std::string(e.what()) + " (see kvmix " + (chosen.empty() ? "" : chosen[0]->get_name() + " ") + "--help)");
  }
  try {
    return flush_output(action(common));
  } catch (const UsageError& e) {
    return fail(kExitUsage, e.what());
  } catch (const Error& e) {
    if (e.status() == Status::kCancelled || Console::interrupted()) return fail(Console::interrupted_status(), "interrupted");
    return fail(e.status() == Status::kInvalidArgument ? kExitUsage : kExitFailure, e.what());
  } catch (const std::bad_alloc&) {
    return fail(kExitFailure, "not enough memory: use a shorter context, fewer rows or a smaller plan");
  } catch (const std::exception& e) {
    return fail(kExitFailure, e.what());
  }
}

}  // namespace

CLI::App* add_command(CommandContext& context, const std::string& name, const std::string& description,
                      const std::string& example) {
  CLI::App* command = context.root.add_subcommand(name, description);
  command->add_option("--threads", context.common.threads, "Threads; 0 takes the cores that affinity and quotas leave")
      ->check(CLI::Range(0, 256))
      ->capture_default_str();
  command->add_flag("--json", context.common.json, "Print the result as JSON on standard output");
  command->add_flag("--quiet", context.common.quiet, "No progress on standard error");
  command->footer("Example:\n  " + example);
  return command;
}

void add_device_option(CLI::App* command, std::string& device) {
  command->add_option("--device", device, "Where model and cache are: cpu, or cuda for an NVIDIA GPU")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
}

}  // namespace kvmix::app

int main(int argc, char** argv) {
  try {
    kvmix::app::Console::install_interrupt_handler();
    return kvmix::app::run(argc, argv);
  } catch (...) {  // out of memory while reporting an error
    std::fputs("kvmix: stopped by an unexpected error\n", stderr);
    return kvmix::app::kExitFailure;
  }
}
