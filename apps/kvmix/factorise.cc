// kvmix factorise: low-rank factors of a model's key and value projections.
#include <fmt/core.h>

#include <algorithm>
#include <memory>

#include "command.h"
#include "console.h"
#include "kvmix/measure.h"
#include "models.h"
#include "plan_view.h"
#include "text.h"

namespace kvmix::app {
namespace {

struct Arguments {
  std::string model, out = "factors.gguf", profile;
  FactoriseOptions options;
  CalibrationOptions calibration{.prompts = 4, .tokens = 1024, .seed = 0, .file = {}};
};

int factorise_model(Arguments arguments, const Common& common) {
  if (!arguments.calibration.file.empty()) read_text_file(arguments.calibration.file);  // refuses what is no text
  const auto model = load_model(arguments.model);
  const int group = arguments.options.group, heads = model->shape().layers.front().kv_heads;
  if (group > 0 && heads % group != 0)
    throw UsageError(fmt::format("--group {} does not divide the model's {} KV heads: name a divisor", group, heads));
  const Progress progress = progress_reporter(common);
  std::unique_ptr<Profile> profile;
  if (!arguments.profile.empty()) {
    if (arguments.options.method == "lorc") throw UsageError("--profile is for palu and recalkv: lorc ranks by weights alone");
    profile = std::make_unique<Profile>(read_profile(arguments.profile));
    check_profile(*profile, model->shape(), false, arguments.profile);
    arguments.options.profile = profile.get();
  }
  std::vector<std::vector<Token>> windows;
  if (arguments.options.method != "lorc") {
    arguments.calibration.tokens =
        static_cast<int>(std::min<int64_t>(arguments.calibration.tokens, model->shape().context_tokens));
    windows = calibration_prompts(model, arguments.calibration, common.threads, progress);
  }
  arguments.options.threads = common.threads;
  factorise(model, windows, arguments.options, arguments.out, progress);
  const FactorsInfo info = inspect_factors(arguments.out);
  if (common.json) {
    print_json(factors_json(info));
    return kExitOk;
  }
  print_factors_table(info);
  fmt::print("\nwrote {}: {}, {:.3f} of all channels kept; use it with kvmix plan --factors {}\n", arguments.out, info.method,
             kept_share(info), arguments.out);
  return kExitOk;
}

}  // namespace

void add_factorise(CommandContext& context) {
  auto arguments = std::make_shared<Arguments>();
  CLI::App* command =
      add_command(context, "factorise", "Find low-rank factors, so that a cache stores latents in place of keys and values",
                  "kvmix factorise smollm2 --method palu --keep 0.5 -o factors.gguf");
  std::string methods;
  std::vector<std::string> names;
  for (const FactorisationInfo& m : factorisations()) {
    methods += "\n" + m.name + ": " + m.description;
    names.push_back(m.name);
  }
  command->add_option("model", arguments->model, kModelHelp)->required();
  command->add_option("--method", arguments->options.method, "One of:" + methods)
      ->check(CLI::IsMember(names))
      ->capture_default_str();
  command->add_option("--keep", arguments->options.keep, "Latents of all channels: 0.5 stores half as many numbers a token")
      ->check(CLI::Range(0.01, 1.0))
      ->capture_default_str();
  command
      ->add_option("--group", arguments->options.group,
                   "palu, recalkv: KV heads that share factors (the largest divisor up to 4)")
      ->check(CLI::Range(1, 1024));
  command->add_option("--profile", arguments->profile,
                      "palu, recalkv: ranks by this profile's gradients; without it all are equal");
  command->add_option(
      "--calib", arguments->calibration.file,
      "palu, recalkv: text, .txt or .jsonl with {\"text\": ...}; without it the project's own prompts, continued by the model");
  command->add_option("--prompts", arguments->calibration.prompts, "Windows of that text")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  command->add_option("--tokens", arguments->calibration.tokens, "Tokens of each")
      ->check(CLI::Range(16, 32768))
      ->capture_default_str();
  command->add_option("-o,--out", arguments->out, "The factors file to write")->capture_default_str();
  command->callback([&context, arguments] {
    context.action = [arguments](const Common& common) { return factorise_model(*arguments, common); };
  });
}

}  // namespace kvmix::app
