#include "base/team.h"

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <exception>

#include "base/machine.h"

namespace kvmix {
namespace {

using Clock = std::chrono::steady_clock;

// Above what balanced work differs by, far below a scheduler's time slice.
constexpr std::chrono::microseconds kSpin{100};
constexpr std::chrono::milliseconds kLookEvery{50}, kHindered{50}, kRetryAfter{250};

struct Place {
  Team* team = nullptr;
  int index = 0;
};
thread_local Place place;

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield" ::: "memory");
#endif
}

// Waits until `word` is no longer `old`; returns for how long.
Clock::duration wait_for_change(const std::atomic<int>& word, int old, bool spin) {
  const auto start = Clock::now();
  auto now = start;
  if (spin) {
    do {
      for (int i = 0; i < 32; ++i) {
        if (word.load(std::memory_order_acquire) != old) return now - start;
        relax();
      }
      now = Clock::now();
    } while (now - start < kSpin);
  }
  while (word.load(std::memory_order_acquire) == old) word.wait(old, std::memory_order_acquire);
  return Clock::now() - start;
}

}  // namespace

Team::~Team() {
  stop_ = true;
  for (size_t i = 1; i < all_.size(); ++i) {
    all_[i]->job.fetch_add(1, std::memory_order_release);
    all_[i]->job.notify_one();
    all_[i]->thread.join();
  }
}

void Team::hire(int members) {
  if (all_.empty()) all_.push_back(std::make_unique<Member>());
  all_.reserve(static_cast<size_t>(members));
  while (all_.size() < static_cast<size_t>(members)) {
    const int index = static_cast<int>(all_.size());
    auto member = std::make_unique<Member>();
    Member* hired = member.get();
    Member* caller = all_[0].get();
    all_.push_back(std::move(member));
    try {
      hired->thread = std::thread([this, index, hired, caller] {
        place = {this, index};
        for (int done = 0;; ++done) {
          hired->processor.store(sched_getcpu(), std::memory_order_relaxed);
          // Behind a step comes the next one, unless the caller shares this processor.
          wait_for_change(hired->job, done,
                          done > 0 && caller->processor.load(std::memory_order_relaxed) !=
                                          hired->processor.load(std::memory_order_relaxed));
          if (stop_) return;
          work_as(index);
        }
      });
    } catch (const std::exception&) {  // work goes on with those that there are
      all_.pop_back();
      return;
    }
  }
}

int Team::worthwhile(int members) {
  const auto now = Clock::now();
  if (now >= look_at_) {
    look_at_ = now + kLookEvery;
    const int processors = online_processors(), others = runnable_threads() - 1;
    if (others + members > 2 * processors) {
      limit_ = std::max(1, processors - others);
      retry_at_ = now + kRetryAfter;
    } else if (others + members <= processors) {
      limit_ = members;
    }
  }
  if (now >= retry_at_) limit_ = members;
  return std::clamp(limit_, 1, members);
}

void Team::learn(Clock::duration taken) {
  // n threads of which each waits for more than 1 - 1/n of the time do less than one alone would. A processor that a virtual
  // machine lost for a moment makes one run so; another program makes all of them so.
  if (waited_ * members_ < taken * (members_ - 1)) {
    hindered_ = {};
    return;
  }
  hindered_ += taken;
  if (hindered_ < kHindered) return;
  limit_ = members_ / 2;
  retry_at_ = Clock::now() + std::clamp<Clock::duration>(hindered_ * 16, kRetryAfter, std::chrono::seconds(30));
  hindered_ = {};
}

void Team::run(int members, void (*work)(void*), void* data) {
  if (gives_way_ && place.team == nullptr && members > 1) members = worthwhile(members);
  if (place.team != nullptr || members <= 1) {  // inside another's work, or alone
    const Place outer = place;
    place = {};
    work(data);
    place = outer;
    return;
  }
  hire(members);
  members_ = std::min(members, static_cast<int>(all_.size()));
  work_ = work;
  data_ = data;
  for (int i = 0; i < members_; ++i) {
    // What an earlier run left: its members came to different numbers of barriers.
    all_[static_cast<size_t>(i)]->arrivals.store(passed_.load(std::memory_order_relaxed), std::memory_order_relaxed);
    all_[static_cast<size_t>(i)]->rounds = rounds_.load(std::memory_order_relaxed);
  }
  const auto start = Clock::now();
  waited_ = {};
  for (int i = 1; i < members_; ++i) {
    all_[static_cast<size_t>(i)]->job.fetch_add(1, std::memory_order_release);
    all_[static_cast<size_t>(i)]->job.notify_one();
  }
  place = {this, 0};
  work_as(0);
  place = {};
  if (members_ > 1) learn(Clock::now() - start);
}

void Team::work_as(int index) {
  work_(data_);
  meet(index);
}

bool Team::in_the_way_of_another(const Member& me, int arrivals) const {
  const int here = me.processor.load(std::memory_order_relaxed);
  for (int i = 0; i < members_; ++i) {
    const Member& other = *all_[static_cast<size_t>(i)];
    if (&other != &me && other.arrivals.load(std::memory_order_relaxed) != arrivals &&
        other.processor.load(std::memory_order_relaxed) == here) {
      return true;
    }
  }
  return false;
}

void Team::meet(int index) {
  Member& me = *all_[static_cast<size_t>(index)];
  const int before = passed_.load(std::memory_order_relaxed);
  me.processor.store(sched_getcpu(), std::memory_order_relaxed);
  me.arrivals.store(before + 1, std::memory_order_relaxed);
  const bool spin = !in_the_way_of_another(me, before + 1);
  const int last = members_ - 1;  // read before others may go on: behind the last barrier of a run the next one writes it
  if (present_.fetch_add(1, std::memory_order_acq_rel) == last) {
    present_.store(0, std::memory_order_relaxed);
    passed_.fetch_add(1, std::memory_order_acq_rel);
    passed_.notify_all();
    return;
  }
  const auto waited = wait_for_change(passed_, before, spin);
  if (index == 0) waited_ += waited;
  me.processor.store(sched_getcpu(), std::memory_order_relaxed);
}

int Team::member() { return place.index; }
int Team::members() { return place.team == nullptr ? 1 : place.team->members_; }

void Team::barrier() {
  if (place.team != nullptr) place.team->meet(place.index);
}

bool Team::first_of_round() {
  if (place.team == nullptr) return true;
  Team& team = *place.team;
  int& mine = team.all_[static_cast<size_t>(place.index)]->rounds;
  int expected = mine++;
  return team.rounds_.compare_exchange_strong(expected, expected + 1, std::memory_order_acq_rel);
}

}  // namespace kvmix
