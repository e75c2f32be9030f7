// KVCrush's arithmetic on plain numbers, apart for tests (arXiv 2503.00022).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace kvmix {

enum class CrushAnchor : uint8_t { kAlternate, kMean, kInverseMean, kZeros, kOnes, kRandom };
CrushAnchor parse_anchor(const std::string& name);

// 1 for the floor(n / 2) highest scores, ties by lower index.
std::vector<uint8_t> top_half(std::span<const double> score);

// The pattern that fingerprints are compared with. `bits` are those of all pages, [pages][length]. Mean: 1 where more than half
// of the pages have a 1; inverse mean: where fewer than half; random: fair, the same at every call.
std::vector<uint8_t> anchor_bits(CrushAnchor anchor, std::span<const uint8_t> bits, size_t length);
// Hamming distance of each page to the anchor.
std::vector<int> anchor_distances(std::span<const uint8_t> bits, std::span<const uint8_t> anchor);

// Pages that `taken` does not hold, by distance and then index.
std::vector<size_t> by_distance(std::span<const int> distances, std::span<const uint8_t> taken);
// `count` of them (all, if they are fewer) spread from the nearest to the farthest ...
std::vector<size_t> spread(std::span<const size_t> sorted, size_t count);
// ... or from the nearest in whole strides, which may not reach the farthest.
std::vector<size_t> strided(std::span<const size_t> sorted, size_t count);

}  // namespace kvmix
