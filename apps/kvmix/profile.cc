// kvmix profile: measures a model once, for planners.
#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <memory>

#include "command.h"
#include "console.h"
#include "kvmix/measure.h"
#include "models.h"
#include "plan_view.h"
#include "text.h"

namespace kvmix::app {
namespace {

constexpr int kUsualTokens = 2048;  // of a prompt and a window
constexpr int kJoined = 512;        // prompts of fewer tokens are joined to windows
constexpr const char* kOwnText = "own";

struct Arguments {
  std::string model, out = "profile.json", sensitivity = "fisher";
  int windows = 1;
  int sinks = -1, local_sinks = -1, window = -1;  // -1: as is usual
  bool mpo = false;
  CalibrationOptions calibration{
      .prompts = 2, .tokens = 0, .seed = 0, .file = {}, .device = "cpu"};  // 0: kUsualTokens, or the model's context
};

Fp16Part fp16_of(const Arguments& arguments, const ModelShape& shape) {
  Fp16Part part = usual_fp16_part(shape);
  if (arguments.sinks >= 0) part.sinks = arguments.sinks;
  if (arguments.local_sinks >= 0) part.local_sinks = arguments.local_sinks;
  if (arguments.window >= 0) part.window = arguments.window;
  return part;
}

// Written while its profile is measured, so that a measurement can go on where it was stopped. A large model's takes a second
// to write: doing so for every layer would take as long as measuring.
class CurrentFile {
 public:
  CurrentFile(const Profile& profile, const std::string& path) : profile_(profile), path_(path) {}

