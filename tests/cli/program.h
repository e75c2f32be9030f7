// Runs the kvmix program as a person would: arguments in, exit status and both outputs back.
#pragma once

#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <fstream>
#include <functional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "support/tiny_model.h"

namespace kvmix::testing {

struct Outcome {
  int status;  // exit status; 1000 + signal if one ended the program
  std::string out, err;
};

class Program {
 public:
  // Starts `kvmix arguments...`. Outputs go to files in `folder`; standard input is `input`, or stays open when `keep_open`.
  // With `address_space_bytes` that is all it may map.
  Program(const TemporaryFolder& folder, const std::vector<std::string>& arguments, const std::string& input = "",
          bool keep_open = false, const std::string& out_path = "", size_t address_space_bytes = 0)
      : out_(out_path.empty() ? folder.file("stdout") : out_path), err_(folder.file("stderr")) {
    std::filesystem::remove(folder.file("stdout"));
    std::filesystem::remove(err_);
    int in[2];
    if (pipe2(in, O_CLOEXEC) != 0) throw std::runtime_error("no pipe");
    child_ = fork();
    if (child_ == 0) {
      dup2(in[0], STDIN_FILENO);
      dup2(open(out_.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600), STDOUT_FILENO);
      dup2(open(err_.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600), STDERR_FILENO);
      std::vector<char*> argv;
      std::vector<std::string> words = arguments;
      words.insert(words.begin(), KVMIX_PROGRAM);
      for (std::string& word : words) argv.push_back(word.data());
      argv.push_back(nullptr);
      const rlimit limit{address_space_bytes, address_space_bytes};
      if (address_space_bytes > 0) setrlimit(RLIMIT_AS, &limit);
      execv(KVMIX_PROGRAM, argv.data());
      _exit(127);
    }
    close(in[0]);
    in_ = in[1];
    send(input);
    if (!keep_open) close_input();
  }
  ~Program() {
    if (child_ > 0) {
      kill(child_, SIGKILL);
      wait();
    }
    close_input();
  }
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  void send(const std::string& text) const {
    if (write(in_, text.data(), text.size()) != static_cast<ssize_t>(text.size()))
      throw std::runtime_error("cannot write input");
  }
  void close_input() {
    if (in_ >= 0) close(in_);
    in_ = -1;
  }
  void interrupt() const { kill(child_, SIGINT); }
  void terminate() const { kill(child_, SIGTERM); }
  std::string out() const { return std::filesystem::is_regular_file(out_) ? read_bytes(out_) : ""; }
  std::string err() const { return read_bytes(err_); }

  // Waits up to a minute for something to become true of the running program.
  bool until(const std::function<bool()>& condition) const {
    for (int i = 0; i < 6000; ++i) {
      if (condition()) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    return false;
  }

  Outcome wait() {
    int status = 0;
    waitpid(child_, &status, 0);
    child_ = -1;
    return {WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status), out(), err()};
  }

 private:
  std::string out_, err_;
  int in_ = -1;
  pid_t child_ = -1;
};

}  // namespace kvmix::testing
