// A factors file: low-rank factors of a model's key and value projections (docs/rank.md), a GGUF that the loader reads.
#pragma once

#include <string>
#include <vector>

#include "kvmix/engine.h"

namespace kvmix {

// A side of a layer. Group g's latents are [g * rank, (g + 1) * rank), most important first.
struct SideFactors {
  int groups = 0, rank = 0;     // rank: of each group
  std::vector<int> group_of;    // by KV head
  std::vector<float> down;      // [groups * rank][model_dim]
  std::vector<float> up;        // [kv_heads * head_dim][rank], of its head's group
  std::vector<float> energies;  // [groups][kv_heads * head_dim / groups], descending: what leaving a latent out costs
};

struct Factors {
  std::string method, note, model, fingerprint, checksum;
  struct Layer {
    SideFactors key, value;
  };
  std::vector<Layer> layers;
};

// Throws kNotFound, kIo, and kCorrupt for a damaged file, naming what is wrong.
Factors read_factors(const std::string& path);
void write_factors(const Factors& factors, const std::string& path);
// Throws kMismatch unless they are this model's: its shape and, not `forced`, its fingerprint.
void check_factors(const Factors& factors, const Model& model, bool forced, const std::string& path);

}  // namespace kvmix
