// Teams of threads, and how many threads a machine is good for.
#include "base/team.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <set>
#include <thread>
#include <vector>

#include "base/machine.h"

namespace kvmix {
namespace {

// Every member adds its number in each round, with a barrier between rounds; one of them counts the round.
struct Rounds {
  int rounds;
  std::atomic<int> sum{0}, singles{0}, early{0}, members{0};

  static void work(void* data) {
    auto& r = *static_cast<Rounds*>(data);
    r.members = Team::members();
    const int all = Team::members() * (Team::members() + 1) / 2;
    for (int i = 0; i < r.rounds; ++i) {
      if (Team::first_of_round()) ++r.singles;
      r.sum += Team::member() + 1;
      Team::barrier();
      if (r.sum != (i + 1) * all) ++r.early;
      Team::barrier();
    }
  }
};

TEST(Team, BarriersHoldForEveryNumberOfMembers) {
  Team team(false);
  for (const int members : {1, 2, 5, 3, 8, 2, 1, 4}) {
    Rounds rounds{200};
    team.run(members, Rounds::work, &rounds);
    EXPECT_EQ(rounds.early, 0) << members;
    EXPECT_EQ(rounds.singles, 200) << members;
    EXPECT_EQ(rounds.members, members);
    EXPECT_EQ(rounds.sum, 200 * members * (members + 1) / 2);
  }
}

TEST(Team, WorkInsideWorkIsItsCallersAlone) {
  Team team(false);
  struct Nested {
    Team* team;
    std::atomic<int> inner{0};
  } nested{&team};
  team.run(
      3,
      [](void* data) {
        auto& n = *static_cast<Nested*>(data);
        Team own;
        own.run(
            2, [](void* inner) { *static_cast<std::atomic<int>*>(inner) += Team::members(); }, &n.inner);
        Team::barrier();
      },
      &nested);
  EXPECT_EQ(nested.inner, 3);
}

// With several times more runnable threads than processors a team of many would take a time slice a barrier.
TEST(Team, FewerTakePartOnAnOverloadedMachine) {
  std::atomic<bool> stop{false};
  std::vector<std::thread> others;
  for (int i = 0; i < 3 * online_processors(); ++i)
    others.emplace_back([&] {
      while (!stop) {
      }
    });
  while (runnable_threads() < 2 * online_processors() + 1) std::this_thread::yield();
  Team team;
  Rounds rounds{10};
  team.run(online_processors(), Rounds::work, &rounds);
  EXPECT_EQ(rounds.members, 1);
  stop = true;
  for (std::thread& other : others) other.join();
}

double processor_seconds(clockid_t clock) {
  timespec t{};
  clock_gettime(clock, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// Who waits for long sleeps: it takes next to no processor time, however long that is.
TEST(Team, LongWaitsTakeNoProcessor) {
  static std::atomic<bool> late{false};
  static std::atomic<double> used{0};
  late = false;
  Team team(false);
  team.run(
      2,
      [](void*) {
        if (Team::member() == 0) {
          std::this_thread::sleep_for(std::chrono::milliseconds(300));
          late = true;
          Team::barrier();
          return;
        }
        const double start = processor_seconds(CLOCK_THREAD_CPUTIME_ID);
        Team::barrier();
        used = processor_seconds(CLOCK_THREAD_CPUTIME_ID) - start;
        if (!late) used = 1e9;  // it did not wait
      },
      nullptr);
  EXPECT_LT(used, 0.03);
}

// Threads that share one processor, as under another program's load: who waits gives way at once, since spinning would only
// keep the others from coming. Spinning first would take 0.1 ms of each of two waiting ones at each of 4,000 barriers.
TEST(Team, ThreadsThatShareAProcessorGiveWay) {
  cpu_set_t before, one;
  ASSERT_EQ(sched_getaffinity(0, sizeof before, &before), 0);
  CPU_ZERO(&one);
  CPU_SET(sched_getcpu(), &one);
  ASSERT_EQ(sched_setaffinity(0, sizeof one, &one), 0);
  double seconds = 0;
  {
    Team team(false);  // its threads inherit the processor
    Rounds rounds{2000};
    const double start = processor_seconds(CLOCK_PROCESS_CPUTIME_ID);
    team.run(3, Rounds::work, &rounds);
    seconds = processor_seconds(CLOCK_PROCESS_CPUTIME_ID) - start;
    EXPECT_EQ(rounds.early, 0);
  }
  EXPECT_EQ(usable_cores(), 1);
  ASSERT_EQ(sched_setaffinity(0, sizeof before, &before), 0);
  EXPECT_LT(seconds, 2 * 4000 * 1e-4 / 2);
}

class Machine : public ::testing::Test {
 protected:
  Machine() : root_(std::filesystem::temp_directory_path() / ("kvmix-machine-" + std::to_string(getpid()))) {}
  ~Machine() override { std::filesystem::remove_all(root_); }
  void write(const std::string& path, const std::string& line) const {
    std::filesystem::create_directories((root_ / path).parent_path());
    std::ofstream(root_ / path) << line << "\n";
  }
  int cores() const { return usable_cores(root_.string()); }
  std::filesystem::path root_;
};

TEST_F(Machine, QuotasAndSiblingsLimitThreads) {
  const int all = cores();  // an empty root: affinity alone
  cpu_set_t set;
  ASSERT_EQ(sched_getaffinity(0, sizeof set, &set), 0);
  EXPECT_EQ(all, CPU_COUNT(&set));
  EXPECT_EQ(thread_count(7), 7);
  EXPECT_GE(thread_count(0), 1);

  write("proc/self/cgroup", "0::/a/b");
  write("sys/fs/cgroup/a/b/cpu.max", "max 100000");
  EXPECT_EQ(cores(), all);
  write("sys/fs/cgroup/a/cpu.max", "100000 100000");  // the parent's
  EXPECT_EQ(cores(), 1);
  write("sys/fs/cgroup/a/cpu.max", "50000 100000");
  EXPECT_EQ(cores(), 1);
  write("sys/fs/cgroup/a/cpu.max", "100000000 100000");
  EXPECT_EQ(cores(), all);
  write("sys/fs/cgroup/cpu.max", "90000 100000");  // a container's own root
  EXPECT_EQ(cores(), 1);
  std::filesystem::remove_all(root_);

  write("proc/self/cgroup", "4:cpu,cpuacct:/job");
  write("sys/fs/cgroup/cpu/job/cpu.cfs_quota_us", "-1");
  write("sys/fs/cgroup/cpu/job/cpu.cfs_period_us", "100000");
  EXPECT_EQ(cores(), all);
  write("sys/fs/cgroup/cpu/job/cpu.cfs_quota_us", "100000");
  EXPECT_EQ(cores(), 1);
  std::filesystem::remove_all(root_);

  for (int i = 0; i < 256; ++i)
    write("sys/devices/system/cpu/cpu" + std::to_string(i) + "/topology/thread_siblings_list",
          std::to_string(i - i % 2) + "-" + std::to_string(i - i % 2 + 1));
  std::set<int> physical;
  for (int i = 0; i < CPU_SETSIZE; ++i) {
    if (CPU_ISSET(i, &set)) physical.insert(i / 2);
  }
  EXPECT_EQ(cores(), static_cast<int>(physical.size()));
}

}  // namespace
}  // namespace kvmix
