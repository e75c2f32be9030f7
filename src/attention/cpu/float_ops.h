// Arithmetic on fp32 rows, of latents and of what is scored for policies, once per instruction set. All arrays are contiguous.
#pragma once

#include <cstddef>
#include <span>

namespace kvmix {

struct FloatOps {
  const char* name;
  bool (*available)();
  // out [n][dim] = rows [n][count] times up [count][dim]; dim is a multiple of 16.
  void (*multiply)(const float* rows, int n, int count, const float* up, int dim, float* out);
  // out[t] = query . keys[t], keys [n][dim].
  void (*dots)(const float* query, const float* keys, int n, int dim, float* out);
  // As weigh of attention/scores.h. A weight depends on the other numbers and on how many there are alone.
  void (*weigh)(float* x, size_t n, float scale, float softcap);
  // acc [width] += sum over t of weights[t] rows[t], rows [n][width].
  void (*add)(const float* weights, const float* rows, int n, int width, float* acc);
};

// Best first; the last, "portable", runs everywhere.
std::span<const FloatOps* const> float_ops_registry();
// The best that this machine has, or the portable ones.
const FloatOps& float_ops(bool portable);

}  // namespace kvmix
