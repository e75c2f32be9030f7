// Beside other programs a second thread may gain nothing, but it must not cost.
#include <gtest/gtest.h>
#include <pthread.h>
#include <sys/resource.h>
#include <time.h>

#include <atomic>
#include <thread>

#include "base/machine.h"
#include "kvmix/engine.h"
#include "support/models.h"

namespace kvmix {
namespace {

double seconds(const timespec& t) { return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec); }

// A thread that always wants a processor, and how much of one it has had.
class Other {
 public:
  Other()
      : thread_([this] {
          while (!stop_) {
          }
        }) {
    pthread_getcpuclockid(thread_.native_handle(), &clock_);
  }
  ~Other() {
    stop_ = true;
    thread_.join();
  }
  double processor_seconds() const {
    timespec t{};
    clock_gettime(clock_, &t);
    return seconds(t);
  }

 private:
  std::atomic<bool> stop_{false};
  std::thread thread_;
  clockid_t clock_{};
};

// Processor time that decoding takes of this process, whatever else the machine does.
double processor_seconds_of_decoding(const std::shared_ptr<const Model>& model, int threads, const Other& other) {
  EngineOptions options;
  options.threads = threads;
  Engine engine(model, f16_plan(model->shape()), options);
  const SequenceId id = engine.cache().create();
  const auto used = [&] {
    timespec t{};
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return seconds(t) - other.processor_seconds();
  };
  const double start = used();
  for (Token token = 100; token < 124; ++token) {
    const EngineItem item{id, {&token, 1}};
    engine.step({&item, 1});
  }
  return used() - start;
}

// One core's worth of load, as many threads as cores. Threads that spin at barriers while the one that they wait for has no
// processor burn 10 to 80 times what the work takes; those that give way burn little beside it.
TEST(BusyMachine, WaitingBesideAnotherProgramTakesNoProcessor) {
  const auto model = Model::load(testing::model_file("smollm2"));
  const Other other;
  const double one = processor_seconds_of_decoding(model, 1, other);
  EXPECT_LT(processor_seconds_of_decoding(model, std::max(2, usable_cores()), other), 3 * one);
}

}  // namespace
}  // namespace kvmix
