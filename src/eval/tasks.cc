// Accuracy on tasks: what each cache answers greedily.
#include <algorithm>
#include <chrono>

#include "eval/contender.h"
#include "kvmix/error.h"
#include "profile/task_meter.h"

namespace kvmix {
namespace {

constexpr size_t kChunk = 512;

}  // namespace

std::vector<TaskRow> evaluate_tasks(std::shared_ptr<const Model> model, std::span<const Task> tasks,
                                    std::span<const EvalSubject> subjects, const TaskOptions& options,
                                    const Progress& progress) {
  if (tasks.empty()) throw Error(Status::kInvalidArgument, "there are no tasks to answer");
  const std::vector<EvalSubject> rows_of = rows_after_f16(model->shape(), subjects, options.force_plan);
  std::vector<TaskTokens> asked;
  int64_t longest = 0;
  double total = 0, done = 0;
  for (const Task& task : tasks) {
    const TaskTokens& tokens = asked.emplace_back(task_tokens(*model, task));
    longest = std::max(longest, static_cast<int64_t>(tokens.prompt.size()) + tokens.most);
    total += static_cast<double>(tokens.prompt.size() * rows_of.size());
  }
  ContenderOptions contender;
  contender.context = longest;
  contender.threads = options.threads;
  contender.device = options.device;
  contender.kernel = options.kernel;
  contender.exact = options.exact;
  contender.force_plan = options.force_plan;
  const auto vocab = static_cast<size_t>(model->vocab_size());
  std::vector<TaskRow> rows;
  for (const EvalSubject& subject : rows_of) {
    const auto start = std::chrono::steady_clock::now();
    TaskRow& row = rows.emplace_back();
    row.name = subject.name;
    std::unique_ptr<Contender> cache;
    try {
      cache = make_contender(model, subject, contender);
    } catch (const Error& e) {
      if (subject.plan) throw;
      row.lost = e.what();
      if (options.on_row) options.on_row(row);
      continue;
    }
    int hits = 0;
    double bits = 0, kept = 0;
    const auto report = [&](size_t tokens) {
      done += static_cast<double>(tokens);
      const std::string found = std::to_string(hits) + " of " + std::to_string(row.solved.size()) + " solved";
      if (progress && !progress(done, total, subject.name + ", " + found))
        throw Error(Status::kCancelled, "stopped while answering tasks");
    };
    for (size_t i = 0; i < tasks.size(); ++i) {
      const std::span<const Token> prompt(asked[i].prompt);
      const auto before = static_cast<int64_t>(prompt.size()) - 1;  // the last token's logits are the answer's first
      cache->clear();
      cache->set_prompt(before);
      for (size_t at = 0; at + 1 < prompt.size(); at += kChunk) {
        const size_t n = std::min(kChunk, prompt.size() - 1 - at);
        cache->feed(prompt.subspan(at, n), false);
        report(n);
      }
      std::string text;
      Token token = prompt.back();
      for (int64_t t = 0; t < asked[i].most; ++t) {
        const auto logits = cache->decode({&token, 1}).first(vocab);
        if (t == 0) {
          bits += static_cast<double>(cache->cache_bytes(before + 1)) * 8 / f16_elements(model->shape(), before + 1);
          kept += cache->kept(before + 1);
        }
        token = static_cast<Token>(std::max_element(logits.begin(), logits.end()) - logits.begin());
        if (model->is_end(token)) break;
        text += model->token_text(token);
      }
      row.solved.push_back(is_answer(text, tasks[i].answer));
      hits += row.solved.back() ? 1 : 0;
      row.answers.push_back(std::move(text));
      report(1);
    }
    const auto n = static_cast<double>(tasks.size());
    row.bits_per_element = bits / n;
    row.kept = kept / n;
    row.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (options.on_row) options.on_row(row);
  }
  return rows;
}

}  // namespace kvmix
