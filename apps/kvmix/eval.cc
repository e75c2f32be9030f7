// kvmix eval: what a cache costs in quality, against our f16 cache.
#include "kvmix/eval.h"

#include <fmt/core.h>
#include <unistd.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <numeric>

#include "command.h"
#include "console.h"
#include "kvmix/error.h"
#include "models.h"
#include "subjects.h"
#include "text.h"

namespace kvmix::app {
namespace {

struct Arguments {
  std::string model, text, tasks;
  bool needle = false, generate = false;
  SubjectArguments subjects;
  EvalOptions options;
  NeedleOptions needles;
  GenerationOptions generation;
};

// What one of the evaluations prints of its rows; `interrupted` says that there should be more.
using Print = std::function<void(bool interrupted)>;

// Runs it and prints; of one that is stopped, the rows that are complete.
int run_and_print(const std::function<void()>& run, const std::function<bool()>& has_rows, const Print& print) {
  try {
    run();
  } catch (const Error& e) {
    if (e.status() != Status::kCancelled || !has_rows()) throw;
    print(true);
    throw;
  }
  print(false);
  return kExitOk;
}

constexpr const char* kStopped = "stopped before the end: these are the rows that are complete";

void print_lost(const std::string& name, const std::string& reason) {
  if (!reason.empty()) fmt::print(stderr, "kvmix: {} has no numbers: {}\n", name, reason);
}

nlohmann::json text_json(const EvalRow& r, double full) {
  if (!r.lost.empty()) return {{"name", r.name}, {"lost", r.lost}};
  return {{"name", r.name},
          {"perplexity", r.perplexity},
          {"perplexity_ratio", r.perplexity_ratio},
          {"kl_mean", r.kl_mean},
          {"kl_stderr", r.kl_stderr},
          {"kl_p99", r.kl_p99},
          {"kl_max", r.kl_max},
          {"top1", r.top1},
          {"bits_per_element", r.bits_per_element},
          {"body_bits", r.body_bits},
          {"kept", r.kept},
          {"cache_bytes", r.cache_bytes},
          {"compression", full / static_cast<double>(r.cache_bytes)},
          {"scored_tokens", r.scored_tokens},
          {"kl_by_position", r.kl_by_position},
          {"seconds", r.seconds}};
}

int eval_text(const Arguments& arguments, const Common& common) {
  if (arguments.text.empty()) throw UsageError("eval needs --text FILE (- for standard input), --tasks FILE, or --needle");
  const std::string text = read_text_file(arguments.text);
  const auto model = load_model(arguments.model);
  EvalOptions options = arguments.options;
  options.threads = common.threads;
  options.device = arguments.subjects.device;
  options.force_plan = arguments.subjects.force;
  const auto subjects = make_subjects(arguments.subjects, *model);
  std::vector<EvalRow> rows;
  const bool watched = isatty(STDERR_FILENO) != 0 && !common.quiet;
  options.on_window = [&](std::span<const EvalRow> so_far, size_t windows) {
    rows.assign(so_far.begin(), so_far.end());
    if (!watched) return;
    std::string line = fmt::format("after {} window{}, KL:", windows, windows == 1 ? "" : "s");
    for (const EvalRow& r : so_far.subspan(1)) line += r.lost.empty() ? fmt::format(" {} {:.5f}", r.name, r.kl_mean) : "";
    Console::clear_line();
    fmt::print(stderr, "{}\n", line);
  };
  const Print print = [&](bool interrupted) {
    const double full = static_cast<double>(rows.front().cache_bytes);
    if (common.json) {
      nlohmann::json json = nlohmann::json::array();
      for (const EvalRow& r : rows) json.push_back(text_json(r, full));
      nlohmann::json all = {
          {"model", model->shape().name}, {"fingerprint", model->shape().fingerprint}, {"context", options.context},
          {"scored", options.scored},     {"float_weights", options.float_weights},    {"rows", json}};
      if (interrupted) all["interrupted"] = true;
      print_json(all);
      return;
    }
    Table table({"cache", "kept", "bits", "body", "bytes/token", "smaller", "perplexity", "vs f16", "KL mean", "+-", "KL 99 %",
                 "KL max", "top-1"});
    for (const EvalRow& r : rows) {
      if (!r.lost.empty()) continue;
      table.add({r.name, fmt::format("{:.1f} %", 100 * r.kept), fmt::format("{:.2f}", r.bits_per_element),
                 fmt::format("{:.2f}", r.body_bits),
                 fmt::format("{:.0f}", static_cast<double>(r.cache_bytes) / static_cast<double>(options.context)),
                 fmt::format("{:.2f}x", full / static_cast<double>(r.cache_bytes)), fmt::format("{:.3f}", r.perplexity),
                 fmt::format("{:+.2f} %", 100 * (r.perplexity_ratio - 1)), fmt::format("{:.5f}", r.kl_mean),
                 fmt::format("{:.5f}", r.kl_stderr), fmt::format("{:.4f}", r.kl_p99), fmt::format("{:.3f}", r.kl_max),
                 fmt::format("{:.2f} %", 100 * r.top1)});
    }
    table.print();
    fmt::print(
        "\n{}: {} scored tokens, the {} of each window of {}; KL in nats per token against the first row; body: bits of "
        "sealed pages alone{}\n",
        model->shape().name, rows.front().scored_tokens,
        options.scored > 0 ? fmt::format("last {}", options.scored) : std::string("second half"), options.context,
        options.float_weights ? "; weights in fp32" : "");
    if (interrupted) fmt::print("stopped before the end: the rows are of the windows that were complete\n");
  };
  const int status = run_and_print([&] { rows = evaluate(model, text, subjects, options, progress_reporter(common)); },
                                   [&] { return !rows.empty(); }, print);
  for (const EvalRow& r : rows) print_lost(r.name, r.lost);
  return status;
}

int eval_needle(const Arguments& arguments, const Common& common) {
  const auto model = load_model(arguments.model);
  NeedleOptions options = arguments.needles;
  options.threads = common.threads;
  options.device = arguments.subjects.device;
  options.kernel = arguments.options.kernel;
  options.exact = arguments.options.exact;
  options.force_plan = arguments.subjects.force;
  std::vector<EvalSubject> subjects = make_subjects(arguments.subjects, *model);
  subjects.insert(subjects.begin(), EvalSubject{"f16", f16_plan(model->shape()), ""});
  std::vector<NeedleCell> cells;
  options.on_cells = [&](std::span<const NeedleCell> more) { cells.insert(cells.end(), more.begin(), more.end()); };
  const Print print = [&](bool interrupted) {
    if (common.json) {
      nlohmann::json json = nlohmann::json::array();
      for (const NeedleCell& c : cells) {
        json.push_back({{"name", c.name},
                        {"context", c.context},
                        {"kind", c.kind},
                        {"depth", c.depth},
                        {"hits", c.hits},
                        {"trials", c.trials},
                        {"nll", c.nll},
                        {"margin", c.margin},
                        {"kept", c.kept},
                        {"bits_per_element", c.bits_per_element},
                        {"answers", c.answers}});
        if (!c.lost.empty()) json.back()["lost"] = c.lost;
      }
      nlohmann::json all = {{"model", model->shape().name}, {"fingerprint", model->shape().fingerprint}, {"cells", json}};
      if (interrupted) all["interrupted"] = true;
      print_json(all);
      return;
    }
    std::vector<std::string> header = {"cache", "context", "needle", "kept", "bits"};
    for (const double depth : options.depths) header.push_back(fmt::format("at {:.0f} %", 100 * depth));
    for (const char* name : {"all", "95 % interval", "nll", "margin"}) header.emplace_back(name);
    Table table(header);
    for (size_t i = 0; i < cells.size(); i += options.depths.size()) {
      if (!cells[i].lost.empty()) continue;
      std::vector<std::string> row = {cells[i].name, std::to_string(cells[i].context), cells[i].kind,
                                      fmt::format("{:.1f} %", 100 * cells[i].kept),
                                      fmt::format("{:.2f}", cells[i].bits_per_element)};
      int hits = 0, trials = 0, tokens = 0;
      double nll = 0, margin = 0;
      for (size_t d = 0; d < options.depths.size(); ++d) {
        const NeedleCell& cell = cells[i + d];
        row.push_back(fmt::format("{}/{}", cell.hits, cell.trials));
        hits += cell.hits;
        trials += cell.trials;
        tokens += cell.answer_tokens;
        nll += cell.nll * cell.answer_tokens;
        margin += cell.margin * cell.answer_tokens;
      }
      const Interval interval = confidence(hits, trials);
      row.push_back(fmt::format("{:.0f} %", 100.0 * hits / std::max(1, trials)));
      row.push_back(fmt::format("{:.0f} to {:.0f} %", 100 * interval.low, 100 * interval.high));
      row.push_back(fmt::format("{:.3f}", nll / std::max(1, tokens)));
      row.push_back(fmt::format("{:+.2f}", margin / std::max(1, tokens)));
      table.add(row);
    }
    table.print();
    fmt::print("\n{}: nll and margin are of the right answer's tokens: nats, and logit above the best other token's\n",
               model->shape().name);
    if (interrupted) fmt::print("{}\n", kStopped);
  };
  const int status = run_and_print([&] { evaluate_needle(model, subjects, options, progress_reporter(common)); },
                                   [&] { return !cells.empty(); }, print);
  for (size_t i = 0; i < cells.size(); i += options.depths.size()) print_lost(cells[i].name, cells[i].lost);
  return status;
}

int eval_generation(const Arguments& arguments, const Common& common) {
  if (arguments.text.empty()) throw UsageError("--generate needs --text FILE, whose pieces are continued");
  const std::string text = read_text_file(arguments.text);
  const auto model = load_model(arguments.model);
  GenerationOptions options = arguments.generation;
  options.prompts = arguments.options.windows;
  options.threads = common.threads;
  options.device = arguments.subjects.device;
  options.force_plan = arguments.subjects.force;
  options.float_weights = arguments.options.float_weights;
  const auto subjects = make_subjects(arguments.subjects, *model);
  std::vector<GenerationRow> rows;
  options.on_row = [&](const GenerationRow& row) { rows.push_back(row); };
  const Print print = [&](bool interrupted) {
    if (common.json) {
      nlohmann::json json = nlohmann::json::array();
      for (const GenerationRow& r : rows) {
        json.push_back({{"name", r.name},
                        {"agreement", r.agreement},
                        {"repetition", r.repetition},
                        {"kept", r.kept},
                        {"bits_per_element", r.bits_per_element}});
        for (const GenerationPoint& point : r.course)
          json.back()["course"].push_back(
              {{"tokens", point.tokens}, {"cache_bytes", point.cache_bytes}, {"tokens_per_s", point.tokens_per_s}});
        if (!r.lost.empty()) json.back()["lost"] = r.lost;
      }
      nlohmann::json all = {{"model", model->shape().name},           {"fingerprint", model->shape().fingerprint},
                            {"prompt_tokens", options.prompt_tokens}, {"tokens", options.tokens},
                            {"float_weights", options.float_weights}, {"rows", json}};
      if (interrupted) all["interrupted"] = true;
      print_json(all);
      return;
    }
    Table table(
        {"cache", "kept", "bits", "most bytes", "tokens/s, first", "last", "agrees for", "shortest", "whole", "repeated"});
    for (const GenerationRow& r : rows) {
      if (!r.lost.empty()) continue;
      const auto n = static_cast<double>(r.agreement.size());
      double most = 0;
      for (const GenerationPoint& point : r.course) most = std::max(most, point.cache_bytes);
      table.add({r.name, fmt::format("{:.1f} %", 100 * r.kept), fmt::format("{:.2f}", r.bits_per_element), human_bytes(most),
                 fmt::format("{:.1f}", r.course.front().tokens_per_s), fmt::format("{:.1f}", r.course.back().tokens_per_s),
                 fmt::format("{:.1f}", std::accumulate(r.agreement.begin(), r.agreement.end(), 0.0) / n),
                 fmt::format("{}", *std::min_element(r.agreement.begin(), r.agreement.end())),
                 fmt::format("{}/{}", std::count(r.agreement.begin(), r.agreement.end(), options.tokens), r.agreement.size()),
                 fmt::format("{:.1f} %", 100 * std::accumulate(r.repetition.begin(), r.repetition.end(), 0.0) / n)});
    }
    table.print();
    fmt::print(
        "\n{} prompts of {} tokens, {} greedy tokens each; agrees for: tokens up to the first that differs from the first "
        "row's, mean; repeated: runs of {} tokens that occurred before\n",
        rows.front().agreement.size(), options.prompt_tokens, options.tokens, kRepeatedNgram);
    if (interrupted) fmt::print("{}\n", kStopped);
  };
  const int status = run_and_print([&] { evaluate_generation(model, text, subjects, options, progress_reporter(common)); },
                                   [&] { return !rows.empty(); }, print);
  for (const GenerationRow& r : rows) print_lost(r.name, r.lost);
  return status;
}

// Of tasks of one kind, or of all.
struct TaskScore {
  int hits = 0, tasks = 0;
  // Against the first row, task by task.
  int lost = 0, found = 0;

