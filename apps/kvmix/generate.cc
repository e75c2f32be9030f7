// kvmix generate: continues a prompt.
#include <fmt/core.h>

#include <cstdio>
#include <memory>

#include "command.h"
#include "console.h"
#include "kvmix/error.h"
#include "session.h"
#include "text.h"

namespace kvmix::app {
namespace {

struct Arguments {
  SessionArguments session;
  std::string prompt, prompt_file;
  bool chat = false, special = false;
};

std::string prompt_text(const Arguments& arguments) {
  if (arguments.prompt_file.empty() == arguments.prompt.empty()) {
    throw UsageError(
        "give one prompt: --prompt TEXT, or --prompt-file FILE (- for standard input); an empty one cannot be continued");
  }
  if (!arguments.prompt_file.empty()) return read_text_file(arguments.prompt_file);
  check_utf8(arguments.prompt, "the prompt");
  return arguments.prompt;
}

int generate_command(const Arguments& arguments, const Common& common) {
  if (!arguments.session.chat_template.empty() && !arguments.chat)
    throw UsageError("--chat-template is for --chat: give both, or neither");
  const std::string text = prompt_text(arguments);
  const auto engine = open_engine(arguments.session, common);
  const Model& model = engine->model();
  std::vector<Token> prompt;
  if (arguments.chat) {
    const ChatMessage message{"user", text};
    prompt = model.chat_tokens({&message, 1}, chat_template(arguments.session, model));
  } else {
    prompt = model.tokenize(text, true, arguments.special);
  }
  const int64_t context = model.shape().context_tokens;
  if (static_cast<int64_t>(prompt.size()) >= context) {
    throw Error(Status::kInvalidArgument,
                fmt::format("the prompt has {} tokens and the model's context is {}: shorten it by {}", prompt.size(), context,
                            static_cast<int64_t>(prompt.size()) - context + 1));
  }
  const SequenceId sequence = engine->cache().create();
  // Long prompts show progress: all but the last token are run here, and the last one starts the generation.
  double prefill_seconds = 0;
  const auto all_but_last = std::span<const Token>(prompt).first(prompt.size() - 1);
  if (!all_but_last.empty()) {
    const Progress progress = progress_reporter(common);
    const auto start = std::chrono::steady_clock::now();
    engine->prefill(sequence, all_but_last, [&](int64_t done, int64_t total) {
      return progress(static_cast<double>(done), static_cast<double>(total), "reading the prompt");
    });
    prefill_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  GenerateResult result = generate(*engine, sequence, std::span<const Token>(prompt).last(1), arguments.session.generate,
                                   [&](std::string_view piece) {
                                     if (!common.json) {
                                       std::fwrite(piece.data(), 1, piece.size(), stdout);
                                       if (std::fflush(stdout) != 0) return false;
                                     }
                                     return !Console::interrupted();
                                   });
  result.prompt_tokens = static_cast<int>(prompt.size());
  result.prefill_seconds += prefill_seconds;
  if (common.json) {
    print_json(result_json(*engine, result));
  } else {
    fmt::print("\n");
    std::fflush(stdout);
    if (!common.quiet) print_closing_line(*engine, result);
  }
  return Console::interrupted() ? Console::interrupted_status() : kExitOk;
}

}  // namespace

void add_generate(CommandContext& context) {
  auto arguments = std::make_shared<Arguments>();
  CLI::App* command = add_command(context, "generate", "Continue a prompt, with the cache of a plan",
                                  "kvmix generate smollm2 --cache plan.json --prompt \"The tide\" --max-tokens 64");
  add_session_options(command, arguments->session);
  command->add_option("-p,--prompt", arguments->prompt, "The text to continue");
  command->add_option("-f,--prompt-file", arguments->prompt_file, "A file with it, - for standard input");
  command->add_flag("--chat", arguments->chat, "The prompt is a message: put it through the model's chat template");
  command->add_flag("--special", arguments->special, "Special tokens that are written out in the prompt are taken as such");
  command->callback([&context, arguments] {
    context.action = [arguments](const Common& common) { return generate_command(*arguments, common); };
  });
}

}  // namespace kvmix::app
