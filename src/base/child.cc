#include "base/child.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "kvmix/error.h"

namespace kvmix {
namespace {

size_t mapped_bytes() {
  unsigned long long pages = 0;
  std::FILE* file = std::fopen("/proc/self/statm", "re");
  if (file == nullptr) return 0;
  const bool read = std::fscanf(file, "%llu", &pages) == 1;
  std::fclose(file);
  return read ? static_cast<size_t>(pages) * static_cast<size_t>(sysconf(_SC_PAGESIZE)) : 0;
}

void limit(__rlimit_resource resource, size_t most) {
  rlimit now{};
  if (getrlimit(resource, &now) != 0) return;
  now.rlim_cur = now.rlim_max = std::min(now.rlim_max, static_cast<rlim_t>(most));
  setrlimit(resource, &now);
}

void write_all(int descriptor, const char* data, size_t bytes) {
  while (bytes > 0) {
    const ssize_t n = write(descriptor, data, bytes);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) _exit(1);
    data += n;
    bytes -= static_cast<size_t>(n);
  }
}

[[noreturn]] void run_as_child(const std::function<std::string()>& work, const ChildLimits& limits, int out) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  for (const int signal_number : {SIGINT, SIGTERM, SIGXCPU, SIGSEGV, SIGABRT}) signal(signal_number, SIG_DFL);
  limit(RLIMIT_CORE, 0);
  limit(RLIMIT_CPU, static_cast<size_t>(limits.seconds));
  limit(RLIMIT_AS, mapped_bytes() + limits.bytes);
  try {
    const std::string result = work();
    const uint64_t size = result.size();
    write_all(out, reinterpret_cast<const char*>(&size), sizeof size);
    write_all(out, result.data(), result.size());
  } catch (...) {
    _exit(1);
  }
  _exit(0);
}

}  // namespace

std::optional<std::string> run_in_child(const std::function<std::string()>& work, const ChildLimits& limits) {
  int ends[2];
  const auto fail = [](const char* what) {
    throw Error(Status::kIo, std::string("cannot make ") + what + ": " + std::strerror(errno) + "; close other programs");
  };
  if (pipe2(ends, O_CLOEXEC) != 0) fail("a pipe");
  const pid_t child = fork();
  if (child < 0) {
    close(ends[0]);
    close(ends[1]);
    fail("a process");
  }
  if (child == 0) {
    close(ends[0]);
    run_as_child(work, limits, ends[1]);
  }
  close(ends[1]);
  std::string said;
  std::array<char, 16384> block;
  for (;;) {
    const ssize_t n = read(ends[0], block.data(), block.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) break;
    said.append(block.data(), static_cast<size_t>(n));
  }
  close(ends[0]);
  while (waitpid(child, nullptr, 0) < 0 && errno == EINTR) {
  }
  // Its exit status may have been taken by a handler of the program's own; the length tells whether the answer is whole.
  uint64_t size = 0;
  if (said.size() < sizeof size) return std::nullopt;
  std::memcpy(&size, said.data(), sizeof size);
  if (said.size() - sizeof size != size) return std::nullopt;
  return said.substr(sizeof size);
}

}  // namespace kvmix
