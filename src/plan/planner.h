// A planner is one file and one line in planners.cc.
#pragma once

#include <array>
#include <string>
#include <utility>

#include "kvmix/error.h"
#include "kvmix/plan.h"

namespace kvmix {

struct Planner {
  PlannerInfo info;
  Plan (*make)(const PlannerRequest& request);
};

// Options as typed values; throw kInvalidArgument naming planner, option and what is expected.
class PlannerOptions {
 public:
  PlannerOptions(const char* planner, const std::map<std::string, std::string>& values) : planner_(planner), values_(values) {}
  int integer(const std::string& name, int fallback, int low, int high) const;
  double number(const std::string& name, double fallback, double low, double high) const;
  std::string choice(const std::string& name, const std::string& fallback, const std::vector<std::string>& accepted) const;
  int bits(const std::string& name, int fallback) const;

 private:
  [[noreturn]] void fail(const std::string& name, const std::string& expected) const;
  const char* planner_;
  const std::map<std::string, std::string>& values_;
};

// Header fields filled in, layers sized.
Plan empty_plan(const PlannerRequest& request, const char* planner);

// The project's recipe: keys per channel in groups of 128 tokens, fitted; values rotated, per token in groups of 64 channels,
// min-max but by the unbiased fit at one bit.
// The widths that profiles measure and planners choose from, besides fp16.
inline constexpr std::array kRecipeBits = {1, 2, 3, 4, 6, 8};
SideConfig recipe_key(int bits, bool hadamard);
SideConfig recipe_value(int bits);
// How rows are kept until they are sealed, unless in fp16.
inline constexpr CodecSpec kRecentRows{8, Axis::kToken, 64, Fit::kMinMax, true};
// Takes off keys what the model says that biases do to them (ModelShape::Layer).
void take_off_bias(const ModelShape::Layer& layer, TransformSpec& transform);

// Throws kMismatch for a profile whose gradient scores were not measured yet.
void check_scores(const Profile& profile);

// The plan's sinks and window from options of these names; `usual` where nobody says.
void read_fp16_part(const PlannerOptions& options, const Fp16Part& usual, Plan& plan);
// Likewise how rows are kept until they are sealed; 8 bits where nobody says.
void read_recent(const PlannerOptions& options, Plan& plan);
inline constexpr std::pair<const char*, const char*> kRecentOption{"recent",
                                                                   "rows not sealed yet: 8 (bits) or f16, twice the bytes (8)"};
inline constexpr std::pair<const char*, const char*> kSinksOption{"sinks", "first tokens kept fp16 (the profile's, 16)"};
inline constexpr std::pair<const char*, const char*> kLocalSinksOption{
    "local-sinks", "the same in layers with a sliding window (the profile's, 0)"};
inline constexpr std::pair<const char*, const char*> kWindowOption{"window", "newest tokens not packed (the profile's)"};

// The budget as bytes of one sequence at budget.context.
double budget_bytes(const Budget& budget, const ModelShape& model);

}  // namespace kvmix
