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
#include "kvmix/error.h"
#include "kvmix/export.h"

namespace KVMIX_API kvmix {

// Called with work done, total, and a label; returning false stops with kCancelled.
using Progress = std::function<bool(double done, double total, const std::string& what)>;

// The part of a model that plans depend on.
struct ModelShape {
  std::string name, architecture, fingerprint;
  struct Layer {
    int q_heads, kv_heads, head_dim, sliding_window;
    float scale, softcap;
    // What biases do to keys, [kv_heads * head_dim]: the part that is the same at all positions, and how large channels are
    // beside it, up to a factor. Plans take both off keys, so that 8-bit recent rows, of one scale a token, have room for what
    // differs between tokens. Empty where there is no bias, or all channels are about as large.
    std::vector<float> key_center = {}, key_sizes = {};
  };
  std::vector<Layer> layers;
  int64_t context_tokens = 0;  // trained context
};

// What a sequence keeps out of packed pages, beside the page that is being filled; measured as fp16.
struct Fp16Part {
  int sinks = 16;       // first tokens
  int local_sinks = 0;  // the same in layers with a sliding window, which soon leaves them behind
  int window = 64;      // newest tokens, which plans may keep in 8 bits (Plan::recent)
  friend bool operator==(const Fp16Part&, const Fp16Part&) = default;
};
// What plans keep where nobody says.
Fp16Part usual_fp16_part(const ModelShape& model);

// Measured once per model by `kvmix profile`.
struct Profile {
  std::string fingerprint, model;
  uint64_t seed = 0;
  int prompts = 0;
  int64_t tokens = 0;
  uint64_t text = 0;  // text_checksum (measure.h) of the prompts: sensitivities of other text are not mixed with these
  // Mean over prompts of the Frobenius norm of dL/dW_k and dL/dW_v (KVmix b.1), one entry per layer.
  std::vector<double> key_score, value_score;
  // The same per prompt, [prompt][layer], for rank stability; may be empty.
  std::vector<std::vector<double>> key_score_by_prompt, value_score_by_prompt;
  // Sensitivities: metric ("kl", "fisher", "output") -> cost in nats per token of quantising only this
  // side of this layer with this codec. Empty until measured.
  struct Sensitivity {
    std::string metric;
    int layer;
    Side side;
    std::string codec;
    std::string transform;  // "plain", "hadamard", or the name of one of `transforms`
    double cost;
    bool recent = false;  // of recent rows in this codec alone, which come on top of what sealed pages cost
  };
  std::vector<Sensitivity> sensitivities;
  // [layer]: windows of text that "fisher" and "output" of the layer are means over; empty until measured.
  std::vector<int> windows;
  int64_t window_tokens = 0;  // of the shortest of them; 0: not known
  Fp16Part fp16;              // that they were measured with, and that plans from them keep
  // Transforms calibrated on the model's own rows, which sensitivities name.
  struct Transform {
    std::string name;
    int layer;
    Side side;
    TransformSpec spec;
  };
  std::vector<Transform> transforms;
  // Mean post-RoPE key per layer, [kv_heads * head_dim], for centring; of a layer, or of all, empty until measured.
  std::vector<std::vector<float>> key_mean;
};

// Latents in place of keys and values, by factors that stand in a file of their own (kvmix factorise).
struct RankSpec {
  std::string factors;   // the file; a plan file names it relative to itself
  std::string checksum;  // of its numbers
  std::string method;
  friend bool operator==(const RankSpec&, const RankSpec&) = default;
};

// What a factors file holds (kvmix factorise; docs/rank.md).
struct FactorsInfo {
  std::string path, method, note, model, fingerprint, checksum;
  struct Layer {
    int key_groups, key_rank, key_channels, value_groups, value_rank, value_channels;
    // [0 .. latents of a group]: part of the squared error of none that so many latents of each group leave, from 1 down.
    std::vector<double> key_left, value_left;
  };
  std::vector<Layer> layers;
};

struct Plan {
  std::string fingerprint, model, planner;
  std::string note;  // how it was made: the planner's arguments in words
  // What the plan is expected to cost: the sum of its sides' sensitivities; absent where a planner went by no sensitivity.
  struct Prediction {
    std::string metric;  // as in the profile
    double cost = 0;
  };
  std::optional<Prediction> predicted;
  int sinks = 16;
  std::optional<int> local_sinks;  // of layers with a sliding window; absent: `sinks` too
  WindowRule window;
  CodecSpec recent;                    // rows that are not sealed yet: f16, or 8-bit codes (LayerConfig::recent)
  std::optional<PolicySpec> tokens;    // which tokens stay; absent: all
  std::optional<PolicySpec> channels;  // which channels of keys are stored; absent: all
  std::optional<RankSpec> rank;        // absent: keys and values themselves
  struct Layer {
    SideConfig key, value;
    int key_rank = 0, value_rank = 0;  // with `rank`: latents of the layer, of all KV heads together; both 0: none
  };
  std::vector<Layer> layers;
};

// The transform that a sensitivity of this layer and side names: a calibrated one as it is, others with keys
// centred and scaled as the model's biases mean (ModelShape::Layer). Throws kMismatch if the profile lacks it.
TransformSpec named_transform(const ModelShape& model, const Profile& profile, int layer, Side side, const std::string& name);

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
// Throws kInvalidArgument naming the layer of a number that is not finite, which no reader would take.
std::string to_json(const Profile& profile);

// How a model that a file names differs from this one: by name, or by fingerprint alone.
std::string other_model(const std::string& name, const std::string& fingerprint, const ModelShape& model);
// Throws kMismatch unless the plan was made for this model (same fingerprint, or `force` and the same layer count and shape).
// `name` stands for the file in errors.
void check_plan(const Plan& plan, const ModelShape& model, bool force, const std::string& name = "the plan");
// The same for a profile.
void check_profile(const Profile& profile, const ModelShape& model, bool force, const std::string& name = "the profile");
// Sinks and a fixed window of a plan, as Fp16Part. Throws kUnsupported for a window that is a ratio.
Fp16Part fp16_part(const Plan& plan);
void set_fp16_part(const Fp16Part& part, Plan& plan);
// The cache configuration that the plan means on this model.
CacheConfig cache_config(const Plan& plan, const ModelShape& model);
// All fp16, no sinks or window bookkeeping: the baseline cache.
Plan f16_plan(const ModelShape& model);

struct Budget {
  double bits = 0;    // average bits per element, all bytes, at `context`; or
  size_t bytes = 0;   // bytes of one sequence of `context` tokens; or
  int sequences = 1;  //   ... of this many sequences together
  int64_t context = 8192;
  bool slack = false;  // bytes hold the allocator's rounding too (predict_slack_bytes): a promise to fit
};

// A budget that no plan meets; says the smallest that can be met.
class BudgetError : public Error {
 public:
  BudgetError(const std::string& message, size_t least_bytes)
      : Error(Status::kInvalidArgument, message), least_bytes_(least_bytes) {}
  size_t least_bytes() const { return least_bytes_; }  // of one sequence at the budget's context

