// Measurements on a model that plans are made from. All need the engine.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kvmix/engine.h"
#include "kvmix/plan.h"

namespace kvmix {

// Called with work done, total, and a label; returning false stops with kCancelled.
using Progress = std::function<bool(double done, double total, const std::string& what)>;

struct CalibrationOptions {
  int prompts = 16;
  int tokens = 512;  // per prompt, continuation included; prompts are cut to it
  uint64_t seed = 0;
  std::string file;  // .txt (documents separated by blank lines are joined into windows) or .jsonl ({"text": ...}); empty: the
                     // project's own prompts, each continued by the model itself
};
// Token sequences for calibration. Throws naming file, line and remedy on a bad file.
std::vector<std::vector<Token>> calibration_prompts(std::shared_ptr<const Model> model, const CalibrationOptions& options,
                                                    int threads, const Progress& progress);

// Gradient scores (KVmix b.1) into profile.key_score / value_score (+ by prompt), one backward pass per prompt for all layers.
Profile profile_gradients(std::shared_ptr<const Model> model, std::span<const std::vector<Token>> prompts, int threads,
                          const Progress& progress);

}  // namespace kvmix