  double accuracy() const { return static_cast<double>(hits) / std::max(1, tasks); }
  nlohmann::json json() const {
    const Interval interval = confidence(hits, tasks);
    return {{"solved", hits},           {"tasks", tasks},
            {"accuracy", accuracy()},   {"interval", {interval.low, interval.high}},
            {"lost_against_f16", lost}, {"found_against_f16", found}};
  }
};

int eval_tasks(const Arguments& arguments, const Common& common) {
  const std::vector<Task> tasks = read_tasks(arguments.tasks);
  const auto model = load_model(arguments.model);
  TaskOptions options;
  options.threads = common.threads;
  options.device = arguments.subjects.device;
  options.kernel = arguments.options.kernel;
  options.exact = arguments.options.exact;
  options.force_plan = arguments.subjects.force;
  std::vector<std::string> kinds;
  for (const Task& task : tasks) {
    if (std::ranges::find(kinds, task.kind) == kinds.end()) kinds.push_back(task.kind);
  }
  const auto subjects = make_subjects(arguments.subjects, *model);
  std::vector<TaskRow> rows;
  options.on_row = [&](const TaskRow& row) { rows.push_back(row); };
  const auto score = [&](const TaskRow& row, const std::string* kind) {
    TaskScore s;
    for (size_t i = 0; i < row.solved.size(); ++i) {
      if (kind != nullptr && tasks[i].kind != *kind) continue;
      const bool mine = row.solved[i], first = rows.front().solved[i];
      ++s.tasks;
      s.hits += mine ? 1 : 0;
      s.lost += first && !mine ? 1 : 0;
      s.found += mine && !first ? 1 : 0;
    }
    return s;
  };
  const bool told_apart = kinds.size() > 1 || !kinds[0].empty();
  const Print print = [&](bool interrupted) {
    if (common.json) {
      nlohmann::json json = nlohmann::json::array();
      for (const TaskRow& r : rows) {
        if (!r.lost.empty()) {
          json.push_back({{"name", r.name}, {"lost", r.lost}});
          continue;
        }
        nlohmann::json row = score(r, nullptr).json();
        row.update({{"name", r.name},
                    {"kept", r.kept},
                    {"bits_per_element", r.bits_per_element},
                    {"seconds", r.seconds},
                    {"answered_rightly", r.solved},
                    {"answers", r.answers}});
        if (told_apart) {
          for (const std::string& kind : kinds) row["kinds"][kind] = score(r, &kind).json();
        }
        json.push_back(std::move(row));
      }
      nlohmann::json all = {{"model", model->shape().name}, {"fingerprint", model->shape().fingerprint}, {"rows", json}};
      if (interrupted) all["interrupted"] = true;
      print_json(all);
      return;
    }
    std::vector<std::string> header = {"cache", "kept", "bits"};
    if (!told_apart) kinds.clear();
    for (const std::string& kind : kinds) header.push_back(kind.empty() ? "no kind" : kind);
    for (const char* name : {"all", "accuracy", "95 % interval", "lost", "found", "seconds"}) header.emplace_back(name);
    Table table(header);
    for (const TaskRow& r : rows) {
      if (!r.lost.empty()) continue;
      std::vector<std::string> line = {r.name, fmt::format("{:.1f} %", 100 * r.kept),
                                       fmt::format("{:.2f}", r.bits_per_element)};
      for (const std::string& kind : kinds) {
        const TaskScore s = score(r, &kind);
        line.push_back(fmt::format("{}/{}", s.hits, s.tasks));
      }
      const TaskScore s = score(r, nullptr);
      const Interval interval = confidence(s.hits, s.tasks);
      line.push_back(fmt::format("{}/{}", s.hits, s.tasks));
      line.push_back(fmt::format("{:.1f} %", 100 * s.accuracy()));
      line.push_back(fmt::format("{:.0f} to {:.0f} %", 100 * interval.low, 100 * interval.high));
      line.push_back(std::to_string(s.lost));
      line.push_back(std::to_string(s.found));
      line.push_back(fmt::format("{:.0f}", r.seconds));
      table.add(line);
    }
    table.print();
    fmt::print(
        "\n{}: bits where prompts end, all bytes; lost, found: tasks that the first row solves and this one does not, and "
        "the other way round\n",
        model->shape().name);
    if (interrupted) fmt::print("{}\n", kStopped);
  };
  const int status = run_and_print([&] { evaluate_tasks(model, tasks, subjects, options, progress_reporter(common)); },
                                   [&] { return !rows.empty(); }, print);
  for (const TaskRow& r : rows) print_lost(r.name, r.lost);
  return status;
}

}  // namespace

void add_eval(CommandContext& context) {
  auto arguments = std::make_shared<Arguments>();
  CLI::App* command =
      add_command(context, "eval",
                  "Perplexity, KL divergence and top-1 agreement against the f16 cache; retrieval; tasks; greedy continuations",
                  "kvmix eval smollm2 --text book.txt --plan plan.json --uniform 4/4 --peer");
  command->add_option("model", arguments->model, kModelHelp)->required();
  command->add_option("--text", arguments->text, "UTF-8 text to score, - for standard input");
  add_subject_options(command, arguments->subjects);
  EvalOptions& options = arguments->options;
  command->add_option("--context", options.context, "Tokens of a window")
      ->check(CLI::Range(int64_t{8}, int64_t{1} << 20))
      ->capture_default_str();
  command
      ->add_option("--scored", options.scored,
                   "Last tokens of a window that are scored; 0 is its second half. What stands before is the prompt")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 20))
      ->capture_default_str();
  command->add_option("--windows", options.windows, "Windows; 0 takes all that the text has")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  command->add_option("--kernel", options.kernel, "Attention kernel by name");
  command->add_flag("--exact", options.exact, "Attention arithmetic without int8 products");
  command->add_flag("--float-weights", options.float_weights,
                    "Run everything, peers too, on a temporary fp32 copy of the weights: rows are then free of the noise that "
                    "8-bit activations add to any change");
  command->add_flag("--needle", arguments->needle, "Retrieval of what is hidden in a haystack instead of text");
  command->add_option("--tasks", arguments->tasks,
                      "Accuracy of greedy answers to this .jsonl of {\"prompt\": ..., \"answer\": ...} instead of text, and by "
                      "\"kind\" where lines have one (bench/tasks.py writes such files)");
  auto* generate = command->add_flag("--generate", arguments->generate,
                                     "Greedy continuations of pieces of the text, --windows of them, against the f16 cache's");
  GenerationOptions& generation = arguments->generation;
  command->add_option("--prompt-tokens", generation.prompt_tokens, "--generate: tokens of a piece")
      ->check(CLI::Range(8, 1 << 20))
      ->capture_default_str()
      ->needs(generate);
  command->add_option("--tokens", generation.tokens, "--generate: tokens of a continuation")
      ->check(CLI::Range(kRepeatedNgram, 1 << 20))
      ->capture_default_str()
      ->needs(generate);
  NeedleOptions& needles = arguments->needles;
  command->add_option("--contexts", needles.contexts, "--needle: tokens of the haystacks")
      ->delimiter(',')
      ->check(CLI::Range(int64_t{256}, int64_t{1} << 20))
      ->capture_default_str();
  command
      ->add_option("--kinds", needles.kinds,
                   "--needle: what is hidden: key (a number, alone in its haystack); keys, quote, word (numbers of things that "
                   "differ in a word; a sentence; a rare word: one at each depth of one haystack)")
      ->delimiter(',')
      ->check(CLI::IsMember(needle_kinds()))
      ->capture_default_str();
  command->add_option("--depths", needles.depths, "--needle: where it stands, 0 to 1")
      ->delimiter(',')
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  command->add_option("--trials", needles.trials, "--needle: haystacks of each kind")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  command->add_option("--seed", needles.seed, "--needle: seed of needles and distractors")->capture_default_str();
  command->callback([&context, arguments] {
    context.action = [arguments](const Common& common) {
      if (!arguments->tasks.empty()) {
        if (arguments->generate || arguments->needle || !arguments->text.empty())
          throw UsageError("--tasks is an evaluation of its own: leave --text, --generate and --needle out");
        return eval_tasks(*arguments, common);
      }
      if (arguments->generate) return eval_generation(*arguments, common);
      return arguments->needle ? eval_needle(*arguments, common) : eval_text(*arguments, common);
    };
  });
}

}  // namespace kvmix::app
