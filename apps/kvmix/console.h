// The terminal: progress on standard error, Ctrl-C, and printing of tables and JSON.
#pragma once

#include <chrono>
#include <string>
#include <vector>

#include "command.h"
#include "kvmix/measure.h"

namespace kvmix::app {

class Console {
 public:
  // The first Ctrl-C (or SIGTERM) asks the running work to stop; a second one, half a second later or more, ends
  // the program at once with status 130.
  static void install_interrupt_handler();
  static bool interrupted();
  // 130 after Ctrl-C, 143 after SIGTERM.
  static int interrupted_status();
  // Forgets a Ctrl-C that stopped only an answer.
  static void clear_interrupt();
  // Removes a progress bar that stands on the terminal's last line.
  static void clear_line();
};

// Shows progress: a bar with rate and remaining time on a terminal, otherwise a plain line at the start of each part and
// every ten seconds; nothing when quiet. The callback returns false after Ctrl-C.
Progress progress_reporter(const Common& common);

// Text as columns: the first left-aligned, the others right-aligned, a rule under the header. Columns that a terminal has no
// room for follow below, beside the first one again.
class Table {
 public:
  explicit Table(std::vector<std::string> header) : rows_{std::move(header)} {}
  void add(std::vector<std::string> row) { rows_.push_back(std::move(row)); }
  // Column that is left-aligned too.
  void left(size_t column) { left_.push_back(column); }
  void print() const;

 private:
  std::vector<std::vector<std::string>> rows_;
  std::vector<size_t> left_{0};
};

// JSON on standard output; bytes that are not UTF-8 are replaced.
void print_json(const nlohmann::json& value);

}  // namespace kvmix::app
