#include "session.h"

#include <fmt/core.h>

#include <filesystem>

#include "kvmix/error.h"
#include "models.h"
#include "subjects.h"
#include "text.h"

namespace kvmix::app {
namespace {

double decode_rate(const GenerateResult& result) {
  return result.decode_seconds > 0 ? result.new_tokens / result.decode_seconds : 0;
}

}  // namespace

void add_session_options(CLI::App* command, SessionArguments& arguments) {
  command->add_option("model", arguments.model, kModelHelp)->required();
  command->add_option("--cache,--plan", arguments.cache, "The cache: f16, key/value bits such as 4/4, or a plan file")
      ->capture_default_str();
  add_device_option(command, arguments.device);
  command->add_flag("--force", arguments.force, "Take a plan that was made for another model of the same shape");
  command->add_option("--chat-template", arguments.chat_template,
                      "In place of the model's own: a file with Jinja, or a name that llama.cpp knows, such as chatml");
  command->add_option("--kernel", arguments.kernel, "Attention kernel by name; without it the best that runs here");
  GenerateOptions& g = arguments.generate;
  command->add_option("-n,--max-tokens", g.max_tokens, "Most new tokens of an answer")
      ->check(CLI::Range(1, 1 << 24))
      ->capture_default_str();
  command->add_option("--temperature", g.sampling.temperature, "0 takes the most likely token")
      ->check(CLI::Range(0.0, 100.0))
      ->capture_default_str();
  command->add_option("--top-k", g.sampling.top_k, "0 is off")->check(CLI::Range(0, 1 << 24))->capture_default_str();
  command->add_option("--top-p", g.sampling.top_p, "1 is off")->check(CLI::Range(0.0, 1.0))->capture_default_str();
  command->add_option("--min-p", g.sampling.min_p, "0 is off")->check(CLI::Range(0.0, 1.0))->capture_default_str();
  command->add_option("--seed", g.sampling.seed, "Seed of the sampling")->capture_default_str();
  command->add_option("--stop", g.stop, "Text that ends the answer; may be repeated")
      ->expected(1)
      ->allow_extra_args(false)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
}

std::unique_ptr<Engine> open_engine(const SessionArguments& arguments, const Common& common) {
  const auto model = load_model(arguments.model);
  const Plan plan = resolve_plan(arguments.cache, *model, arguments.force);
  EngineOptions options;
  options.device = arguments.device;
  options.threads = common.threads;
  options.kernel = arguments.kernel;
  options.force_plan = arguments.force;
  return std::make_unique<Engine>(model, plan, options);
}

ChatTemplate chat_template(const SessionArguments& arguments, const Model& model) {
  const std::string& given = arguments.chat_template;
  if (given.empty()) {
    ChatTemplate own = model.chat_template();
    if (own.source.empty())
      throw UsageError(
          "this model has no chat template: give one with --chat-template, such as chatml, or use generate without --chat");
    return own;
  }
  if (given.find_first_of("./") == std::string::npos && !std::filesystem::exists(given)) return {given, ""};
  return {given, read_text_file(given)};
}

void print_closing_line(Engine& engine, const GenerateResult& result) {
  const MemoryReport memory = engine.cache().memory();
  // A line of 80 columns in most cases.
  const std::string reason = result.stop_reason == "end" ? "" : "; " + result.stop_reason;
  fmt::print(stderr, "[{} tokens at {:.1f} tokens/s after {} in {:.2f} s; cache {}{}]\n", result.new_tokens,
             decode_rate(result), result.prompt_tokens, result.prefill_seconds,
             human_bytes(static_cast<double>(memory.total_bytes)), reason);
}

nlohmann::json result_json(Engine& engine, const GenerateResult& result) {
  const MemoryReport memory = engine.cache().memory();
  const CacheStats stats = engine.cache().stats();
  return {{"text", result.text},
          {"stop_reason", result.stop_reason},
          {"prompt_tokens", result.prompt_tokens},
          {"new_tokens", result.new_tokens},
          {"prefill_seconds", result.prefill_seconds},
          {"decode_seconds", result.decode_seconds},
          {"decode_tokens_per_s", decode_rate(result)},
          {"cache_bytes", memory.total_bytes},
          {"cache_tokens", memory.tokens},
          {"kernel", stats.kernel}};
}

}  // namespace kvmix::app
