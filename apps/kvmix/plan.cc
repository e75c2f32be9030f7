// kvmix plan: chooses a codec for every layer and side.
#include "kvmix/plan.h"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <optional>

#include "command.h"
#include "console.h"
#include "kvmix/error.h"
#include "kvmix/measure.h"
#include "models.h"
#include "plan_axes.h"
#include "plan_curve.h"
#include "plan_view.h"
#include "text.h"

namespace kvmix::app {
namespace {

const PlannerInfo& find_planner(const std::string& name) {
  std::string known;
  for (const PlannerInfo& info : planners()) {
    if (info.name == name) return info;
    known += (known.empty() ? "" : ", ") + info.name;
  }
  throw UsageError("no planner '" + name + "'; there are " + known);
}

Budget budget_of(const PlanArguments& arguments, const PlannerInfo& planner) {
  Budget budget;
  budget.context = arguments.context;
  budget.sequences = arguments.sequences;
  budget.bits = arguments.bits;
  // "free" is known once the model is.
  if (!arguments.fit.empty()) budget.bytes = arguments.fit == "free" ? 1 : parse_bytes(arguments.fit), budget.slack = true;
  if (arguments.sequences > 1 && budget.bytes == 0)
    throw UsageError("--sequences divides the bytes of --fit: give --fit, e.g. --fit 2GiB");
  if (planner.needs_budget && !arguments.pareto && budget.bits == 0 && budget.bytes == 0) {
    throw UsageError("planner " + planner.name + " needs a budget: --bits 3 or --fit 64MiB, both at --context tokens");
  }
  return budget;
}

// What the device has left once the model's weights are there, less what a step takes.
size_t free_bytes(const Model& model) {
  constexpr size_t kStep = size_t{1} << 30;
  const size_t taken = model.weight_bytes() + kStep;
  const DeviceSpace space = cuda_space();
  if (space.free_bytes <= taken) {
    throw Error(Status::kOutOfMemory,
                fmt::format("the GPU has {} free, the model's weights and a step take {}: take a smaller model",
                            human_bytes(static_cast<double>(space.free_bytes)), human_bytes(static_cast<double>(taken))));
  }
  return space.free_bytes - taken;
}

constexpr int kWindowTokens = 2048;  // of the text that plans are measured on
constexpr int kUsualWindows = 2;

// Text that plans are measured on, and further text that they are checked on: the last third.
struct MeasuredText {
  std::vector<std::vector<Token>> searched, held_out;
};
MeasuredText measured_text(const PlanArguments& arguments, int threads, const std::shared_ptr<const Model>& model,
                           uint64_t seed, const Progress& progress) {
  CalibrationOptions options;
  options.file = arguments.calibration;
  const int searching = arguments.windows > 0 ? arguments.windows : kUsualWindows;
  options.prompts = searching + (searching + 1) / 2;
  options.tokens = static_cast<int>(std::min<int64_t>(kWindowTokens, model->shape().context_tokens));
  options.seed = seed;
  auto windows = calibration_prompts(model, options, threads, progress);
  const auto searched = static_cast<ptrdiff_t>(windows.size() * 2 / 3);
  MeasuredText text;
  text.held_out.assign(windows.begin() + searched, windows.end());
  windows.resize(static_cast<size_t>(searched));
  text.searched = std::move(windows);
  return text;
}

// Text of its own, by default from another seed than the profile's: a plan should not be fitted twice to the same words. The
// last third is held out. Made when it is first needed, so that what is wrong with a request shows before minutes are spent.
class TextMeter final : public PlanMeter {
 public:
  TextMeter(const PlanArguments& arguments, int threads, std::shared_ptr<const Model> model, uint64_t seed, Progress progress)
      : arguments_(arguments), threads_(threads), model_(std::move(model)), seed_(seed), progress_(std::move(progress)) {}
  std::vector<double> divergence(const Plan& plan) override { return meter().divergence(plan); }
  std::vector<double> held_out(const Plan& plan) override { return meter().held_out(plan); }

 private:
  PlanMeter& meter() {
    if (meter_ == nullptr) {
      MeasuredText text = measured_text(arguments_, threads_, model_, seed_, progress_);
      meter_ = make_plan_meter(model_, std::move(text.searched), std::move(text.held_out), threads_);
    }
    return *meter_;
  }

