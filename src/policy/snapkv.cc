// SnapKV (arXiv 2404.14469): the last queries of a prompt vote for older tokens; the best of each KV head stay.
#include "policy/window_vote.h"

namespace kvmix {

extern const PolicyEntry kSnapkvPolicy;
const PolicyEntry kSnapkvPolicy = {
    {"snapkv", "tokens that the prompt's last queries look at", "arXiv 2404.14469", window_vote_parameters(32)},
    [](const PolicyValues& values) -> std::unique_ptr<Policy> { return std::make_unique<VotePolicy>(values); }};

}  // namespace kvmix
