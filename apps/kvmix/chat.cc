// kvmix chat: a conversation in the terminal. Ctrl-C stops the answer; at the prompt it ends the program.
#include <fmt/core.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <optional>

#include "command.h"
#include "console.h"
#include "kvmix/error.h"
#include "session.h"
#include "text.h"

namespace kvmix::app {
namespace {

struct Arguments {
  SessionArguments session;
  std::string system;
};

// One line from standard input without its end; nothing at the end of input or on Ctrl-C.
std::optional<std::string> read_line() {
  std::string line;
  for (int c = std::getc(stdin); c != EOF; c = std::getc(stdin)) {
    if (c == '\n') return line;
    line += static_cast<char>(c);
  }
  if (Console::interrupted() || line.empty()) return std::nullopt;
  return line;
}

class Chat {
 public:
  Chat(const Arguments& arguments, const Common& common)
      : arguments_(arguments),
        common_(common),
        engine_(open_engine(arguments.session, common)),
        sequence_(engine_->cache().create()) {
    if (!engine_->model().has_chat_template()) {
      throw UsageError("this model has no chat template: use kvmix generate, or an instruction-tuned model");
    }
    clear();
  }

  int run() {
    const bool terminal = isatty(STDIN_FILENO) != 0 && !common_.json;
    if (terminal && !common_.quiet) {
      fmt::print(stderr, "Ctrl-C stops an answer; /clear forgets the conversation; Ctrl-D or /exit ends.\n");
    }
    while (true) {
      if (terminal) {
        fmt::print(stderr, "> ");
        std::fflush(stderr);
      }
      const auto line = read_line();
      if (!line) {
        if (terminal) fmt::print(stderr, "\n");
        return Console::interrupted() ? kExitInterrupted : kExitOk;
      }
      if (*line == "/exit") return kExitOk;
      if (*line == "/clear") {
        clear();
        continue;
      }
      if (line->find_first_not_of(" \t\r") == std::string::npos) continue;
      try {
        check_utf8(*line, "the message");
        answer(*line);
      } catch (const Error& e) {
        // The conversation goes on without this message: the person can shorten it or clear.
        if (e.status() != Status::kInvalidArgument && e.status() != Status::kOutOfMemory) throw;
        messages_.resize(messages_.size() - (messages_.back().role == "user" ? 1 : 0));
        fmt::print(stderr, "kvmix: {}; /clear forgets the conversation\n", e.what());
      }
    }
  }

 private:
  void clear() {
    messages_.clear();
    if (!arguments_.system.empty()) messages_.push_back({"system", arguments_.system});
    engine_->cache().truncate(sequence_, 0);
    cached_.clear();
  }

  void answer(const std::string& text) {
    messages_.push_back({"user", text});
    const Model& model = engine_->model();
    const std::vector<Token> prompt = model.tokenize(model.apply_chat_template(messages_), true, true);
    const int64_t context = model.shape().context_tokens;
    if (static_cast<int64_t>(prompt.size()) >= context) {
      throw Error(Status::kInvalidArgument,
                  fmt::format("the conversation has {} tokens and the model's context is {}", prompt.size(), context));
    }
    // What the template made of the earlier turns is in the cache already, up to the first difference.
    size_t common = 0;
    while (common < cached_.size() && common + 1 < prompt.size() && cached_[common] == prompt[common]) ++common;
    engine_->cache().truncate(sequence_, static_cast<int64_t>(common));
    cached_ = prompt;
    const GenerateResult result = generate(*engine_, sequence_, std::span<const Token>(prompt).subspan(common),
                                           arguments_.session.generate, [this](std::string_view piece) {
                                             if (!common_.json) {
                                               std::fwrite(piece.data(), 1, piece.size(), stdout);
                                               std::fflush(stdout);
                                             }
                                             return !Console::interrupted();
                                           });
    Console::clear_interrupt();
    if (common_.json) {
      print_json(result_json(*engine_, result));
    } else {
      fmt::print("\n");
      std::fflush(stdout);
      if (!common_.quiet) print_closing_line(*engine_, result);
    }
    messages_.push_back({"assistant", result.text});
  }

  const Arguments& arguments_;
  const Common& common_;
  std::unique_ptr<Engine> engine_;
  SequenceId sequence_;
  std::vector<ChatMessage> messages_;
  std::vector<Token> cached_;  // tokens of the last prompt; the answer after it is read again as the template writes it
};

}  // namespace

void add_chat(CommandContext& context) {
  auto arguments = std::make_shared<Arguments>();
  CLI::App* command = add_command(context, "chat", "A conversation in the terminal; Ctrl-C stops the answer",
                                  "kvmix chat smollm2 --cache plan.json --temperature 0.7");
  add_session_options(command, arguments->session);
  command->add_option("--system", arguments->system, "The system message");
  command->callback(
      [&context, arguments] { context.action = [arguments](const Common& common) { return Chat(*arguments, common).run(); }; });
}

}  // namespace kvmix::app
