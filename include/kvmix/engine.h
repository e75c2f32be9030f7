// The engine: runs GGUF models on ggml with a kvmix cache. It proves the core on real models; other engines link the core
// alone.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kvmix/cache.h"
#include "kvmix/export.h"
#include "kvmix/plan.h"

namespace KVMIX_API kvmix {

using Token = int32_t;

struct ChatMessage {
  std::string role, content;
};

// How a model writes a conversation.
struct ChatTemplate {
  std::string name;    // a name that libllama knows, or what stands for the source in errors, such as its file
  std::string source;  // Jinja; empty: libllama's of that name
};
std::vector<std::string> chat_template_names();  // those that libllama knows

// A loaded GGUF: weights (mapped, quantised as stored), tokenizer and chat template (libllama's). Immutable; thread safe.
class Model {
 public:
  // Throws kNotFound, kCorrupt (truncated, not GGUF, a tensor out of range: names the field) or kUnsupported (architecture,
  // naming those supported).
  static std::shared_ptr<const Model> load(const std::string& path);
  virtual ~Model() = default;

  virtual const ModelShape& shape() const = 0;
  virtual const std::string& path() const = 0;
  virtual size_t weight_bytes() const = 0;
  virtual int vocab_size() const = 0;

  // UTF-8 in, tokens out. `special` parses control tokens in the text. Adds BOS where the model wants one and add_bos is set,
  // unless the text begins with it.
  virtual std::vector<Token> tokenize(std::string_view text, bool add_bos, bool special = false) const = 0;
  // Bytes of one token; may be part of a UTF-8 character.
  virtual std::string token_text(Token token) const = 0;
  virtual std::string detokenize(std::span<const Token> tokens) const = 0;
  virtual bool is_end(Token token) const = 0;
  virtual Token bos() const = 0;  // -1 if the model has none
  // The model's own; its source is empty if it has none.
  virtual ChatTemplate chat_template() const = 0;
  // The conversation in a template's words, up to where the assistant's answer starts. What messages say is text: special
  // tokens that they spell out are not taken as such. Throws kUnsupported naming the template and the reason, kInvalidArgument
  // for a name that libllama does not know.
  virtual std::vector<Token> chat_tokens(std::span<const ChatMessage> messages, const ChatTemplate& chat_template) const = 0;
};

struct EngineOptions {
  std::string device = "cpu";  // or "cuda", the calling thread's current one: weights, cache and all arithmetic are there
  int threads = 0;             // of "cpu". 0: the cores that affinity and quotas leave
  int chunk_tokens = 512;      // prefill chunk; evaluation uses kPageTokens so that it equals decoding one by one
  size_t max_cache_bytes = 0;
  std::string kernel = {};  // see CacheConfig::kernel
  bool exact = false;
  bool force_plan = false;  // accept a plan whose fingerprint differs
};

// One step's work for one sequence.
struct EngineItem {
  SequenceId sequence;
  std::span<const Token> tokens;
  bool all_logits = false;  // logits for every token; otherwise for the last one only
  bool no_logits = false;
  // For token policies, as in StepItem: more of the same prompt follows; tokens that stand for decoded ones.
  bool more = false, decoded = false;
};

// Of all steps of an engine.
struct EngineStats {
  int64_t steps = 0;
  double seconds = 0;       // in all
  double wait_seconds = 0;  // of these on the device "cuda", when the host had nothing to do but to wait for it
};

// A model with a cache. Not thread safe; several engines may share a Model.
class Engine {
 public:
  Engine(std::shared_ptr<const Model> model, const Plan& plan, const EngineOptions& options);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  const Model& model() const;
  const Plan& plan() const;
  Cache& cache();

  // Runs the items as one batch (each item at most chunk_tokens long) and returns logits row by row in item order,
  // [rows][vocab_size], valid until the next step. Throws kInvalidArgument beyond the model's context.
  std::span<const float> step(std::span<const EngineItem> items);
  // Any number of tokens of one sequence in chunks; logits of the last token. `progress(done, total)` between chunks;
  // returning false stops with kCancelled (tokens done so far stay in the cache).
  std::span<const float> prefill(SequenceId sequence, std::span<const Token> tokens,
                                 const std::function<bool(int64_t, int64_t)>& progress = {});

