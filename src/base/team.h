// Threads that work together in short phases. Those that wait spin for a moment, which is what a machine of one's own rewards,
// and then sleep, which is what a shared one needs; where the thread that is waited for was last seen on the waiting one's
// processor they sleep at once, since it cannot go on before they do. Where several times more threads want to run than there
// are processors even waking up takes a time slice: then fewer take part, which is what OpenMP allows too.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <thread>
#include <vector>

namespace kvmix {

class Team {
 public:
  // With `gives_way` false all take part whatever the machine does.
  explicit Team(bool gives_way = true) : gives_way_(gives_way) {}
  ~Team();  // ends the threads
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  // Runs work(data) on `members` threads at once, the caller's among them, or on fewer where the system has no more or where
  // they would hinder each other; back when all are done. `work` must not throw.
  void run(int members, void (*work)(void*), void* data);

  // Of the team that the calling thread works in; 0 of 1 outside run().
  static int member();
  static int members();
  // Returns when every member has called it.
  static void barrier();
  // True for one member of each round, as `#pragma omp single` chooses.
  static bool first_of_round();

 private:
  struct alignas(64) Member {
    std::atomic<int> job{0};         // counts the jobs given to it
    std::atomic<int> processor{-1};  // where it was last seen
    std::atomic<int> arrivals{0};    // barriers that it has come to
    int rounds = 0;                  // calls of first_of_round()
    std::thread thread;
  };

  using Clock = std::chrono::steady_clock;

  void hire(int members);
  // How many of `members` help, by what else wants to run now and by how long the last ones waited.
  int worthwhile(int members);
  void learn(Clock::duration taken);
  void work_as(int index);
  void meet(int index);
  bool in_the_way_of_another(const Member& me, int arrivals) const;

  std::vector<std::unique_ptr<Member>> all_;  // 0 is the caller
  int members_ = 1;
  void (*work_)(void*) = nullptr;
  void* data_ = nullptr;
  bool stop_ = false, gives_way_;
  int limit_ = 1;
  Clock::time_point look_at_{}, retry_at_{};
  Clock::duration waited_{};    // the caller, in this run
  Clock::duration hindered_{};  // the last runs in which it waited too long
  alignas(64) std::atomic<int> present_{0};
  alignas(64) std::atomic<int> passed_{0};  // barriers that all have come to
  alignas(64) std::atomic<int> rounds_{0};
};

}  // namespace kvmix
