// Transforms calibrated on a model's own rows.
#pragma once

#include <vector>

#include "engine/model.h"
#include "profile/gradients.h"

namespace kvmix {

// Of a layer's keys and values, from the rows of one pass:
//   "feedback": Hadamard, rounded with error feedback; keys without what biases do to them.
//   "scaled-feedback": channels scaled before the Hadamard as well. Keys: less their mean, to unit variance. Values: balanced
//   by
//       what the output projection makes of a channel, o^1/4 v^-3/4 for energies o^2 of its columns and v^2 of the channel.
// The feedback minimises the error that attention sees, e M e^T, one channel after the other: M = U D U^T with a unit upper
// triangle U, whose columns are the weights (LDLQ: QuIP, arXiv 2307.13304, section 3). M is the second moment of the queries
// that meet the keys, or W_O^T W_O over the query heads that share the values, in the stored space.
//   "mpo", where asked for: DecoQuant's small tensor of each KV head (rows/mpo.h).
std::vector<Profile::Transform> calibrated_transforms(const GgufModel& model, size_t layer, const LayerRows& rows, int sinks,
                                                      bool mpo, int threads);
// Mean post-RoPE key of a layer behind the sinks, [kv_heads * head_dim].
std::vector<float> mean_key(const ModelShape::Layer& shape, const LayerRows& rows, int sinks, int threads);

}  // namespace kvmix