  EngineStats stats() const;
  // fingerprint of (model, plan) for saved caches
  std::string cache_fingerprint() const;

 private:
  struct KVMIX_HIDDEN Impl;
  std::unique_ptr<Impl> impl_;
};

struct SamplingOptions {
  float temperature = 0.8f;  // 0: greedy
  int top_k = 40;            // 0: off
  float top_p = 0.95f;       // 1: off
  float min_p = 0.05f;       // 0: off
  uint64_t seed = 0;
};

class Sampler {
 public:
  explicit Sampler(const SamplingOptions& options);  // throws kInvalidArgument on out-of-range options
  Token sample(std::span<const float> logits);

 private:
  SamplingOptions options_;
  uint64_t state_;
  std::vector<std::pair<float, Token>> scratch_;
};

struct GenerateOptions {
  SamplingOptions sampling;
  int max_tokens = 256;
  std::vector<std::string> stop;  // text that ends the answer; not part of it
};

struct GenerateResult {
  std::string text;
  std::string stop_reason;  // "end", "stop", "length", "context", "cancelled"
  int prompt_tokens = 0, new_tokens = 0;
  std::vector<Token> cached;  // tokens of the answer that the cache holds now: all but one that ended it
  double prefill_seconds = 0, decode_seconds = 0;
};

// Continues the sequence with the prompt. `on_text` receives whole UTF-8 characters as they come and returns false to stop.
GenerateResult generate(Engine& engine, SequenceId sequence, std::span<const Token> prompt, const GenerateOptions& options,
                        const std::function<bool(std::string_view)>& on_text);

// Architectures of the registry: name and one line, for `kvmix list`.
struct ArchitectureInfo {
  std::string name, description;
};
std::vector<ArchitectureInfo> architectures();

// Throws kNotFound, kIo, kCorrupt.
FactorsInfo inspect_factors(const std::string& path);
// Throws kMismatch unless they were made for this model, by fingerprint.
void check_factors(const FactorsInfo& factors, const ModelShape& model);
// The plan with all latents of these factors in place of keys and values, in its codecs, without its row maps.
Plan with_factors(Plan plan, const FactorsInfo& factors);

// The peer: the same model under libllama with one of its cache types, in this process.
class Peer {
 public:
  // cache_type: "f16", "q8_0", "q5_1", "q4_0" (quantised V needs flash attention, which is then on; llama.cpp rotates as it
  // does). `context` is each sequence's. On the device "cuda" weights and cache are in its memory, on "cpu" neither, nor are
  // products computed there. Throws kUnsupported, with libllama's reason, for what it cannot run.
  Peer(const std::string& model_path, const std::string& cache_type, int64_t context, int threads, int sequences = 1,
       const std::string& device = "cpu");
  ~Peer();
  Peer(Peer&&) noexcept;
  // Same contract as Engine::step for one sequence; llama.cpp splits into its own micro-batches of `chunk` tokens.
  std::span<const float> step(std::span<const Token> tokens, bool all_logits, bool no_logits = false);
  // One token for each of the first n sequences in one batch (continuous batching); logits row by row, valid until the next.
  std::span<const float> step_batch(std::span<const Token> tokens);
  void clear();
  // Keeps the first n tokens of every sequence.
  void truncate(int64_t n);
  // Makes the first `sequences` sequences copies of the first.
  void spread(int sequences);
  // K and V buffers for a context of this many tokens, as libllama lays them out.
  static size_t cache_bytes(const std::string& cache_type, const ModelShape& shape, int64_t tokens);
  // What a sequence of so many tokens takes on "cuda": those, and for quantised types its part of a layer in fp16.
  static size_t device_bytes(const std::string& cache_type, const ModelShape& shape, int64_t tokens);
  double bits_per_element() const;  // of its cache type
  const std::string& name() const;  // "llama.cpp q4_0"

 private:
  struct KVMIX_HIDDEN Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvmix
