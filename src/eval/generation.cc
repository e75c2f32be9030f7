// Greedy continuations: how long a cache says what the f16 cache says, and whether it falls into repetition.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <set>

#include "engine/float_copy.h"
#include "eval/contender.h"
#include "eval/windows.h"
#include "kvmix/error.h"

namespace kvmix {
namespace {
constexpr int kCourseTokens = 128;
}

double repetition_rate(std::span<const Token> tokens, int n) {
  if (n < 1 || tokens.size() < static_cast<size_t>(n)) return 0;
  std::set<std::vector<Token>> met;
  const size_t count = tokens.size() - static_cast<size_t>(n) + 1;
  for (size_t i = 0; i < count; ++i)
    met.emplace(tokens.begin() + static_cast<ptrdiff_t>(i), tokens.begin() + static_cast<ptrdiff_t>(i) + n);
  return 1 - static_cast<double>(met.size()) / static_cast<double>(count);
}

std::vector<GenerationRow> evaluate_generation(std::shared_ptr<const Model> model, const std::string& text,
                                               std::span<const EvalSubject> subjects, const GenerationOptions& options,
                                               const Progress& progress) {
  const int64_t context = int64_t{options.prompt_tokens} + options.tokens;
  if (options.prompt_tokens < 8 || options.tokens < kRepeatedNgram || context > model->shape().context_tokens) {
    throw Error(Status::kInvalidArgument, "generation needs prompts of at least 8 tokens and continuations of at least " +
                                              std::to_string(kRepeatedNgram) + ", together within the model's context of " +
                                              std::to_string(model->shape().context_tokens));
  }
  const std::vector<std::vector<Token>> prompts = text_windows(*model, text, options.prompt_tokens, options.prompts);
  const std::vector<EvalSubject> rows_of = rows_after_f16(model->shape(), subjects, options.force_plan);
  std::unique_ptr<FloatCopy> copy;
  if (options.float_weights) {
    copy = std::make_unique<FloatCopy>(model->path());
    model = Model::load(copy->path());
  }
  std::vector<Token> ends;
  for (Token t = 0; t < model->vocab_size(); ++t) {
    if (model->is_end(t)) ends.push_back(t);
  }
  const auto vocab = static_cast<size_t>(model->vocab_size());
  const double total = static_cast<double>(rows_of.size() * prompts.size()) * static_cast<double>(context);
  double done = 0;
  const auto report = [&](size_t n, const std::string& what) {
    done += static_cast<double>(n);
    if (progress && !progress(done, total, what)) throw Error(Status::kCancelled, "stopped while generating");
  };
  std::vector<std::vector<Token>> reference;
  std::vector<GenerationRow> rows;
  for (const EvalSubject& subject : rows_of) {
    ContenderOptions contender;
    contender.context = context;
    contender.threads = options.threads;
    contender.device = options.device;
    contender.force_plan = true;  // checked above; a copy of the weights has another fingerprint
    GenerationRow row;
    row.name = subject.name;
    double kept = 0;
    std::unique_ptr<Contender> runner;
    try {
      runner = make_contender(model, subject, contender);
    } catch (const Error& e) {
      if (subject.plan) throw;
      row.lost = e.what();
      if (options.on_row) options.on_row(row);
      rows.push_back(std::move(row));
      continue;
    }
    for (size_t p = 0; p < prompts.size(); ++p) {
      runner->clear();
      const std::span<const Token> prompt(prompts[p]);
      runner->set_prompt(static_cast<int64_t>(prompt.size()) - 1);
      for (size_t at = 0; at + 1 < prompt.size();) {
        const auto end = std::min<size_t>(prompt.size() - 1, static_cast<size_t>(runner->chunk_end(static_cast<int64_t>(at))));
        runner->feed(prompt.subspan(at, end - at), false);
        report(end - at, subject.name);
        at = end;
      }
      std::vector<Token> said;
      auto since = std::chrono::steady_clock::now();
      size_t measured = 0, point = 0;
      Token token = prompt.back();
      while (said.size() < static_cast<size_t>(options.tokens)) {
        const auto logits = runner->decode({&token, 1}).first(vocab);
        float best = -INFINITY;
        for (size_t t = 0; t < vocab; ++t) {
          if (!(logits[t] > best) || std::find(ends.begin(), ends.end(), static_cast<Token>(t)) != ends.end()) continue;
          best = logits[t];
          token = static_cast<Token>(t);
        }
        said.push_back(token);
        report(1, subject.name);
        if (said.size() % kCourseTokens != 0 && said.size() != static_cast<size_t>(options.tokens)) continue;
        const auto now = std::chrono::steady_clock::now();
        const double rate = static_cast<double>(said.size() - measured) / std::chrono::duration<double>(now - since).count();
        if (p == 0) row.course.push_back({static_cast<int>(said.size()), 0, 0});
        const auto length = static_cast<int64_t>(prompt.size() + said.size()) - 1;
        row.course[point].cache_bytes += static_cast<double>(runner->cache_bytes(length)) / static_cast<double>(prompts.size());
        row.course[point].tokens_per_s += rate / static_cast<double>(prompts.size());
        ++point;
        measured = said.size();
        since = std::chrono::steady_clock::now();
      }
      if (rows.empty()) reference.push_back(said);
      const auto differs = std::mismatch(said.begin(), said.end(), reference[p].begin()).first;
      row.agreement.push_back(static_cast<int>(differs - said.begin()));
      row.repetition.push_back(repetition_rate(said, kRepeatedNgram));
      row.bits_per_element += static_cast<double>(runner->cache_bytes(context)) * 8 / f16_elements(model->shape(), context) /
                              static_cast<double>(prompts.size());
      kept += runner->kept(context - 1);
    }
    row.kept = kept / static_cast<double>(prompts.size());
    if (options.on_row) options.on_row(row);
    rows.push_back(std::move(row));
  }
  return rows;
}

}  // namespace kvmix
