#include "base/machine.h"

#include <fcntl.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <set>
#include <sstream>
#include <vector>

namespace kvmix {
namespace {

constexpr int kMostThreads = 256;

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// The processors that the scheduler may put this process on.
std::vector<int> allowed_processors() {
  constexpr size_t kProcessors = 8192;
  cpu_set_t* set = CPU_ALLOC(kProcessors);
  std::vector<int> processors;
  if (set == nullptr) return processors;
  const size_t bytes = CPU_ALLOC_SIZE(kProcessors);
  CPU_ZERO_S(bytes, set);
  if (sched_getaffinity(0, bytes, set) == 0) {
    for (size_t i = 0; i < kProcessors; ++i) {
      if (CPU_ISSET_S(i, bytes, set)) processors.push_back(static_cast<int>(i));
    }
  }
  CPU_FREE(set);
  return processors;
}

// Processors' worth of time that a quota of `microseconds` in each `period` gives; infinite without one.
double share(const std::string& quota, const std::string& period) {
  const double q = std::strtod(quota.c_str(), nullptr), p = std::strtod(period.c_str(), nullptr);
  return q > 0 && p > 0 ? q / p : INFINITY;
}

// The smallest quota of the control groups from `path` up to the root, of either version's files.
double group_quota(const std::string& mount, std::string path) {
  double least = INFINITY;
  for (;;) {
    const std::string folder = mount + (path == "/" ? "" : path);
    std::istringstream both(first_line(folder + "/cpu.max"));
    std::string quota, period;
    both >> quota >> period;
    least = std::min(least, share(quota, period));  // "max" is no number
    least = std::min(least, share(first_line(folder + "/cpu.cfs_quota_us"), first_line(folder + "/cpu.cfs_period_us")));
    if (path.empty() || path == "/") return least;
    path.resize(path.find_last_of('/'));
  }
}

double quota(const std::string& root) {
  double least = group_quota(root + "/sys/fs/cgroup", "");
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // "0::/path", or "4:cpu,cpuacct:/path"
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string path = line.substr(second + 1);
    std::string names(1, ',');
    names.append(line, first + 1, second - first - 1).push_back(',');
    if (path.empty() || path[0] != '/') continue;
    if (names == ",,") least = std::min(least, group_quota(root + "/sys/fs/cgroup", path));
    if (names.find(",cpu,") != std::string::npos) least = std::min(least, group_quota(root + "/sys/fs/cgroup/cpu", path));
  }
  return least;
}

}  // namespace

int usable_cores(const std::string& root) {
  std::set<std::string> cores;
  for (const int processor : allowed_processors()) {
    const std::string siblings =
        first_line(root + "/sys/devices/system/cpu/cpu" + std::to_string(processor) + "/topology/thread_siblings_list");
    cores.insert(siblings.empty() ? "processor " + std::to_string(processor) : siblings);
  }
  // A share of a core is still a thread's work: it only waits for its next period.
  const double most = std::min(std::ceil(quota(root)), static_cast<double>(kMostThreads));
  return std::clamp(static_cast<int>(cores.size()), 1, static_cast<int>(std::max(most, 1.0)));
}

int online_processors() {
  static const int kOnline = static_cast<int>(std::max(1L, sysconf(_SC_NPROCESSORS_ONLN)));
  return kOnline;
}

int runnable_threads() {
  const int file = open("/proc/loadavg", O_RDONLY | O_CLOEXEC);
  if (file < 0) return 0;
  std::array<char, 128> text{};
  const ssize_t n = read(file, text.data(), text.size() - 1);
  close(file);
  int runnable = 0;  // "0.52 0.58 0.59 2/613 12345"
  return n > 0 && std::sscanf(text.data(), "%*s %*s %*s %d/", &runnable) == 1 ? runnable : 0;
}

int thread_count(int asked) {
  static const int kUsable = usable_cores();
  return asked > 0 ? asked : kUsable;
}

}  // namespace kvmix
