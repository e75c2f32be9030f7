// A layer of a step by threads of the cache's own.
#include "base/first_failure.h"
#include "base/machine.h"
#include "cache/state.h"

namespace kvmix {
namespace {

struct LayerJob {
  Cache& cache;
  int layer;
  const float *k, *v, *q;
  float* out;
  int64_t k_stride, v_stride, q_stride, out_stride;
  FirstFailure failure = {};

  void work() {
    const int ith = Team::member(), nth = Team::members();
    failure.guard([&] { cache.append(layer, k, k_stride, v, v_stride, ith, nth); });
    Team::barrier();
    if (!failure.failed()) failure.guard([&] { cache.attend(layer, q, q_stride, out, out_stride, ith, nth); });
  }
};

}  // namespace

int default_threads() { return usable_cores(); }

void Cache::step_layer(int layer, const float* k, int64_t k_stride, const float* v, int64_t v_stride, const float* q,
                       int64_t q_stride, float* out, int64_t out_stride) {
  if (!impl_->team) impl_->team = std::make_unique<Team>(false);  // always as many, so that results are the same bits
  LayerJob job{*this, layer, k, v, q, out, k_stride, v_stride, q_stride, out_stride};
  impl_->team->run(
      impl_->config.threads, [](void* data) { static_cast<LayerJob*>(data)->work(); }, &job);
  job.failure.rethrow();
}

}  // namespace kvmix