  void changed() {
    changed_ = true;
    if (Clock::now() >= next_) write();
  }
  void write_changes() {
    if (changed_) write();
  }
  void write() {
    const Clock::time_point begin = Clock::now();
    write_profile(profile_, path_);
    const Clock::time_point end = Clock::now();
    changed_ = false;
    next_ = end + kWritesApart * (end - begin);
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr int kWritesApart = 20;  // times as long as one takes

  const Profile& profile_;
  const std::string& path_;
  bool changed_ = false;
  Clock::time_point next_{};
};

int profile(Arguments arguments, const Common& common) {
  if (arguments.sensitivity == "kl" && arguments.calibration.device != "cpu")
    throw UsageError("--sensitivity kl runs on the device cpu alone; take fisher with --device " +
                     arguments.calibration.device);
  const auto start = std::chrono::steady_clock::now();
  std::string& text = arguments.calibration.file;
  if (text == kOwnText) {
    text.clear();
  } else if (text != kBuiltInText) {
    read_text_file(text);  // refuses what is no text
  }
  const auto model = load_model(arguments.model);
  if (arguments.calibration.tokens == 0)
    arguments.calibration.tokens = static_cast<int>(std::min<int64_t>(kUsualTokens, model->shape().context_tokens));
  const Progress progress = progress_reporter(common);
  const auto prompts = calibration_prompts(model, arguments.calibration, common.threads, progress);
  Profile measured;
  measured.fingerprint = model->shape().fingerprint;
  measured.model = model->shape().name;
  measured.seed = arguments.calibration.seed;
  measured.text = text_checksum(prompts);
  measured.fp16 = fp16_of(arguments, model->shape());
  // An interrupted measurement of the same prompts goes on where it stopped.
  if (std::filesystem::exists(arguments.out)) {
    Profile earlier = read_profile(arguments.out);
    if (earlier.fingerprint == measured.fingerprint && earlier.seed == measured.seed && earlier.text == measured.text &&
        earlier.fp16 == measured.fp16) {
      measured = std::move(earlier);
    }
  }
  CurrentFile file(measured, arguments.out);
  const auto partial = [&](const Profile&) { file.changed(); };
  try {
    if (arguments.sensitivity == "none") {
      profile_gradients(model, prompts, {.device = arguments.calibration.device, .threads = common.threads, .partial = partial},
                        measured, progress);
    } else {
      SensitivityOptions options;
      options.metric = arguments.sensitivity;
      options.windows = arguments.windows;
      // As long as prompts, so that one pass gives both scores and sensitivities; short prompts are joined.
      options.tokens = arguments.calibration.tokens < kJoined ? kUsualTokens : arguments.calibration.tokens;
      options.mpo = arguments.mpo;
      options.device = arguments.calibration.device;
      options.threads = common.threads;
      options.fp16 = measured.fp16;
      options.partial = partial;
      profile_sensitivity(model, prompts, options, measured, progress);
    }
  } catch (...) {
    file.write_changes();
    throw;
  }
  file.write();
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (common.json) {
    print_json({{"profile", arguments.out},
                {"prompts", measured.prompts},
                {"tokens", measured.tokens},
                {"seconds", seconds},
                {"key_score", measured.key_score},
                {"value_score", measured.value_score}});
    return kExitOk;
  }
  print_score_table(measured);
  fmt::print("\nwrote {}: {} prompts, {} tokens, {:.0f} s\n", arguments.out, measured.prompts, measured.tokens, seconds);
  return kExitOk;
}

}  // namespace

void add_profile(CommandContext& context) {
  auto arguments = std::make_shared<Arguments>();
  CLI::App* command = add_command(context, "profile", "Measure how much each layer's keys and values matter to a model",
                                  "kvmix profile smollm2 -o profile.json");
  command->add_option("model", arguments->model, kModelHelp)->required();
  CalibrationOptions& calibration = arguments->calibration;
  calibration.file = kBuiltInText;
  command
      ->add_option(
          "--calib", calibration.file,
          "Calibration text: a file, .txt or .jsonl with {\"text\": ...}, best one like what the model will read; built-in "
          "(English prose); or own, which the model writes")
      ->capture_default_str();
  command->add_option("--prompts", calibration.prompts, "Prompts")->check(CLI::Range(1, 4096))->capture_default_str();
  command
      ->add_option("--tokens", calibration.tokens,
                   "Tokens per prompt, continuation included (2048, or the model's context); memory grows with them: SmolLM2 "
                   "takes .3 GB "
                   "at 512 and .5 at 2048")
      ->check(CLI::Range(16, 32768));
  add_device_option(command, calibration.device);
  command->add_option("--seed", calibration.seed, "Seed of the continuations")->capture_default_str();
  command
      ->add_option(
          "--sensitivity", arguments->sensitivity,
          "How what each codec costs in each layer is measured: fisher (from gradients), output (attention output), kl (on the "
          "running cache) or none (the paper's gradient scores alone)")
      ->check(CLI::IsMember({"fisher", "output", "kl", "none"}))
      ->capture_default_str();
  command
      ->add_option("--windows", arguments->windows,
                   "Windows of --tokens that codecs are measured on: prompts, joined to 2048 where they have fewer than 512")
      ->check(CLI::Range(1, 64))
      ->capture_default_str();
  const auto fp16 = [&](const char* name, int& value, const char* help) {
    command->add_option(name, value, std::string(help) + ", as plans will keep")->check(CLI::Range(0, 4096));
  };
  fp16("--sinks", arguments->sinks, "First tokens in fp16 (16)");
  fp16("--local-sinks", arguments->local_sinks, "First tokens in fp16 in layers with a sliding window (0)");
  fp16("--window", arguments->window, "Newest tokens in fp16 (64, or a 16th of the narrowest sliding window)");
  command->add_flag("--mpo", arguments->mpo,
                    "Measure codecs also behind DecoQuant's decomposition, for planner kvmix to take where it pays");
  command->add_option("-o,--out", arguments->out, "The profile file to write")->capture_default_str();
  command->callback(
      [&context, arguments] { context.action = [arguments](const Common& common) { return profile(*arguments, common); }; });
}

}  // namespace kvmix::app
