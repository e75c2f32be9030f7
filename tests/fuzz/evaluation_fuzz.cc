// Evaluations from anybody, as kvmix report reads and draws them.
#include "evaluation.h"
#include "fuzz/target.h"
#include "kvmix/error.h"

namespace kvmix {
namespace {

bool accepts(const std::string& input) {
  try {
    app::quality_section({app::parse_evaluation(input, "evaluation")});
    return true;
  } catch (const Error&) {
    return false;
  }
}

std::vector<fuzz::Seed> seeds() {
  return {fuzz::whole(
      R"({"model": "m", "fingerprint": "f", "context": 512, "rows": [
{"name": "f16", "bits_per_element": 16, "perplexity": 12.5, "kl_mean": 0, "top1": 1, "kl_by_position": []},
{"name": "uniform 4/4", "bits_per_element": 4.5, "perplexity": 12.75, "kl_mean": 0.0125, "top1": 0.96, "kl_by_position": [[256, 0.01], [500, 0.015]]},
{"name": "llama.cpp q4_0", "lost": "block size 32 does not divide 80"}]})")};
}

const fuzz::Registered registered({"evaluation", seeds, accepts, 10000});

}  // namespace
}  // namespace kvmix