  const PlanArguments& arguments_;
  int threads_;
  std::shared_ptr<const Model> model_;
  uint64_t seed_;
  Progress progress_;
  std::unique_ptr<PlanMeter> meter_;
};

AxesTask axes_task(const PlanArguments& arguments, const Common& common, const PlannerRequest& request,
                   const std::shared_ptr<const Model>& model) {
  AxesTask task{
      .planner = arguments.planner, .request = request, .axes = parse_axes(arguments.axes), .searched = {}, .held_out = {}};
  const uint64_t usual = request.profile != nullptr ? request.profile->seed + 1 : 1;
  MeasuredText text =
      measured_text(arguments, common.threads, model, arguments.seed >= 0 ? static_cast<uint64_t>(arguments.seed) : usual,
                    progress_reporter(common));
  task.searched = std::move(text.searched);
  task.held_out = std::move(text.held_out);
  task.threads = common.threads;
  task.needles = arguments.needles;
  return task;
}

// The plan of a budget over the axes; prints what the alternatives gave.
Plan plan_axes(const PlanArguments& arguments, const Common& common, const PlannerRequest& request,
               const std::shared_ptr<const Model>& model, nlohmann::json& json) {
  const AxesChoice choice = choose_axes(model, axes_task(arguments, common, request, model), progress_reporter(common));
  const AxesCandidate& best = choice.candidates[choice.chosen];
  const Axes axes = parse_axes(arguments.axes);
  std::vector<std::string> header;
  if (axes.tokens) header.emplace_back("tokens");
  if (axes.channels) header.emplace_back("channels");
  if (axes.ranks) header.insert(header.end(), {"ranks", "K kept", "V kept"});
  header.insert(header.end(), {"K bits", "V bits", "of a sequence", "windows", "mean KL", "+-", "top-1"});
  if (arguments.needles > 0) header.emplace_back("passkeys");
  Table table(std::move(header));
  json["axes"] = nlohmann::json::array();
  for (const AxesCandidate& c : choice.candidates) {
    nlohmann::json row{{"chosen", &c == &best}};
    std::vector<std::string> cells;
    if (axes.tokens) cells.push_back(c.tokens), row["tokens"] = c.tokens;
    if (axes.channels) cells.push_back(c.channels), row["channels"] = c.channels;
    if (axes.ranks) {
      const auto kept = [&](Side side) { return c.lost.empty() ? kept_latents(c.plan, *request.model, side) : NAN; };
      for (const auto& [name, side] : {std::pair{"keys_kept", Side::kKey}, {"values_kept", Side::kValue}})
        row[name] = kept(side);
      row["ranks"] = c.ranks;
      cells.insert(cells.end(), {c.ranks, fmt::format("{:.1f} %", 100 * kept(Side::kKey)),
                                 fmt::format("{:.1f} %", 100 * kept(Side::kValue))});
    }
    if (&c == &best) cells.front() += " *";
    if (!c.lost.empty()) {
      row["lost"] = c.lost;
      cells.insert(cells.end(), {"-", "-", "does not fit"});
      table.add(std::move(cells));
    } else {
      cells.insert(cells.end(),
                   {fmt::format("{:.2f}", mean_bits(c.plan, Side::kKey)),
                    fmt::format("{:.2f}", mean_bits(c.plan, Side::kValue)), human_bytes(c.bytes), std::to_string(c.windows),
                    fmt::format("{:.5f}", c.kl), fmt::format("{:.5f}", c.kl_error), fmt::format("{:.2f} %", 100 * c.top1)});
      if (arguments.needles > 0) cells.push_back(std::isnan(c.found) ? "-" : fmt::format("{:.0f} %", 100 * c.found));
      table.add(std::move(cells));
      row.update({{"bytes", c.bytes}, {"kl_mean", c.kl}, {"kl_stderr", c.kl_error}, {"top1", c.top1}, {"windows", c.windows}});
      if (!std::isnan(c.found)) row["passkeys"] = c.found;
    }
    json["axes"].push_back(std::move(row));
  }
  json["held_out"] = {{"kl_mean", choice.held_out}};
  if (!std::isnan(choice.held_out_bits)) json["held_out"]["bits_alone"] = choice.held_out_bits;
  json["why"] = choice.why;
  if (axes.ranks) json["quarter_left_out"] = {{"keys", choice.key_probe}, {"values", choice.value_probe}};
  if (!common.json) {
    table.print();
    if (axes.ranks) {
      fmt::print("\nwithout a quarter of all latents, in fp16: of keys KL {:.5f}, of values {:.5f}\n", choice.key_probe,
                 choice.value_probe);
    }
    fmt::print("\n* chosen: {}. Held-out text: KL {:.5f}", choice.why, choice.held_out);
    if (!std::isnan(choice.held_out_bits)) fmt::print(", bits alone {:.5f}", choice.held_out_bits);
    fmt::print("\n\n");
  }
  return best.plan;
}

int plan(const PlanArguments& arguments, const Common& common) {
  const PlannerInfo& planner = find_planner(arguments.planner);
  PlannerRequest request;
  request.budget = budget_of(arguments, planner);
  request.options = arguments.options;
  request.device = arguments.device;
  if (arguments.fit == "free" && arguments.device != "cuda")
    throw UsageError("--fit free asks a GPU for its memory: give --device cuda too, or a number of bytes");
  std::unique_ptr<Profile> profile;
  if (!arguments.profile.empty()) profile = std::make_unique<Profile>(read_profile(arguments.profile));
  if (planner.needs_profile && !profile) {
    throw UsageError("planner " + planner.name + " needs --profile FILE; make one with: kvmix profile " + arguments.model);
  }
  if (arguments.measurements > 0 && !planner.measures)
    throw UsageError("planner " + planner.name + " does not measure plans: leave --measure out");
  if (arguments.pareto && !planner.needs_budget)
    throw UsageError("planner " + planner.name + " takes no budget, so it has no curve: leave --pareto out");
  const Axes axes = parse_axes(arguments.axes);
  const bool both = axes.any();
  if (both && !planner.needs_budget)
    throw UsageError("planner " + planner.name + " takes no budget to share between axes: leave --axes out");
  if (both && arguments.measurements > 0)
    throw UsageError("--axes " + arguments.axes +
                     " measures by itself: leave --measure out, or refine the plan's bits afterwards");
  std::optional<PolicySpec> tokens;
  if (!arguments.tokens.empty()) tokens = parse_policy(arguments.tokens);
  if (tokens && (both || arguments.pareto || arguments.measurements > 0 || !arguments.factors.empty()))
    throw UsageError("--tokens says which tokens stay: leave --axes, --pareto, --measure and --factors out");
  if (!both && arguments.needles > 0) throw UsageError("--needles decide between axes: give e.g. --axes tokens,bits");
  if (arguments.pareto && (axes.channels || axes.ranks))
    throw UsageError("--pareto draws curves of bits or of tokens,bits: leave channels and rank out of --axes");
  if (axes.ranks && arguments.factors.empty())
    throw UsageError("--axes " + arguments.axes + " needs --factors FILE; make one with: kvmix factorise " + arguments.model +
                     " --keep 1");
  if (axes.ranks && (!planner.ranks || arguments.device != "cpu"))
    throw UsageError("ranks share a budget with bits by planner kvmix, on the device cpu: leave rank out of --axes");
  const bool text_given = !arguments.calibration.empty() || arguments.seed >= 0 || arguments.windows > 0;
  if (!both && arguments.measurements == 0 && text_given)
    throw UsageError("text is for measuring: give --measure, or --axes of more than bits");
  if (!arguments.calibration.empty()) read_text_file(arguments.calibration);  // refuses what is no text
  if (!arguments.factors.empty() && !axes.ranks &&
      (planner.needs_budget || both || arguments.pareto || arguments.measurements > 0 || arguments.device != "cpu"))
    throw UsageError(
        "--factors goes with a planner that takes no budget, such as uniform, on the device cpu: its bytes follow from ranks "
        "and bits; or with --axes bits,rank");
  const auto model = load_model(arguments.model);
  request.model = &model->shape();
  request.profile = profile.get();
  if (arguments.fit == "free") request.budget.bytes = free_bytes(*model);
  if (profile) check_profile(*profile, model->shape(), false, arguments.profile);
  if (arguments.pareto)
    return both ? plan_axes_curve(arguments, common, request, model, axes_task(arguments, common, request, model))
                : plan_curve(arguments, common, request);
  std::vector<Task> tasks;
  if (!arguments.tasks.empty()) tasks = read_tasks(arguments.tasks);
  std::unique_ptr<PlanMeter> meter;
  if (arguments.measurements > 0) {
    request.progress = progress_reporter(common);
    const uint64_t seed = arguments.seed >= 0 ? static_cast<uint64_t>(arguments.seed) : profile->seed + 1;
    if (tasks.empty()) {
      meter = std::make_unique<TextMeter>(arguments, common.threads, model, seed, request.progress);
    } else {
      meter = make_task_meter(model, std::move(tasks), common.threads, arguments.device);
    }
    request.meter = meter.get();
    request.measurements = arguments.measurements;
  }
  nlohmann::json json;
  std::optional<FactorsInfo> factors;
  if (!arguments.factors.empty()) {
    factors = inspect_factors(arguments.factors);
    check_factors(*factors, model->shape());
  }
  if (axes.ranks) {
    if (kept_share(*factors) < 1)
      throw Error(Status::kInvalidArgument,
                  fmt::format("{} holds {:.0f} % of all latents, and --axes chooses among all: make it "
                              "with kvmix factorise --keep 1",
                              arguments.factors, 100 * kept_share(*factors)));
    request.factors = &*factors;
  }
  Plan made = both     ? plan_axes(arguments, common, request, model, json)
              : tokens ? plan_with_tokens(arguments.planner, request, *tokens)
                       : make_plan(arguments.planner, request);
  if (factors && !axes.ranks) made = with_factors(std::move(made), *factors);
  const std::string file = arguments.out.empty() ? "plan.json" : arguments.out;
  write_plan(made, file);
  const CacheConfig config = cache_config(made, model->shape());
  const size_t bytes = predict_bytes(config, arguments.context);
  const size_t slack = predict_slack_bytes(config, arguments.context, arguments.sequences);
  const double bits = predict_bits_per_element(config, arguments.context);
  if (common.json) {
    json.update({{"plan", file},
                 {"planner", made.planner},
                 {"note", made.note},
                 {"context", arguments.context},
                 {"bytes", bytes},
                 {"most_slack_bytes", slack},
                 {"bits_per_element", bits},
                 {"mean_key_bits", mean_bits(made, Side::kKey)},
                 {"mean_value_bits", mean_bits(made, Side::kValue)}});
    if (profile && profile->window_tokens > 0) json["profile_window_tokens"] = profile->window_tokens;
    if (made.predicted) json["predicted"] = {{"metric", made.predicted->metric}, {"cost", made.predicted->cost}};
    print_json(json);
    return kExitOk;
  }
  print_plan_table(made, profile.get());
  fmt::print("\ncode bits: keys {:.3f}, values {:.3f}; {} sinks; window {}\n{}\n\n", mean_bits(made, Side::kKey),
             mean_bits(made, Side::kValue), made.sinks,
             made.window.ratio_key > 0 ? "by ratio" : std::to_string(made.window.tokens), made.note);
  print_plan_costs(made, model->shape());
  fmt::print("\nwrote {}: {} and {:.2f} bits per element at {} tokens, all bytes; the allocator rounds up by {} at most\n",
             file, human_bytes(static_cast<double>(bytes)), bits, arguments.context, human_bytes(static_cast<double>(slack)));
  if (arguments.sequences > 1) {
    fmt::print("{} sequences: {} of {}\n", arguments.sequences, human_bytes(static_cast<double>(bytes) * arguments.sequences),
               human_bytes(static_cast<double>(request.budget.bytes)));
  }
  const int64_t longest = std::min(arguments.context, model->shape().context_tokens);
  if (profile && profile->window_tokens > 0 && profile->window_tokens < longest) {
    fmt::print(
        "\n{} was measured on {} tokens at a time, which do not show what errors cost further back:\n"
        "for sequences of {} measure as many, with kvmix profile {} --tokens {}\n",
        arguments.profile, profile->window_tokens, longest, arguments.model, longest);
  }
  return kExitOk;
}

}  // namespace

void add_plan(CommandContext& context) {
  auto arguments = std::make_shared<PlanArguments>();
  CLI::App* command = add_command(context, "plan", "Choose a codec for every layer, keys and values apart, under a budget",
                                  "kvmix plan smollm2 --profile profile.json --bits 3 --context 8192 -o plan.json");
  command->add_option("model", arguments->model, kModelHelp)->required();
  std::string names;
  for (const PlannerInfo& info : planners()) names += "\n  " + info.name + ": " + info.description;
  command->add_option("--planner", arguments->planner, "One of:" + names)->capture_default_str();
  command->add_option("--profile", arguments->profile, "What kvmix profile wrote");
  auto* bits =
      command->add_option("--bits", arguments->bits, "Budget: average bits per element, all bytes, at --context tokens")
          ->check(CLI::Range(0.1, 16.5));
  add_device_option(command, arguments->device);
  auto* fit = command
                  ->add_option("--fit", arguments->fit,
                               "Budget: bytes, e.g. 64MiB, for --sequences of --context tokens; with --device cuda also free: "
                               "what its memory has left beside the model")
                  ->excludes(bits);
  command->add_option("--context", arguments->context, "Tokens per sequence that the budget is for")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 24))
      ->capture_default_str();
  command->add_option("--sequences", arguments->sequences, "Sequences that --fit holds together")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  auto* pareto =
      command
          ->add_flag("--pareto", arguments->pareto,
                     "The whole curve instead of one budget: a folder of plans from the smallest size to the largest, "
                     "and pareto.svg")
          ->excludes(bits)
          ->excludes(fit);
  command->add_option("--points", arguments->points, "--pareto: plans, at sizes in equal ratios")
      ->check(CLI::Range(2, 1000))
      ->capture_default_str()
      ->needs(pareto);
  auto* measure = command
                      ->add_option("--measure", arguments->measurements,
                                   "Measure up to so many whole plans on calibration text: kvmix then swaps bits between sides "
                                   "while that helps, kvtuner searches by it")
                      ->check(CLI::Range(2, 1 << 20))
                      ->excludes(pareto);
  command
      ->add_option(
          "--tasks", arguments->tasks,
          "--measure, planner kvtuner: accuracy of greedy answers to this .jsonl of {\"prompt\": ..., \"answer\": ...} "
          "instead of divergence, run on --device; the last third is held out")
      ->needs(measure);
  command
      ->add_option("--axes", arguments->axes,
                   "What the budget is spent on: bits alone, or bits with any of tokens (fewer: snapkv, adakv), channels (of "
                   "keys: think) and rank (latents, with --factors), where text measured with a running cache says so; with "
                   "--pareto bits and tokens in one picture")
      ->capture_default_str();
  command->add_option(
      "--tokens", arguments->tokens,
      "Tokens that stay: a policy of kvmix list with parameters, such as \"snapkv keep=0.25\"; the budget's bytes "
      "then go to the bits of these");
  command
      ->add_option("--needles", arguments->needles,
                   "--axes: passkeys per depth that a plan must find about as often as bits alone (0: text decides)")
      ->check(CLI::Range(0, 1000))
      ->capture_default_str();
  command->add_option("--calib", arguments->calibration,
                      "--measure, --axes: text as for kvmix profile; the last third is held out");
  command->add_option("--windows", arguments->windows, "--measure, --axes: windows of up to 2048 tokens to search with (2)")
      ->check(CLI::Range(1, 64));
  command
      ->add_option("--seed", arguments->seed,
                   "--measure, --axes: seed of the text that the model writes (the profile's plus 1)")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 62));
  command->add_option(
      "--factors", arguments->factors,
      "Latents in place of keys and values, by what kvmix factorise wrote, in the planner's codecs; --axes: the "
      "ranks to choose from, of a file of all latents (--keep 1)");
  command->add_option("-o,--out", arguments->out, "The plan file to write (plan.json); with --pareto the folder (plans)");
  // Every planner's own options, so that a new planner's appear here by themselves.
  std::map<std::string, std::string> helps;
  for (const PlannerInfo& info : planners()) {
    for (const auto& [name, help] : info.options) {
      std::string& text = helps[name];
      text += (text.empty() ? "" : "; ") + info.name + ": " + help;
    }
  }
  for (const auto& [name, help] : helps) {
    command
        ->add_option_function<std::string>(
            "--" + name, [arguments, key = name](const std::string& v) { arguments->options[key] = v; }, help)
        ->group("Options of planners");
  }
  command->callback(
      [&context, arguments] { context.action = [arguments](const Common& common) { return plan(*arguments, common); }; });
}

}  // namespace kvmix::app
