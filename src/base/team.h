// Threads that work together in short phases. Those that wait spin for a moment, which is what a machine of one's own rewards,
// and then sleep, which is what a shared one needs; where the thread that is waited for was last seen on the waiting one's
// processor they sleep at once, since it cannot go on before they do.
#pragma once

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

namespace kvmix {

class Team {
 public:
  Team() = default;
  ~Team();  // ends the threads
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  // Runs work(data) on `members` threads at once, the caller's among them, or on fewer where the system has no more threads;
  // back when all are done. `work` must not throw.
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

  void hire(int members);
  void serve(int index);
  void work_as(int index);
  void meet(int index);
  bool in_the_way_of_another(const Member& me, int arrivals) const;

  std::vector<std::unique_ptr<Member>> all_;  // 0 is the caller
  int members_ = 1;
  void (*work_)(void*) = nullptr;
  void* data_ = nullptr;
  bool stop_ = false;
  alignas(64) std::atomic<int> present_{0};
  alignas(64) std::atomic<int> passed_{0};  // barriers that all have come to
  alignas(64) std::atomic<int> rounds_{0};
};

}  // namespace kvmix
