// Plans and profiles: what was measured on a model, and the configuration chosen from it. Both are JSON files that a person
// can read (docs/file-formats.md); both name the model they belong to by fingerprint.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kvmix/cache.h"

namespace kvmix {

// The part of a model that plans depend on.
struct ModelShape {
  std::string name, architecture, fingerprint;
  struct Layer {
    int q_heads, kv_heads, head_dim, sliding_window;
    float scale, softcap;
  };
  std::vector<Layer> layers;
  int64_t context_tokens = 0;  // trained context
};

// Measured once per model by `kvmix profile`.
struct Profile {
  std::string fingerprint, model;
  uint64_t seed = 0;
  int prompts = 0;
  int64_t tokens = 0;
  // Mean over prompts of the Frobenius norm of dL/dW_k and dL/dW_v (KVmix b.1), one entry per layer.
  std::vector<double> key_score, value_score;
  // The same per prompt, [prompt][layer], for rank stability; may be empty.
  std::vector<std::vector<double>> key_score_by_prompt, value_score_by_prompt;
  // Sensitivities: metric ("kl", "fisher", "fisher-page", "output") -> cost in nats per token of quantising only this
  // side of this layer with this codec. Empty until measured.
  struct Sensitivity {
    std::string metric;
    int layer;
    Side side;
    std::string codec;
    bool hadamard;
    double cost;
  };
  std::vector<Sensitivity> sensitivities;
  // Mean post-RoPE key per layer, [kv_heads * head_dim], for centring; empty if not measured.
  std::vector<std::vector<float>> key_mean;
};

struct Plan {
  std::string fingerprint, model, planner;
  std::string note;  // how it was made: the planner's arguments in words
  int sinks = 16;
  WindowRule window;
  struct Layer {
    SideConfig key, value;
  };
  std::vector<Layer> layers;
};

// Files. Readers check everything (unknown keys, ranges, sizes, finite numbers) and throw kCorrupt / kNotFound naming file,
// field, value and remedy. Writers write to a temporary and rename.
Plan read_plan(const std::string& path);
void write_plan(const Plan& plan, const std::string& path);
Profile read_profile(const std::string& path);
void write_profile(const Profile& profile, const std::string& path);
// The same over text already in memory; `name` stands for the path in errors.
Plan parse_plan(const std::string& json, const std::string& name);
std::string to_json(const Plan& plan);
Profile parse_profile(const std::string& json, const std::string& name);
std::string to_json(const Profile& profile);

// Throws kMismatch unless the plan was made for this model (same fingerprint, or `force` and the same layer count and shape).
void check_plan(const Plan& plan, const ModelShape& model, bool force);
// The cache configuration that the plan means on this model.
CacheConfig cache_config(const Plan& plan, const ModelShape& model);
// All fp16, no sinks or window bookkeeping: the baseline cache.
Plan f16_plan(const ModelShape& model);

struct Budget {
  double bits = 0;    // average bits per element, all bytes, at `context`; or
  size_t bytes = 0;   // bytes of one sequence of `context` tokens; or
  int sequences = 1;  //   ... of this many sequences together
  int64_t context = 8192;
};

struct PlannerRequest {
  const ModelShape* model = nullptr;
  const Profile* profile = nullptr;  // may be null for planners that need none
  Budget budget;
  // Free-form options, e.g. {"k-bits","3"}; a planner throws kInvalidArgument for one it does not know.
  std::map<std::string, std::string> options;
};

struct PlannerInfo {
  std::string name, description;
  std::vector<std::pair<std::string, std::string>> options;  // name, help with default
  bool needs_profile = false, needs_budget = false;
};
std::span<const PlannerInfo> planners();
// Throws kInvalidArgument for an unknown planner, kMismatch for a foreign profile, and for a budget that cannot be met an
// error that says the smallest that can.
Plan make_plan(const std::string& planner, const PlannerRequest& request);

}  // namespace kvmix