 private:
  size_t least_bytes_;
};

// Measures plans as a whole (kvmix/measure.h makes one of a model and text).
class PlanMeter {
 public:
  virtual ~PlanMeter() = default;
  // KL divergence to the model with an f16 cache, nats, at each scored position; or, not in nats, 1 for each task that is not
  // answered, else 0. Every call scores the same positions or tasks.
  virtual std::vector<double> divergence(const Plan& plan) = 0;
  virtual bool in_nats() const { return true; }
  // The same on text that is not searched with: whether a gain is one.
  virtual std::vector<double> held_out(const Plan& plan) = 0;
};

struct PlannerRequest {
  const ModelShape* model = nullptr;
  const Profile* profile = nullptr;  // may be null for planners that need none
  Budget budget;
  std::string device = "cpu";  // where the plan shall run: what "cuda" has no fast code for is not taken
  // For planners that measure: at most `measurements` plans on the searched text. Without a meter they go by the profile.
  PlanMeter* meter = nullptr;
  int measurements = 0;
  Progress progress;  // of measuring; may be empty
  // For planners that take ranks: latents may stand for keys and values, layer by layer, where that is cheaper. What leaving
  // latents out costs is reckoned from what the side loses at 2 bits, times these prices; infinite: all of a side stay.
  const FactorsInfo* factors = nullptr;
  double key_price = 1, value_price = 1;
  // Free-form options, e.g. {"k-bits","3"}; a planner throws kInvalidArgument for one it does not know.
  std::map<std::string, std::string> options;
};

// Two f16 plans with a request's factors, one without a quarter of keys' latents, one without a quarter of values', and what a
// planner that takes ranks reckons them to cost at price 1: measured, they say what the prices are. Throws as make_plan.
struct RankProbes {
  Plan key, value;
  double key_cost = 0, value_cost = 0;  // in the profile's metric
};
RankProbes rank_probes(const PlannerRequest& request);

struct PlannerInfo {
  std::string name, description;
  std::vector<std::pair<std::string, std::string>> options;  // name, help with default
  bool needs_profile = false, needs_budget = false;
  bool measures = false;  // makes use of a meter
  bool ranks = false;     // makes use of factors
};
std::span<const PlannerInfo> planners();
// Throws kInvalidArgument for an unknown planner or a meter it has no use for, kMismatch for a foreign profile, BudgetError for
// a budget that cannot be met, kCancelled.
Plan make_plan(const std::string& planner, const PlannerRequest& request);
// The planner's whole curve, smallest plan first: up to `points` plans for budgets in equal ratios from the smallest that can
// be met to where more bytes change nothing, each larger than the one before it. Of request.budget only the context counts.
// Throws as make_plan, and kInvalidArgument for a planner that takes no budget.
std::vector<Plan> make_curve(const std::string& planner, PlannerRequest request, int points);

}  // namespace kvmix
