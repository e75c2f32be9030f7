// Quality of a cache: what the running cache stores is what is scored (teacher forcing over codes).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kvmix/engine.h"
#include "kvmix/export.h"
#include "kvmix/measure.h"

namespace KVMIX_API kvmix {

// Rows go to `on_row` (or cells, or all rows so far) as they are complete, so that a run that is stopped loses no others. A
// peer that cannot run loses its row, which then says why.

// A row of an evaluation: one of our plans, or a peer cache type.
struct EvalSubject {
  std::string name;
  std::optional<Plan> plan;  // ours
  std::string peer_type;     // else libllama's cache type
};

struct EvalRow;
struct NeedleCell;
struct GenerationRow;
struct TaskRow;
struct BenchRow;

struct EvalOptions {
  int64_t context = 2048;
  int64_t scored = 0;  // last tokens of a window; 0: its second half
  int windows = 8;     // 0: as many as the text has
  int threads = 0;
  std::string device = "cpu";  // as in EngineOptions, of all rows
  bool exact = false;
  std::string kernel;
  bool force_plan = false;
  bool float_weights = false;  // run everything on a temporary fp32 copy of the weights, which rounds no activations
  std::function<void(std::span<const EvalRow>, size_t windows)> on_window = {};  // all rows, after that many windows
};

struct EvalRow {
  std::string name;
  double perplexity = 0, perplexity_ratio = 0;                // ratio to the f16 cache (ours)
  double kl_mean = 0, kl_p99 = 0, kl_max = 0, kl_stderr = 0;  // nats per token against our f16 cache
  double top1 = 0;                                            // share of positions with the same most likely token as f16
  double bits_per_element = 0;                                // all bytes, at the end of a window, by what f16 would keep
  double body_bits = 0;  // of sealed pages alone: predict_body_bits (kvmix/cache.h), for a peer its type's
  double kept = 1;  // part of the tokens that a token policy left, at the end of a window; what is not scored is the prompt
  size_t cache_bytes = 0;  // for one sequence of `context` tokens
  int64_t scored_tokens = 0;
  std::vector<std::pair<int64_t, double>> kl_by_position;  // position in the window, mean KL around it
  double seconds = 0;
  std::string lost;  // why a peer has no numbers; empty if it has
};

// Scores the second half of each window of `context` tokens, or the last `scored`. Rows are evaluated in lockstep with the f16
// reference, chunk by chunk, so memory stays at one cache per row. The first row returned is our f16 cache.
std::vector<EvalRow> evaluate(std::shared_ptr<const Model> model, const std::string& text,
                              std::span<const EvalSubject> subjects, const EvalOptions& options, const Progress& progress);

// The same over windows given as tokens; options.context and windows are not used.
std::vector<EvalRow> evaluate_tokens(std::shared_ptr<const Model> model, std::span<const std::vector<Token>> windows,
                                     std::span<const EvalSubject> subjects, const EvalOptions& options,
                                     const Progress& progress);

// Needles: `key`, a number (one in a haystack, which stands at one depth after the other); and, one at each depth of one
// haystack, `keys`, numbers of things that differ in a word, `quote`, a sentence that somebody said, and `word`, a rare word.
std::vector<std::string> needle_kinds();
struct NeedleOptions {
  std::vector<int64_t> contexts = {1024, 2048, 4096, 8192};
  std::vector<std::string> kinds = needle_kinds();
  std::vector<double> depths = {0.1, 0.3, 0.5, 0.7, 0.9};
  int trials = 2;
  uint64_t seed = 0;
  int threads = 0;
  std::string device = "cpu";
  std::string kernel = {};
  bool exact = false;
  bool force_plan = false;
  std::function<void(std::span<const NeedleCell>)> on_cells = {};  // those of one row, context and kind
};
struct NeedleCell {
  std::string name, kind;
  int64_t context = 0;
  double depth = 0;
  int hits = 0, trials = 0;
  // Of the right answer's tokens, given those before: negative log-likelihood in nats, and logit above the best other one's.
  double nll = 0, margin = 0;
  int answer_tokens = 0;
  // Where prompts end, mean over trials and depths: part of the tokens that are kept, all bytes by what f16 would keep.
  double kept = 1, bits_per_element = 0;
  std::vector<std::string> answers = {};  // what was written, trial by trial
  std::string lost = {};
};
// Of a share, at 95 % (Wilson's score interval).
struct Interval {
  double low, high;
};
Interval confidence(int hits, int trials);
std::vector<NeedleCell> evaluate_needle(std::shared_ptr<const Model> model, std::span<const EvalSubject> subjects,
                                        const NeedleOptions& options, const Progress& progress);

struct GenerationOptions {
  int prompts = 8;          // spread evenly over the text
  int prompt_tokens = 512;  // of each
  int tokens = 512;         // continued greedily; tokens that end a text are left out, so that all have this length
  int threads = 0;
  std::string device = "cpu";
  bool force_plan = false;
  bool float_weights = false;  // as in EvalOptions
  std::function<void(const GenerationRow&)> on_row = {};
};
inline constexpr int kRepeatedNgram = 4;
// While a row writes, mean over prompts: what a sequence took after so many tokens, and the speed of those since the last
// point.
struct GenerationPoint {
  int tokens = 0;
  double cache_bytes = 0, tokens_per_s = 0;
};
struct GenerationRow {
  std::string name;
  std::vector<int> agreement;      // of each prompt: tokens up to the first that differs from our f16 cache's
  std::vector<double> repetition;  // of each prompt: repetition_rate of kRepeatedNgram
  double bits_per_element = 0;     // all bytes, at the end
  double kept = 1;                 // part of the tokens, at the end
  std::vector<GenerationPoint> course;
  std::string lost;
};
// The first row is our f16 cache. Throws kInvalidArgument for lengths beyond the model's context or too short a text,
// kMismatch, kCancelled.
std::vector<GenerationRow> evaluate_generation(std::shared_ptr<const Model> model, const std::string& text,
                                               std::span<const EvalSubject> subjects, const GenerationOptions& options,
                                               const Progress& progress);
// Share of runs of n tokens that stand earlier in the text as well, 0 to 1.
double repetition_rate(std::span<const Token> tokens, int n);

struct TaskOptions {
  int threads = 0;
  std::string device = "cpu";
  std::string kernel = {};
  bool exact = false;
  bool force_plan = false;
  std::function<void(const TaskRow&)> on_row = {};
};
struct TaskRow {
  std::string name;
  std::vector<bool> solved;          // task by task, by is_answer
  std::vector<std::string> answers;  // what was written
  // Where prompts end, mean over tasks: all bytes by what f16 would keep, part of the tokens that are kept.
  double bits_per_element = 0, kept = 1;
  double seconds = 0;
  std::string lost;
};
// Answers every task greedily, each in a sequence of its own. The first row is our f16 cache. Throws kInvalidArgument for a
// task beyond the model's context or none, kMismatch, kCancelled.
std::vector<TaskRow> evaluate_tasks(std::shared_ptr<const Model> model, std::span<const Task> tasks,
                                    std::span<const EvalSubject> subjects, const TaskOptions& options,
                                    const Progress& progress);

struct BenchOptions {
  std::vector<int64_t> depths = {0, 1024, 4096, 8160};
  int decode_tokens = 16;  // per repetition and depth
  int repetitions = 3;     // interleaved over subjects, on "cuda" one subject after the other
  int sequences = 1;       // decoded together, each with memory of its own
  size_t memory = 0;       // of "cuda": as many sequences as fit this many bytes with weights and all else; 0: `sequences`
  int threads = 0;
  std::string device = "cpu";
  std::string kernel = {};
  bool force_plan = false;
  std::function<void(const BenchRow&)> on_row = {};
};
struct BenchRow {
  std::string name;
  int64_t depth = 0;
  int sequences = 1;
  double decode_tokens_per_s = 0, decode_min = 0, decode_max = 0;  // of all sequences, median and spread
  double prefill_tokens_per_s = 0;                                 // of the first `depth` tokens of one sequence
  size_t cache_bytes = 0;                                          // of all sequences
  size_t peak_bytes = 0;  // what the row added to the process, at the most: anonymous memory, on "cuda" the device's in all
  std::string kernel;
  double host_seconds = 0;  // of a decode step, on "cuda": what it does not wait for the device; 0 for peers
  std::string lost;
};
std::vector<BenchRow> bench(std::shared_ptr<const Model> model, std::span<const EvalSubject> subjects,
                            const BenchOptions& options, const Progress& progress);

}  // namespace kvmix
