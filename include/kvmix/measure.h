// Measurements on a model that plans are made from. All need the engine.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kvmix/engine.h"
#include "kvmix/export.h"
#include "kvmix/plan.h"

namespace KVMIX_API kvmix {

constexpr const char* kBuiltInText = "built-in";

struct CalibrationOptions {
  int prompts = 16;
  int tokens = 512;  // per prompt, continuation included; prompts are cut to it
  uint64_t seed = 0;
  // .txt (documents separated by blank lines are joined into windows), .jsonl ({"text": ...}) or kBuiltInText, English prose
  // that the library has; empty: the project's own prompts, each continued by the model itself
  std::string file;
  std::string device = "cpu";  // that the model writes on, as EngineOptions::device
};
// Token sequences for calibration. Throws naming file, line and remedy on a bad file.
std::vector<std::vector<Token>> calibration_prompts(std::shared_ptr<const Model> model, const CalibrationOptions& options,
                                                    int threads, const Progress& progress);

// Tells prompts apart, token by token. Text that a model writes itself differs between processors.
uint64_t text_checksum(std::span<const std::vector<Token>> prompts);

struct GradientOptions {
  std::string device = "cpu";  // or "cuda": forward and backward passes run there, weights copied layer by layer
  int threads = 0;             // 0: all cores
  std::function<void(const Profile&)> partial;  // called when a prompt is complete, to save what there is
};
// Gradient scores (KVmix b.1) into profile.key_score / value_score (+ by prompt), one backward pass per prompt for all layers.
// The first profile.prompts prompts are those that it has already, so a run that was stopped resumes. Throws kMismatch for
// another model's profile, kCancelled.
void profile_gradients(std::shared_ptr<const Model> model, std::span<const std::vector<Token>> prompts,
                       const GradientOptions& options, Profile& profile, const Progress& progress);

struct SensitivityOptions {
  // "kl": KL divergence of the model's output against the f16 cache with one side of one layer quantised alone, in nats per
  // scored token, at 1, 2 and 3 bits and carried to other codecs by "fisher"; "fisher": its second-order estimate from the
  // gradients at the attention output and the codec's error there; "output": relative squared error of the attention output.
  std::string metric = "kl";
  int64_t tokens = 2048;         // of each window; prompts are joined and cut to it (and to the model's context)
  int windows = 1;               // as many as the prompts' text allows, at most this many
  std::optional<Fp16Part> fp16;  // as the cache will run; absent: what is usual for the model
  bool mpo = false;              // also codecs behind DecoQuant's decomposition (arXiv 2405.12591): a fifth more work
  std::string device = "cpu";    // of the passes, as in GradientOptions; codecs are measured on the CPU; not of "kl"
  int threads = 0;               // 0: all cores
  std::function<void(const Profile&)> partial;  // called when a layer is complete, to save what there is
};
// Adds sensitivities of one metric to a profile of this model, for every layer, side and candidate codec (widths 1, 2, 3, 4, 6
// and 8, plain, rotated, and with the transforms that the first window calibrates, which go into profile.transforms). "kl" also
// adds "fisher" and "output", each of which the other, and all of them what recent rows of 8 bits cost. Gradient scores that
// the profile lacks come on the way: prompts that are windows take no further pass. What the profile has of this text is kept
// and not measured again, so a run that was stopped resumes: layer by layer, and of "kl" width by width. Throws kMismatch for
// another model's profile or one with another fp16 part, kInvalidArgument for an unknown metric or too little text, kCancelled.
void profile_sensitivity(std::shared_ptr<const Model> model, std::span<const std::vector<Token>> prompts,
                         const SensitivityOptions& options, Profile& profile, const Progress& progress);

// Measures whole plans on windows of tokens, in fp32 layer by layer as "kl" does, over pages as the running cache stores them:
// up to 512 positions of each window's second half. A plan is run only from the first layer in which it differs from one of the
// two measured last. Keeps `model`; throws kInvalidArgument for a window too short to seal a page of, or none.
std::unique_ptr<PlanMeter> make_plan_meter(std::shared_ptr<const Model> model, std::vector<std::vector<Token>> windows,
                                           std::vector<std::vector<Token>> held_out, int threads);

// Low-rank factors of a model's key and value projections (docs/rank.md).
struct FactorisationInfo {
  std::string name, description;
};
std::vector<FactorisationInfo> factorisations();
struct FactoriseOptions {
  std::string method = "palu";
  double keep = 0.5;                 // latents of all channels, keys and values of all layers together
  int group = 0;                     // KV heads that share factors; 0: the largest divisor of all up to 4
  const Profile* profile = nullptr;  // whose gradients give "palu" and "recalkv" their ranks; null: all alike
  int threads = 0;                   // 0: all cores
};
// Writes a factors file. `windows`: text that inputs are taken from, which "lorc" does not read. Throws kInvalidArgument,
// kMismatch for another model's profile, kCancelled, kIo.
void factorise(std::shared_ptr<const Model> model, std::span<const std::vector<Token>> windows, const FactoriseOptions& options,
               const std::string& path, const Progress& progress);

struct Task {
  std::string prompt, answer;
  std::string kind = {};  // what scores are told apart by; may be empty
};
// A JSON Lines file of {"prompt": ..., "answer": ...}, with "kind" where there are several. Throws kCorrupt naming file and
// line, kInvalidArgument for fewer than 3, kNotFound, kIo.
std::vector<Task> read_tasks(const std::string& path);
// Whether a continuation gives the answer: it begins with it, blanks aside, and no letter or digit follows.
bool is_answer(const std::string& text, const std::string& answer);
// Measures plans by the tasks that greedy continuations of the running cache do not answer; the last third is held out.
// `device` as EngineOptions::device. Throws kInvalidArgument for fewer than 3 tasks or one beyond the model's context.
std::unique_ptr<PlanMeter> make_task_meter(std::shared_ptr<const Model> model, std::vector<Task> tasks, int threads,
                                           const std::string& device = "cpu");

}  // namespace kvmix
