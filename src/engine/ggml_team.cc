// ggml's CPU backend runs its graphs on OpenMP threads. cmake/LlamaCpp.cmake renames what it calls to these, so that they run
// on our teams: GCC's own threads spin for milliseconds at each of a graph's thousand barriers, which costs a time slice each
// as soon as another program wants one of the processors.
#include "base/machine.h"
#include "base/team.h"

namespace {

// Each thread that computes graphs has a team of its own.
kvmix::Team& team() {
  thread_local kvmix::Team instance;
  return instance;
}

}  // namespace

// The signatures are those of GCC's OpenMP library.
extern "C" {

void kvmix_GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned flags);
void kvmix_GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned) {
  team().run(kvmix::thread_count(static_cast<int>(threads)), work, data);
}

void kvmix_GOMP_barrier();
void kvmix_GOMP_barrier() { kvmix::Team::barrier(); }

bool kvmix_GOMP_single_start();
bool kvmix_GOMP_single_start() { return kvmix::Team::first_of_round(); }

int kvmix_omp_get_thread_num();
int kvmix_omp_get_thread_num() { return kvmix::Team::member(); }

int kvmix_omp_get_num_threads();
int kvmix_omp_get_num_threads() { return kvmix::Team::members(); }

}  // extern "C"
