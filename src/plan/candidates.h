// What planners choose from: the codecs that a profile measured, with their bytes and costs.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kvmix/plan.h"
#include "plan/allocate.h"

namespace kvmix {

struct Candidate {
  SideConfig config;
  double cost;
};

// The metric to go by: `wanted`, or with "best" the best that the profile has; empty for the gradient scores. Throws
// kInvalidArgument for one that the profile lacks.
std::string pick_metric(const Profile& profile, const std::string& wanted);
// Which of the measured codecs are candidates.
struct CodecChoice {
  bool both_fits = false;  // keys of the unbiased fit too
  bool trellis = true;
};
// What is a candidate unless the user says otherwise: trellises where they take little longer to read, so on the CPU.
inline CodecChoice codec_choice(const std::string& device) { return {.trellis = device != "cuda"}; }
// The measured codecs of a side, each with the cost of `recent` rows under its transform beside its own, and fp16 last. Throws
// kMismatch if the measurement is incomplete.
std::vector<Candidate> candidates(const ModelShape& model, const Profile& profile, const std::string& metric, int layer,
                                  Side side, const CodecSpec& recent, const CodecChoice& choice = {});

// Every side of a model, keys of a layer before its values.
struct PricedChoices {
  std::vector<std::vector<Candidate>> sides;
  std::vector<std::vector<Choice>> items;  // the same, with bytes of one sequence's pages
  int64_t fixed_bytes = 0;                 // what does not depend on codecs: sinks, tables
  double elements = 0;                     // that the bits are averaged over

  // Writes the chosen codecs into the plan; returns the sum of their costs.
  double apply(const std::vector<size_t>& chosen, Plan& plan) const;
};
// For the plan's sinks, window and recent rows; without what the device has no code for.
PricedChoices price(const Plan& plan, const ModelShape& model, const Profile& profile, const std::string& metric,
                    int64_t context, const std::string& device, const CodecChoice& choice);

[[noreturn]] void refuse_budget(int64_t budget_bytes, int64_t least_bytes, const PricedChoices& priced, int64_t context);

}  // namespace kvmix
