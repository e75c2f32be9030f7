#include "console.h"

#include <fmt/core.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <ctime>
#include <memory>
#include <string_view>

#include "text.h"

namespace kvmix::app {
namespace {

volatile std::sig_atomic_t interrupt_count = 0, last_signal = SIGINT;
std::atomic<bool> bar_is_up{false};
std::atomic<int64_t> last_interrupt_ms{0};

void on_interrupt(int signal) {
  last_signal = signal;
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  const int64_t ms = now.tv_sec * 1000 + now.tv_nsec / 1000000;
  const int64_t previous = last_interrupt_ms.exchange(ms);
  if (interrupt_count > 0 && ms - previous < 500) return;  // the same impatience
  interrupt_count = interrupt_count + 1;
  if (interrupt_count < 2) return;
  constexpr std::string_view kRestore = "\r\033[K\033[0m\033[?25h";
  if (isatty(STDERR_FILENO) != 0) {
    [[maybe_unused]] const ssize_t n = write(STDERR_FILENO, kRestore.data(), kRestore.size());
  }
  _exit(128 + signal);
}

// What is behind the end of a mapped file that was cut short since: the weights are gone, but not the reason.
void on_bus_error(int signal_number, siginfo_t* info, void*) {
  if (info->si_code != BUS_ADRERR) {
    signal(signal_number, SIG_DFL);
    return;
  }
  constexpr std::string_view kMessage =
      "kvmix: the model's file was cut short or cannot be read any more while it was in use; keep it as it is, or work on a "
      "copy\n";
  [[maybe_unused]] const ssize_t n = write(STDERR_FILENO, kMessage.data(), kMessage.size());
  _exit(1);
}

int terminal_columns(int file) {
  winsize size{};
  return ioctl(file, TIOCGWINSZ, &size) == 0 && size.ws_col > 20 ? size.ws_col : 80;
}

using Clock = std::chrono::steady_clock;

class Reporter {
 public:
  Reporter(bool quiet) : quiet_(quiet), terminal_(isatty(STDERR_FILENO) != 0) {}
  ~Reporter() { Console::clear_line(); }

  bool update(double done, double total, const std::string& what) {
    if (!quiet_) show(done, total, what);
    return !Console::interrupted();
  }

 private:
  void show(double done, double total, const std::string& what) {
    const auto now = Clock::now();
    const bool new_part = total != total_ || done < done_ || start_ == Clock::time_point{};
    if (new_part) {
      start_ = now;
      first_done_ = done;
    }
    done_ = done;
    total_ = total;
    const double since_shown = std::chrono::duration<double>(now - shown_).count();
    if (!new_part && done < total && since_shown < (terminal_ ? 0.1 : 10.0)) return;
    if (!terminal_ && done >= total && !new_part && since_shown < 1) return;
    shown_ = now;
    const double elapsed = std::chrono::duration<double>(now - start_).count();
    const double share = total > 0 ? std::clamp(done / total, 0.0, 1.0) : 0;
    std::string rest;
    if (elapsed > 0.5 && done > first_done_) {
      const double rate = (done - first_done_) / elapsed;
      rest = fmt::format("  {}/s  {} left", short_number(rate), clock_time((total - done) / rate));
    }
    if (!terminal_) {
      fmt::print(stderr, "{}: {:.0f} %{}\n", what, 100 * share, rest);
      return;
    }
    // The share stands on every terminal; rate and remaining time, the bar and what is measured where there is room.
    const std::string percent = fmt::format(" {:3.0f} %", 100 * share);
    int room = terminal_columns(STDERR_FILENO) - 1 - static_cast<int>(percent.size());
    if (static_cast<int>(rest.size()) > room) rest.clear();
    room -= static_cast<int>(rest.size());
    const int bar = std::min((room - 3) / 2, 30);  // and its frame and a space
    const std::string picture = bar >= 4 ? " " + gauge(share, bar) : "";
    room -= static_cast<int>(display_width(picture));
    fmt::print(stderr, "\r\033[K{}{}{}{}", first_columns(what, static_cast<size_t>(room)), picture, percent, rest);
    std::fflush(stderr);
    bar_is_up = true;
    if (done >= total) Console::clear_line();
  }

  bool quiet_, terminal_;
  double done_ = 0, total_ = -1, first_done_ = 0;
  Clock::time_point start_{}, shown_{};
};

}  // namespace

void Console::install_interrupt_handler() {
  struct sigaction action {};
  action.sa_handler = on_interrupt;  // no SA_RESTART: a read from the terminal must return
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
  struct sigaction bus {};
  bus.sa_sigaction = on_bus_error;
  bus.sa_flags = SA_SIGINFO;
  sigaction(SIGBUS, &bus, nullptr);
}

bool Console::interrupted() { return interrupt_count > 0; }
int Console::interrupted_status() { return 128 + last_signal; }
void Console::clear_interrupt() { interrupt_count = 0; }

void Console::clear_line() {
  if (!bar_is_up.exchange(false)) return;
  fmt::print(stderr, "\r\033[K");
  std::fflush(stderr);
}

Progress progress_reporter(const Common& common) {
  auto reporter = std::make_shared<Reporter>(common.quiet);
  return [reporter](double done, double total, const std::string& what) { return reporter->update(done, total, what); };
}

void Table::print() const {
  Console::clear_line();
  std::vector<size_t> widths;
  for (const auto& row : rows_) {
    widths.resize(std::max(widths.size(), row.size()));
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], display_width(row[i]));
  }
  // On a terminal that is too narrow, the columns go on below, each time beside the first one.
  const auto room = isatty(STDOUT_FILENO) != 0 ? static_cast<size_t>(terminal_columns(STDOUT_FILENO)) : SIZE_MAX;
  for (size_t first = 1, end; first <= 1 || first < widths.size(); first = end) {
    size_t total = widths[0];
    for (end = first; end < widths.size() && (end == first || total + 2 + widths[end] <= room); ++end) total += 2 + widths[end];
    if (first > 1) fmt::print("\n");
    for (size_t r = 0; r < rows_.size(); ++r) {
      std::string line;
      for (size_t i = 0; i < std::min(rows_[r].size(), end); ++i) {
        if (i > 0 && i < first) continue;
        const std::string& cell = rows_[r][i];
        const std::string pad(widths[i] - display_width(cell), ' ');
        const bool left = std::find(left_.begin(), left_.end(), i) != left_.end();
        if (i > 0) line += "  ";
        line += left ? cell + pad : pad + cell;
      }
      line.erase(line.find_last_not_of(' ') + 1);
      fmt::print("{}\n", line);
      if (r == 0) fmt::print("{}\n", std::string(total, '-'));
    }
  }
}

void print_json(const nlohmann::json& value) {
  Console::clear_line();
  fmt::print("{}\n", value.dump(2, ' ', false, nlohmann::json::error_handler_t::replace));
}

}  // namespace kvmix::app
