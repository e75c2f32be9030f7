// Runs the kvmix program on a pseudo-terminal, as at a person's desk: what is typed goes through the terminal's line
// editing, Ctrl-C is a key, and both outputs come back as one stream.
#pragma once

#include <poll.h>
#include <pty.h>
#include <signal.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <stdexcept>
#include <string>
#include <vector>

namespace kvmix::testing {

class Terminal {
 public:
  Terminal(std::vector<std::string> arguments, unsigned short columns) {
    const winsize size{24, columns, 0, 0};
    child_ = forkpty(&master_, nullptr, nullptr, &size);
    if (child_ < 0) throw std::runtime_error("no pseudo-terminal");
    if (child_ == 0) {
      arguments.insert(arguments.begin(), KVMIX_PROGRAM);
      std::vector<char*> argv;
      for (std::string& word : arguments) argv.push_back(word.data());
      argv.push_back(nullptr);
      execv(KVMIX_PROGRAM, argv.data());
      _exit(127);
    }
  }
  ~Terminal() {
    if (child_ > 0) {
      kill(child_, SIGKILL);
      waitpid(child_, nullptr, 0);
    }
    close(master_);
  }
  Terminal(const Terminal&) = delete;
  Terminal& operator=(const Terminal&) = delete;

  void type(const std::string& keys) const {
    if (write(master_, keys.data(), keys.size()) != static_cast<ssize_t>(keys.size())) throw std::runtime_error("cannot type");
  }

  void terminate() const { kill(child_, SIGTERM); }

  // Waits up to two minutes until `text` is shown after what an earlier call found; false if the program ended before.
  bool shows(const std::string& text) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::minutes(2);
    while (std::chrono::steady_clock::now() < end) {
      if (const size_t at = screen_.find(text, seen_); at != std::string::npos) {
        seen_ = at + text.size();
        return true;
      }
      if (!more()) return false;
    }
    return false;
  }

  // Exit status, 1000 + signal if one ended the program; all that it wrote is in screen() then.
  int wait() {
    while (more()) {
    }
    int status = 0;
    waitpid(child_, &status, 0);
    child_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
  }

  const std::string& screen() const { return screen_; }
  termios settings() const {
    termios t{};
    tcgetattr(master_, &t);
    return t;
  }

 private:
  // Waits for output; false when the program has closed the terminal.
  bool more() {
    pollfd ready{master_, POLLIN, 0};
    if (poll(&ready, 1, 1000) == 0) return true;
    std::array<char, 4096> block;
    const ssize_t n = read(master_, block.data(), block.size());
    if (n <= 0) return false;
    screen_.append(block.data(), static_cast<size_t>(n));
    return true;
  }

  int master_ = -1;
  pid_t child_ = -1;
  std::string screen_;
  size_t seen_ = 0;
};

}  // namespace kvmix::testing
