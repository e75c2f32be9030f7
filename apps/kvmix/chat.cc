// kvmix chat: a conversation in the terminal. Ctrl-C stops the answer; twice at the prompt it ends the program.
#include <fmt/core.h>
#include <poll.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <memory>
#include <utility>

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

// Lines of standard input. Read without stdio, whose end of input is final and which hides that a Ctrl-C came.
class Lines {
 public:
  enum class Event { kLine, kEnd, kInterrupt };

  Event next(std::string& line) {
    while (true) {
      if (const size_t end = buffer_.find('\n'); end != std::string::npos) {
        line = buffer_.substr(0, end);
        buffer_.erase(0, end + 1);
        return Event::kLine;
      }
      const bool ready = wait_for_input();
      if (Console::interrupted()) {
        buffer_.clear();
        return Event::kInterrupt;
      }
      if (!ready) continue;  // another signal, such as a new window size
      std::array<char, 4096> block;
      const ssize_t n = ::read(STDIN_FILENO, block.data(), block.size());
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) throw Error(Status::kIo, std::string("standard input: ") + std::strerror(errno));
      if (n == 0) {
        line = std::exchange(buffer_, "");
        return line.empty() ? Event::kEnd : Event::kLine;
      }
      buffer_.append(block.data(), static_cast<size_t>(n));
    }
  }

 private:
  // Whether there is input; else there was a signal. One that comes just before the wait must not be lost, so signals are only
  // let in there.
  static bool wait_for_input() {
    sigset_t interrupts, before;
    sigemptyset(&interrupts);
    sigaddset(&interrupts, SIGINT);
    sigaddset(&interrupts, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &interrupts, &before);
    pollfd input{STDIN_FILENO, POLLIN, 0};
    const int n = Console::interrupted() ? 0 : ppoll(&input, 1, nullptr, &before);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return n > 0;
  }

  std::string buffer_;
};

// Without the escape sequences that arrow keys leave in a line, and other control characters.
std::string typed(const std::string& line) {
  std::string text;
  for (size_t i = 0; i < line.size(); ++i) {
    const auto c = static_cast<unsigned char>(line[i]);
    if (c == 0x1b && i + 1 < line.size() && (line[i + 1] == '[' || line[i + 1] == 'O')) {
      for (++i; i + 1 < line.size() && (line[i + 1] < 0x40 || line[i + 1] > 0x7e); ++i) {
      }
      ++i;
    } else if (c >= 0x20 || c == '\t' || c == '\n') {
      text += line[i];
    }
  }
  return text;
}

// Where nobody watches, a line a message would be noise.
Common quiet_unless_terminal(Common common) {
  common.quiet = common.quiet || isatty(STDERR_FILENO) == 0;
  return common;
}

class Chat {
 public:
  Chat(const Arguments& arguments, const Common& common)
      : arguments_(arguments),
        common_(common),
        progress_(progress_reporter(quiet_unless_terminal(common))),
        engine_(open_engine(arguments.session, common)),
        template_(chat_template(arguments.session, engine_->model())),
        sequence_(engine_->cache().create()) {
    clear();
    // A template that is damaged, or does not know system messages, says so before anything is typed.
    std::vector<ChatMessage> first = messages_;
    first.push_back({"user", "a"});
    engine_->model().chat_tokens(first, template_);
  }

