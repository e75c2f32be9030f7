// One row of an evaluation or benchmark: our engine with a plan, or the peer, behind one interface.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kvmix/eval.h"

namespace kvmix {

struct ContenderOptions {
  int64_t context = 0;
  int threads = 0, sequences = 1, chunk_tokens = 512;
  std::string device = "cpu", kernel = {};
  bool exact = false, force_plan = false;
};

class Contender {
 public:
  virtual ~Contender() = default;
  // Feeds tokens to sequence 0; logits of every token if all_logits, else of none.
  virtual std::span<const float> feed(std::span<const Token> tokens, bool all_logits) = 0;
  // One token for every sequence; logits row by row.
  virtual std::span<const float> decode(std::span<const Token> tokens) = 0;
  // Makes every sequence a copy of sequence 0, with memory of its own. Ours are up to a page shorter, each by another number of
  // tokens, as sequences that came at different times are: so they don't seal all at once.
  virtual void spread() = 0;
  // Sequences go back to n tokens, or as many fewer as spread() left them.
  virtual void truncate(int64_t n) = 0;
  virtual void clear() = 0;
  // Remembers sequence 0 as it is, pages sealed and open; rewind() goes back to it as often as wanted, until clear().
  virtual void mark() = 0;
  virtual void rewind() = 0;
  // Where a chunk that starts at `from` may end at the latest, so that chunked feeding stores and sees what decoding one by
  // one would: no page is sealed between two tokens of a chunk. At most kPageTokens away.
  virtual int64_t chunk_end(int64_t from) const = 0;
  // What feed() is given up to this length is a prompt to a token policy, which acts at its end; what comes later stands for
  // decoded tokens. 0: nothing is.
  virtual void set_prompt(int64_t tokens) = 0;
  // The part of so many tokens that sequence 0 still holds, over the layers without a sliding window.
  virtual double kept(int64_t tokens) const = 0;
  virtual size_t cache_bytes(int64_t tokens) const = 0;  // of one sequence now
  virtual double body_bits(int64_t tokens) const = 0;    // as EvalRow's
  virtual std::string kernel() const = 0;
  // Of the steps so far: their number, and seconds in which the host did something.
  virtual std::pair<int64_t, double> host_seconds() const = 0;
};

std::unique_ptr<Contender> make_contender(std::shared_ptr<const Model> model, const EvalSubject& subject,
                                          const ContenderOptions& options);

// Our f16 cache's row and those given. Throws as check_plan.
std::vector<EvalSubject> rows_after_f16(const ModelShape& model, std::span<const EvalSubject> subjects, bool force_plan);
// What bits are counted by: elements that the f16 cache holds of so many tokens.
double f16_elements(const ModelShape& model, int64_t tokens);

}  // namespace kvmix
