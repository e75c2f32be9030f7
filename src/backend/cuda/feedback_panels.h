// How the weights of error feedback of 8-bit rows lie in device memory.
#pragma once

#include "base/macros.h"

namespace kvmix::cuda {

// Channels that are rounded one after the other before their errors are added to the others. A head's weights are panels, one
// for each such block of channels from c0 on: [kTurnChannels][head_dim - c0], the weight with which the error of channel c0 + i
// is added to channel c0 + j, 0 for j <= i.
inline constexpr int kTurnChannels = 16;
// Where the panel of c0 begins, in floats; of c0 = head_dim: where they end.
KVMIX_HOST_DEVICE constexpr int feedback_panel(int head_dim, int c0) { return c0 * head_dim - c0 * (c0 - kTurnChannels) / 2; }

}  // namespace kvmix::cuda