  int run() {
    const bool terminal = isatty(STDIN_FILENO) != 0 && !common_.json;
    if (terminal && !common_.quiet) {
      fmt::print(stderr,
                 "Ctrl-C stops an answer; /clear forgets the conversation; Ctrl-D or /exit ends;\n"
                 "a line that ends in \\ goes on in the next one.\n");
    }
    Lines lines;
    bool leaving = false;
    while (true) {
      if (terminal) {
        fmt::print(stderr, "> ");
        std::fflush(stderr);
      }
      std::string line;
      Lines::Event event = lines.next(line);
      while (event == Lines::Event::kLine && line.ends_with('\\')) {
        std::string more;
        event = lines.next(more);
        line.back() = '\n';
        line += more;
      }
      if (event != Lines::Event::kLine && terminal) fmt::print(stderr, "\n");
      if (event == Lines::Event::kEnd) return kExitOk;
      if (event == Lines::Event::kInterrupt) {
        if (!terminal || std::exchange(leaving, true)) return Console::interrupted_status();
        Console::clear_interrupt();
        fmt::print(stderr, "Ctrl-C once more or Ctrl-D ends.\n");
        continue;
      }
      leaving = false;
      if (terminal) line = typed(line);
      if (line == "/exit") return kExitOk;
      if (line == "/clear") {
        clear();
        continue;
      }
      if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
      try {
        check_utf8(line, "the message");
        answer(line);
      } catch (const Error& e) {
        // The conversation goes on without this message: the person can shorten it or clear.
        if (e.status() != Status::kInvalidArgument && e.status() != Status::kOutOfMemory && e.status() != Status::kCancelled)
          throw;
        if (!messages_.empty() && messages_.back().role == "user") messages_.pop_back();
        const bool cancelled = e.status() == Status::kCancelled;
        Console::clear_interrupt();
        Console::clear_line();
        fmt::print(
            stderr, "kvmix: {}\n",
            cancelled ? "stopped; the message is forgotten" : e.what() + std::string("; /clear forgets the conversation"));
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
    const std::vector<Token> prompt = model.chat_tokens(messages_, template_);
    const int64_t context = model.shape().context_tokens;
    if (static_cast<int64_t>(prompt.size()) >= context) {
      throw Error(Status::kInvalidArgument,
                  fmt::format("with this message the conversation has {} tokens and the model's context is {}", prompt.size(),
                              context));
    }
    go_back_to(prompt);
    // A long message shows progress and can be stopped: all but its last token are run here.
    const auto fresh = std::span<const Token>(prompt).subspan(cached_.size());
    const auto start = std::chrono::steady_clock::now();
    read(fresh.first(fresh.size() - 1));
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    GenerateResult result =
        generate(*engine_, sequence_, fresh.last(1), arguments_.session.generate, [this](std::string_view piece) {
          if (!common_.json) {
            std::fwrite(piece.data(), 1, piece.size(), stdout);
            std::fflush(stdout);
          }
          return !Console::interrupted();
        });
    cached_ = prompt;
    cached_.insert(cached_.end(), result.cached.begin(), result.cached.end());
    result.prompt_tokens = static_cast<int>(fresh.size());
    result.prefill_seconds += seconds;
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

  // What the cache holds of the conversation stays, up to the first difference to the new prompt.
  void go_back_to(const std::vector<Token>& prompt) {
    size_t common = 0;
    while (common < cached_.size() && common + 1 < prompt.size() && cached_[common] == prompt[common]) ++common;
    try {
      engine_->cache().truncate(sequence_, static_cast<int64_t>(common));
    } catch (const Error& e) {
      if (e.status() != Status::kUnsupported) throw;
      common = 0;  // a sliding window has freed what stood there: everything is read again
      engine_->cache().truncate(sequence_, 0);
    }
    cached_.resize(common);
  }

  void read(std::span<const Token> tokens) {
    if (tokens.empty()) return;
    engine_->prefill(sequence_, tokens, [this](int64_t done, int64_t total) {
      if (done == total) return !Console::interrupted();  // a bar that is full at once would only flicker
      return progress_(static_cast<double>(done), static_cast<double>(total), "reading");
    });
    cached_.insert(cached_.end(), tokens.begin(), tokens.end());
    Console::clear_line();
  }

  const Arguments& arguments_;
  const Common& common_;
  Progress progress_;
  std::unique_ptr<Engine> engine_;
  ChatTemplate template_;
  SequenceId sequence_;
  std::vector<ChatMessage> messages_;
  std::vector<Token> cached_;  // the first tokens of what the cache holds
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
