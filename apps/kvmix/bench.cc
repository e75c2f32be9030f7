// kvmix bench: prefill and decode speed at depth, and memory.
#include <fmt/core.h>

#include <memory>
#include <set>

#include "command.h"
#include "console.h"
#include "kvmix/error.h"
#include "kvmix/eval.h"
#include "models.h"
#include "subjects.h"
#include "text.h"

namespace kvmix::app {
namespace {

struct Arguments {
  std::string model;
  SubjectArguments subjects;
  BenchOptions options;
  std::string memory;
};

nlohmann::json row_json(const BenchRow& r) {
  if (!r.lost.empty()) return {{"name", r.name}, {"depth", r.depth}, {"lost", r.lost}};
  return {{"name", r.name},
          {"depth", r.depth},
          {"decode_tokens_per_s", r.decode_tokens_per_s},
          {"decode_min", r.decode_min},
          {"decode_max", r.decode_max},
          {"prefill_tokens_per_s", r.prefill_tokens_per_s},
          {"cache_bytes", r.cache_bytes},
          {"sequences", r.sequences},
          {"peak_bytes", r.peak_bytes},
          {"host_seconds", r.host_seconds},
          {"kernel", r.kernel}};
}

int bench_command(const Arguments& arguments, const Common& common) {
  const auto model = load_model(arguments.model);
  BenchOptions options = arguments.options;
  options.threads = common.threads;
  options.device = arguments.subjects.device;
  if (!arguments.memory.empty()) options.memory = parse_bytes(arguments.memory);
  options.force_plan = arguments.subjects.force;
  std::vector<EvalSubject> subjects = make_subjects(arguments.subjects, *model);
  subjects.insert(subjects.begin(), EvalSubject{"f16", f16_plan(model->shape()), ""});
  std::vector<BenchRow> rows;
  options.on_row = [&](const BenchRow& row) { rows.push_back(row); };
  const auto print = [&](bool interrupted) {
    if (common.json) {
      nlohmann::json json = nlohmann::json::array();
      for (const BenchRow& r : rows) json.push_back(row_json(r));
      nlohmann::json all = {{"model", model->shape().name},
                            {"fingerprint", model->shape().fingerprint},
                            {"device", options.device},
                            {"rows", json}};
      if (interrupted) all["interrupted"] = true;
      print_json(all);
      return;
    }
    const bool on_device = options.device != "cpu";
    std::vector<std::string> header = {"cache", "depth",      "sequences", "decode tokens/s", "min", "max", "prefill tokens/s",
                                       "cache", "memory peak"};
    if (on_device) header.emplace_back("host ms");
    header.emplace_back("kernel");
    Table table(header);
    table.left(header.size() - 1);
    for (const BenchRow& r : rows) {
      if (!r.lost.empty()) continue;
      std::vector<std::string> cells = {r.name,
                                        std::to_string(r.depth),
                                        std::to_string(r.sequences),
                                        fmt::format("{:.1f}", r.decode_tokens_per_s),
                                        fmt::format("{:.1f}", r.decode_min),
                                        fmt::format("{:.1f}", r.decode_max),
                                        r.prefill_tokens_per_s > 0 ? fmt::format("{:.0f}", r.prefill_tokens_per_s) : "-",
                                        human_bytes(static_cast<double>(r.cache_bytes)),
                                        human_bytes(static_cast<double>(r.peak_bytes))};
      if (on_device) cells.push_back(r.host_seconds > 0 ? fmt::format("{:.2f}", 1e3 * r.host_seconds) : "-");
      cells.push_back(r.kernel);
      table.add(cells);
    }
    table.print();
    fmt::print(
        "\n{}: tokens/s of all sequences together, median of {}{} repetitions; prefill of one sequence; memory peak is {}\n",
        model->shape().name, options.repetitions, on_device ? "" : " interleaved",
        on_device ? "what the device had in use, weights and all; host ms of a decode step"
                  : "the anonymous memory that the row added");
    if (interrupted) fmt::print("stopped before the end: these are the depths that are complete\n");
  };
  try {
    bench(model, subjects, options, progress_reporter(common));
  } catch (const Error& e) {
    if (e.status() == Status::kCancelled && !rows.empty()) print(true);
    throw;
  }
  print(false);
  std::set<std::string> said;
  for (const BenchRow& r : rows) {
    if (!r.lost.empty() && said.insert(r.name).second) fmt::print(stderr, "kvmix: {} has no numbers: {}\n", r.name, r.lost);
  }
  return kExitOk;
}

}  // namespace

void add_bench(CommandContext& context) {
  auto arguments = std::make_shared<Arguments>();
  CLI::App* command = add_command(context, "bench", "Prefill and decode tokens/s at depth, peak memory",
                                  "kvmix bench smollm2 --plan plan.json --depths 0,4096 --peer");
  command->add_option("model", arguments->model, kModelHelp)->required();
  add_subject_options(command, arguments->subjects);
  BenchOptions& options = arguments->options;
  command->add_option("--depths", options.depths, "Tokens in the cache before decoding")
      ->delimiter(',')
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 24))
      ->capture_default_str();
  command->add_option("--tokens", options.decode_tokens, "Decoded per repetition and depth")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command->add_option("--repetitions", options.repetitions, "Repetitions, interleaved over the rows")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  auto* sequences = command->add_option("--sequences", options.sequences, "Sequences decoded together")
                        ->check(CLI::Range(1, 4096))
                        ->capture_default_str();
  command
      ->add_option("--memory", arguments->memory,
                   "--device cuda: as many sequences as fit so many bytes of its memory, e.g. 75GiB, all included")
      ->excludes(sequences);
  command->add_option("--kernel", options.kernel, "Attention kernel by name");
  command->callback([&context, arguments] {
    context.action = [arguments](const Common& common) { return bench_command(*arguments, common); };
  });
}

}  // namespace kvmix::app
