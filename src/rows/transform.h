// What a side of a layer does to rows before they are stored, and the inverse on what attention returns.
//
// A stored row is y = (x - center) S H or (x - center) R: S diagonal, H orthonormal Hadamard blocks, R a dense matrix. With a
// query mapped to q' = q S^-1 H or R^-1 q, scores q'.y equal q.(x - center), which softmax cannot tell from q.x.
#pragma once

#include "kvmix/cache.h"

namespace kvmix {

// Throws kInvalidArgument naming `where` unless the sizes fit the layer and the parts can be combined.
void check_transform(const TransformSpec& transform, Side side, const LayerConfig& layer, const std::string& where);

// In place on one row of one KV head, [head_dim].
void transform_row(const TransformSpec& transform, int kv_head, int head_dim, float* row);
// Queries against transformed keys.
void transform_query(const TransformSpec& transform, int kv_head, int head_dim, float* row);
// Stored space back to the original one: attention outputs (values have no centre) and rows that are read.
void inverse_row(const TransformSpec& transform, int kv_head, int head_dim, float* row);

// One KV head's error feedback as TileEncoder::feedback takes it; null if there is none.
const float* head_feedback(const TransformSpec& transform, int kv_head, int head_dim);

}  // namespace kvmix
