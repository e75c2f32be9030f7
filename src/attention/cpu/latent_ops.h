// Arithmetic of attention over latents, once per instruction set. All arrays are contiguous, token-major floats.
#pragma once

#include <span>

namespace kvmix {

struct LatentOps {
  const char* name;
  bool (*available)();
  // out [n][dim] = rows [n][count] times up [count][dim]; dim is a multiple of 16.
  void (*rebuild)(const float* rows, int n, int count, const float* up, int dim, float* out);
  // out[t] = query . keys[t], keys [n][dim].
  void (*dots)(const float* query, const float* keys, int n, int dim, float* out);
  // acc [width] += sum over t of weights[t] rows[t], rows [n][width].
  void (*add)(const float* weights, const float* rows, int n, int width, float* acc);
};

// Best first; the last, "portable", runs everywhere.
std::span<const LatentOps* const> latent_ops_registry();
// The best that this machine has, or the portable ones.
const LatentOps& latent_ops(bool portable);

}  // namespace kvmix
