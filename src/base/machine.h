// How much of the machine this process may use.
#pragma once

#include <string>

namespace kvmix {

// Threads that can compute at once without sharing a core: the cores that the process's affinity allows, hyper-threads of one
// core counted once, and no more than its control groups' quotas give. 1 to 256. `root` stands before /proc and /sys.
int usable_cores(const std::string& root = "");

// As many threads as asked for, or with 0 usable_cores().
int thread_count(int asked);

// Processors that are switched on, and threads of all programs that run or wait for one at this moment (0 if unknown).
int online_processors();
int runnable_threads();

}  // namespace kvmix
