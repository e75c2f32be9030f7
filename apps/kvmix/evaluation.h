// What kvmix eval --json wrote, read back for reports.
#pragma once

#include <string>
#include <vector>

#include "kvmix/eval.h"

namespace kvmix::app {

struct Evaluation {
  std::string model, fingerprint;
  std::vector<EvalRow>
      rows;  // name, bits_per_element, perplexity, kl_mean, top1, kl_by_position; none of peers that could not run
};

// Throws kCorrupt naming `name` and what is wrong.
Evaluation parse_evaluation(const std::string& text, const std::string& name);
// Throws kMismatch unless it is of this model, or `force`.
void check_evaluation(const Evaluation& evaluation, const ModelShape& model, bool force, const std::string& name);
// A table and charts of them as HTML.
std::string quality_section(const std::vector<Evaluation>& evaluations);

}  // namespace kvmix::app
