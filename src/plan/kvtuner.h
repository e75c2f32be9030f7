// The parts of KVTuner's search (arXiv 2502.04420): which width pairs a layer keeps, and which layers share one.
#pragma once

#include <cstddef>
#include <vector>

namespace kvmix {

struct WidthPair {
  int key_bits = 0, value_bits = 0;
  double error = 0;  // relative error of the attention output with both sides quantised
  double bits() const { return (key_bits + value_bits) / 2.0; }
};

// Pairs that no other one beats in bits and error, fewest bits first (method b.4).
std::vector<WidthPair> pareto_pairs(std::vector<WidthPair> pairs);

// Layers that keep the same pairs, linked where log10 of their errors differs by at most `threshold` in every pair (method b.5;
// single link). In order of their first layers.
std::vector<std::vector<std::size_t>> cluster_layers(const std::vector<std::vector<WidthPair>>& kept, double threshold);

}  // namespace kvmix
