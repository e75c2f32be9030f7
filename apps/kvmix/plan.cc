// kvmix plan: chooses a codec for every layer and side.
#include "kvmix/plan.h"

#include <fmt/core.h>

#include <map>
#include <memory>

#include "command.h"
#include "console.h"
#include "kvmix/error.h"
#include "models.h"
#include "plan_view.h"
#include "text.h"

namespace kvmix::app {
namespace {

struct Arguments {
  std::string model, planner = "kvmix", profile, out = "plan.json", fit;
  double bits = 0;
  int64_t context = 8192;
  int sequences = 1;
  std::map<std::string, std::string> options;  // of planners; only those given
};

const PlannerInfo& find_planner(const std::string& name) {
  std::string known;
  for (const PlannerInfo& info : planners()) {
    if (info.name == name) return info;
    known += (known.empty() ? "" : ", ") + info.name;
  }
  throw UsageError("no planner '" + name + "'; there are " + known);
}

Budget budget_of(const Arguments& arguments, const PlannerInfo& planner) {
  Budget budget;
  budget.context = arguments.context;
  budget.sequences = arguments.sequences;
  budget.bits = arguments.bits;
  if (!arguments.fit.empty()) budget.bytes = parse_bytes(arguments.fit);
  if (planner.needs_budget && budget.bits == 0 && budget.bytes == 0) {
    throw UsageError("planner " + planner.name + " needs a budget: --bits 3 or --fit 64MiB, both at --context tokens");
  }
  return budget;
}

int plan(const Arguments& arguments, const Common& common) {
  const PlannerInfo& planner = find_planner(arguments.planner);
  PlannerRequest request;
  request.budget = budget_of(arguments, planner);
  request.options = arguments.options;
  std::unique_ptr<Profile> profile;
  if (!arguments.profile.empty()) profile = std::make_unique<Profile>(read_profile(arguments.profile));
  if (planner.needs_profile && !profile) {
    throw UsageError("planner " + planner.name + " needs --profile FILE; make one with: kvmix profile " + arguments.model);
  }
  const auto model = load_model(arguments.model);
  request.model = &model->shape();
  request.profile = profile.get();
  const Plan made = make_plan(arguments.planner, request);
  write_plan(made, arguments.out);
  const CacheConfig config = cache_config(made, model->shape());
  const size_t bytes = predict_bytes(config, arguments.context);
  const double bits = predict_bits_per_element(config, arguments.context);
  if (common.json) {
    print_json({{"plan", arguments.out},
                {"planner", made.planner},
                {"note", made.note},
                {"context", arguments.context},
                {"bytes", bytes},
                {"bits_per_element", bits},
                {"mean_key_bits", mean_bits(made, Side::kKey)},
                {"mean_value_bits", mean_bits(made, Side::kValue)}});
    return kExitOk;
  }
  print_plan_table(made, profile.get());
  fmt::print("\ncode bits: keys {:.3f}, values {:.3f}; {} sinks; window {}\n\n", mean_bits(made, Side::kKey),
             mean_bits(made, Side::kValue), made.sinks,
             made.window.ratio_key > 0 ? "by ratio" : std::to_string(made.window.tokens));
  print_plan_costs(made, model->shape());
  fmt::print("\nwrote {}: {} and {:.2f} bits per element at {} tokens, all bytes\n", arguments.out,
             human_bytes(static_cast<double>(bytes)), bits, arguments.context);
  return kExitOk;
}

}  // namespace

void add_plan(CommandContext& context) {
  auto arguments = std::make_shared<Arguments>();
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
  command->add_option("--fit", arguments->fit, "Budget: bytes, e.g. 64MiB, for --sequences of --context tokens")
      ->excludes(bits);
  command->add_option("--context", arguments->context, "Tokens per sequence that the budget is for")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 24))
      ->capture_default_str();
  command->add_option("--sequences", arguments->sequences, "Sequences that --fit holds together")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command->add_option("-o,--out", arguments->out, "The plan file to write")->capture_default_str();
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
