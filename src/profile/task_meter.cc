// Accuracy of plans on tasks: KVTuner's own objective (arXiv 2502.04420; its search runs on exact matches of greedy answers).
#include "profile/task_meter.h"

#include <algorithm>
#include <cctype>

#include "base/file.h"
#include "base/machine.h"
#include "kvmix/error.h"
#include "kvmix/measure.h"
#include "profile/json_lines.h"

namespace kvmix {
namespace {

constexpr size_t kLargestFile = size_t{1} << 30;
constexpr int64_t kSpareTokens = 4;  // an answer may be split otherwise than its text alone

class TaskMeter final : public PlanMeter {
 public:
  TaskMeter(std::shared_ptr<const Model> model, std::vector<Task> searched, std::vector<Task> held_out, EngineOptions options)
      : model_(std::move(model)), options_(std::move(options)), searched_(std::move(searched)), held_out_(std::move(held_out)) {
    for (const auto* tasks : {&searched_, &held_out_}) {
      for (const Task& task : *tasks) task_tokens(*model_, task);
    }
  }

  bool in_nats() const override { return false; }
  std::vector<double> divergence(const Plan& plan) override { return mistakes(plan, searched_); }
  std::vector<double> held_out(const Plan& plan) override { return mistakes(plan, held_out_); }

 private:
  std::vector<double> mistakes(const Plan& plan, const std::vector<Task>& tasks) const {
    Engine engine(model_, plan, options_);
    std::vector<double> out;
    for (const Task& task : tasks) out.push_back(is_answer(answer(engine, task), task.answer) ? 0.0 : 1.0);
    return out;
  }

  std::string answer(Engine& engine, const Task& task) const {
    const TaskTokens tokens = task_tokens(*model_, task);
    const SequenceId id = engine.cache().create();
    auto logits = engine.prefill(id, tokens.prompt);
    std::string text;
    for (int64_t t = 0; t < tokens.most; ++t) {
      const Token token = static_cast<Token>(std::max_element(logits.begin(), logits.end()) - logits.begin());
      if (model_->is_end(token)) break;
      text += model_->token_text(token);
      const EngineItem item{id, {&token, 1}};
      logits = engine.step({&item, 1});
    }
    engine.cache().remove(id);
    return text;
  }

  std::shared_ptr<const Model> model_;
  EngineOptions options_;
  std::vector<Task> searched_, held_out_;
};

}  // namespace

TaskTokens task_tokens(const Model& model, const Task& task) {
  TaskTokens tokens{model.tokenize(task.prompt, true),
                    static_cast<int64_t>(model.tokenize(task.answer, false).size()) + kSpareTokens};
  if (static_cast<int64_t>(tokens.prompt.size()) + tokens.most > model.shape().context_tokens) {
    throw Error(Status::kInvalidArgument, "a task of " + std::to_string(tokens.prompt.size()) +
                                              " tokens and its answer exceed the model's context of " +
                                              std::to_string(model.shape().context_tokens) + "; shorten it");
  }
  return tokens;
}

bool is_answer(const std::string& text, const std::string& answer) {
  const std::string said = trimmed(text), wanted = trimmed(answer);
  return said.starts_with(wanted) &&
         (said.size() == wanted.size() || std::isalnum(static_cast<unsigned char>(said[wanted.size()])) == 0);
}

std::vector<Task> read_tasks(const std::string& path) { return parse_tasks(read_file(path, kLargestFile), path); }

std::unique_ptr<PlanMeter> make_task_meter(std::shared_ptr<const Model> model, std::vector<Task> tasks, int threads,
                                           const std::string& device) {
  const auto searched = static_cast<ptrdiff_t>(tasks.size() - tasks.size() / 3);
  std::vector<Task> held_out(tasks.begin() + searched, tasks.end());
  tasks.resize(static_cast<size_t>(searched));
  if (tasks.empty() || held_out.empty())
    throw Error(Status::kInvalidArgument, "measuring plans on tasks needs at least 3 of them");
  return std::make_unique<TaskMeter>(std::move(model), std::move(tasks), std::move(held_out),
                                     EngineOptions{.device = device, .threads = thread_count(threads)});
}

}  // namespace kvmix
